"""The configuration keys of the adapters' trainers: TRAINER.IMO.* and TRAINER.IMODINO.*, and their checks."""

from __future__ import annotations

import math
from typing import Any

from ..base import check_choice, check_number, check_whole

FORMS = ("beside", "after")
VIEWS = ("augmented", "center_crop", "center_crop_unnormalized")
INPUTS = ("raw", "normalized")


def _adapter_keys(cfg: Any, scale: float, dropout: float) -> Any:
    """The keys that both trainers have; "source" is the authors' code, akres001/CLIP_fewshot_imo."""
    node = type(cfg)()
    node.PREC = "fp32"  # of the frozen backbone: fp32 (source) | fp16 | amp (fp32 weights, autocast) | bf16
    node.DIM = 64  # bottleneck width r of the adapters, which are fp32; at least 1 (source: 64)
    # beside (source): x' + mlp(ln_2(x')) + SCALE up(relu(down(x'))) in each block, x' what enters the MLP
    # | after (ours): h + up(gelu(down(h))), h the block's output. ResNets, which the source does not have: h in both.
    node.FORM = "beside"
    node.SCALE = scale  # of what is added with FORM beside, above 0 (source: 0.03 for labels, 0.1 for DINO)
    # Share of the bottlenecks' entries that are dropped in training, in [0, 0.99] (source: 0.1 for labels, 0 for DINO).
    node.DROPOUT = dropout
    # What classifier or projection head takes: raw, features as CLIP's encoder gives them (source)
    # | normalized, of length LOGIT_SCALE (IMO) or the root of their width (IMODINO): ours.
    node.FEATURES = "raw"
    # Overlap and feature variance are measured on this many validation images of the generic set (at least 2), before
    # the first step, every MEASURE_FREQ steps (0: only after each epoch) and after each epoch.
    node.MEASURE_IMAGES = 1000
    node.MEASURE_FREQ = 0
    return node


def add_imo_config(cfg: Any) -> None:
    """Adds TRAINER.IMO to `cfg` unless it is there."""
    if "IMO" in cfg.TRAINER:
        return
    node = _adapter_keys(cfg, scale=0.03, dropout=0.1)
    # Training images: augmented, as INPUT.TRANSFORMS says | center_crop, as at test time
    # | center_crop_unnormalized (source, where normalization is commented out), the same with values from 0 to 1.
    node.VIEW = "center_crop_unnormalized"
    # Training images of each class whose mean feature the classifier starts as, centred, at least 0; 0: it starts at
    # random (source).
    node.INIT_IMAGES = 0
    # With FEATURES normalized, the scale of what the classifier takes, at least 0; 0: CLIP's own. With too large a one
    # the classifier is too sure, and features are driven together.
    node.LOGIT_SCALE = 0.0
    cfg.TRAINER.IMO = node


def add_imodino_config(cfg: Any) -> None:
    """Adds TRAINER.IMODINO to `cfg` unless it is there. OPTIM.LR is the rate per 256 images (source: 8e-4)."""
    if "IMODINO" in cfg.TRAINER:
        return
    node = _adapter_keys(cfg, scale=0.1, dropout=0.0)
    node.LOCAL_CROPS = 10  # beside two global ones, at least 0 (source: 10)
    node.GLOBAL_SCALE = (0.25, 1.0)  # share of the image's area in a global crop (source: 0.25 to 1)
    node.LOCAL_SCALE = (0.05, 0.25)  # the same of a local crop (source: 0.05 to 0.25)
    # What crops go through, with DINO's strengths: random_flip, colorjitter, randomgrayscale, gaussian_blur, solarize,
    # normalize.
    node.AUGMENT = ("random_flip", "colorjitter", "randomgrayscale", "gaussian_blur", "solarize", "normalize")
    # Mean and deviation that crops are normalized with; (): INPUT's (source, as DINO: ImageNet's).
    node.CROP_MEAN = (0.485, 0.456, 0.406)
    node.CROP_STD = (0.229, 0.224, 0.225)
    node.HIDDEN_DIM = 2048  # width of the projection head, at least 1 (DINO: 2048)
    node.BOTTLENECK_DIM = 256  # of what its MLP ends in, at least 1 (DINO: 256)
    node.OUT_DIM = 65536  # K, its outputs, at least 2 (DINO: 65536)
    node.TRAIN_HEAD = False  # whether the student's head is trained (source: no; DINO: yes)
    node.FREEZE_LAST_LAYER = 0  # epochs in which the head's last layer is not trained, at least 0 (source: 0; DINO: 1)
    node.STUDENT_TEMP = 0.1  # temperature of the student, above 0 (DINO: 0.1)
    node.TEACHER_TEMP = 0.07  # of the teacher, above 0, from epoch TEACHER_TEMP_WARMUP - 1 on (DINO: 0.07)
    node.TEACHER_TEMP_START = 0.04  # of the teacher in epoch 0, above 0 (DINO: 0.04)
    node.TEACHER_TEMP_WARMUP = 3  # epochs, at least 0 (source: 3)
    node.CENTRE_MOMENTUM = 0.9  # of the teacher's centre, in [0, 1] (DINO: 0.9)
    node.MOMENTUM = 0.9998  # of the teacher at the first step, in [0, 1]; 1 at the last (source: 0.9998)
    # Rate by step: dino, from 0 in OPTIM.WARMUP_EPOCH epochs to the full rate, then along a cosine over the remaining
    # steps to LR_MIN | optim, as OPTIM says.
    node.SCHEDULE = "dino"
    node.LR_MIN = 2e-6  # where the schedule dino ends, at least 0 (source: 2e-6)
    # Weight decay goes from OPTIM.WEIGHT_DECAY to this along a cosine, at least 0 (source: 0.04 to 0.4).
    node.WEIGHT_DECAY_END = 0.4
    node.CLIP_GRAD = 0.3  # largest norm of each parameter's gradient; 0: any (source: 0.3; DINO: 3)
    node.SAVE = "teacher"  # whose adapters are saved and evaluated: teacher | student (DINO: teacher)
    cfg.TRAINER.IMODINO = node


def check_adapter_keys(cfg: Any, name: str) -> None:
    """Checks the keys that both trainers have, but PREC."""
    path = f"TRAINER.{name}"
    check_whole(cfg, f"{path}.DIM")
    check_choice(cfg, f"{path}.FORM", FORMS)
    check_choice(cfg, f"{path}.FEATURES", INPUTS)
    check_number(cfg, f"{path}.SCALE", 0, 1e3, open_low=True)
    check_number(cfg, f"{path}.DROPOUT", 0, 0.99)
    check_whole(cfg, f"{path}.MEASURE_IMAGES", 2)
    check_whole(cfg, f"{path}.MEASURE_FREQ", 0)


def check_imo_config(cfg: Any) -> None:
    """Checks TRAINER.IMO."""
    check_adapter_keys(cfg, "IMO")
    check_choice(cfg, "TRAINER.IMO.VIEW", VIEWS)
    check_whole(cfg, "TRAINER.IMO.INIT_IMAGES", 0)
    check_number(cfg, "TRAINER.IMO.LOGIT_SCALE", 0, 1e3)


def check_imodino_config(cfg: Any) -> None:
    """Checks TRAINER.IMODINO."""
    check_adapter_keys(cfg, "IMODINO")
    path = "TRAINER.IMODINO"
    for key, least in (("LOCAL_CROPS", 0), ("FREEZE_LAST_LAYER", 0), ("TEACHER_TEMP_WARMUP", 0), ("OUT_DIM", 2)):
        check_whole(cfg, f"{path}.{key}", least)
    for key in ("HIDDEN_DIM", "BOTTLENECK_DIM"):
        check_whole(cfg, f"{path}.{key}")
    for key in ("STUDENT_TEMP", "TEACHER_TEMP", "TEACHER_TEMP_START"):
        check_number(cfg, f"{path}.{key}", 0, 1e3, open_low=True)
    for key in ("CENTRE_MOMENTUM", "MOMENTUM"):
        check_number(cfg, f"{path}.{key}", 0, 1)
    for key in ("LR_MIN", "WEIGHT_DECAY_END", "CLIP_GRAD"):
        check_number(cfg, f"{path}.{key}", 0, 1e3)
    check_choice(cfg, f"{path}.SCHEDULE", ("dino", "optim"))
    check_choice(cfg, f"{path}.SAVE", ("teacher", "student"))
    for key, low in (("CROP_MEAN", -math.inf), ("CROP_STD", 0.0)):
        values = cfg.TRAINER.IMODINO[key]
        if len(values) not in (0, 3) or not all(low < value < math.inf for value in values):
            above = " above 0" if low == 0 else ""
            raise ValueError(f"Expected {path}.{key} to be () or three numbers{above} but got {values}")
    for key in ("GLOBAL_SCALE", "LOCAL_SCALE"):
        scale = cfg.TRAINER.IMODINO[key]
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"Expected {path}.{key} to be two rising numbers above 0, at most 1, but got {scale}")
    known = ("random_flip", "colorjitter", "randomgrayscale", "gaussian_blur", "solarize", "normalize")
    unknown = [name for name in cfg.TRAINER.IMODINO.AUGMENT if name not in known]
    if unknown:
        raise ValueError(f"Expected {path}.AUGMENT to hold some of {', '.join(known)} but got {unknown[0]!r}")
