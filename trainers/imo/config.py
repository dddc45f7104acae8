"""The configuration keys of the adapters' trainers: TRAINER.IMO.* and TRAINER.IMODINO.*, and their checks."""

from __future__ import annotations

from typing import Any

from ..common import check_choice, check_number, check_whole


def _adapter_keys(cfg: Any) -> Any:
    node = type(cfg)()
    node.PREC = "fp32"  # of the frozen backbone: fp32 | fp16 | amp (fp32 weights, autocast) | bf16; adapters are fp32
    node.DIM = 64  # bottleneck width r, at least 1 (source: 64)
    # Overlap and feature variance are measured on this many validation images of the generic set (at least 2), before
    # the first step, every MEASURE_FREQ steps (0: only after each epoch) and after each epoch.
    node.MEASURE_IMAGES = 1000
    node.MEASURE_FREQ = 0
    return node


def add_imo_config(cfg: Any) -> None:
    """Adds TRAINER.IMO to `cfg` unless it is there."""
    if "IMO" in cfg.TRAINER:
        return
    node = _adapter_keys(cfg)
    # Training images of each class whose mean feature the classifier starts as, centred, at least 0; 0: it starts at
    # random (our choice: the source does not say).
    node.INIT_IMAGES = 0
    # Scale of the normalised features that the classifier takes, at least 0; 0: CLIP's own (our choice: the source does
    # not say). With too large a one the classifier is too sure, and features are driven together.
    node.LOGIT_SCALE = 0.0
    cfg.TRAINER.IMO = node


def add_imodino_config(cfg: Any) -> None:
    """Adds TRAINER.IMODINO to `cfg` unless it is there. OPTIM.LR is the rate per 256 images (source: 8e-4)."""
    if "IMODINO" in cfg.TRAINER:
        return
    node = _adapter_keys(cfg)
    node.LOCAL_CROPS = 8  # beside two global ones, at least 0 (source: 8)
    node.GLOBAL_SCALE = (0.4, 1.0)  # share of the image's area in a global crop (DINO: 0.4 to 1)
    node.LOCAL_SCALE = (0.05, 0.4)  # the same of a local crop (DINO: 0.05 to 0.4)
    # What crops go through, with DINO's strengths: random_flip, colorjitter, randomgrayscale, gaussian_blur, solarize,
    # normalize.
    node.AUGMENT = ("random_flip", "colorjitter", "randomgrayscale", "gaussian_blur", "solarize", "normalize")
    node.HIDDEN_DIM = 2048  # width of the projection head, at least 1 (DINO: 2048)
    node.BOTTLENECK_DIM = 256  # of what its MLP ends in, at least 1 (DINO: 256)
    node.OUT_DIM = 65536  # K, its outputs, at least 2 (DINO: 65536)
    node.FREEZE_LAST_LAYER = 0  # epochs in which the head's last layer is not trained, at least 0 (DINO: 1)
    node.STUDENT_TEMP = 0.1  # temperature of the student, above 0 (DINO: 0.1)
    node.TEACHER_TEMP = 0.07  # of the teacher, above 0, from epoch TEACHER_TEMP_WARMUP on (DINO: 0.07)
    node.TEACHER_TEMP_START = 0.04  # of the teacher in epoch 0, above 0 (DINO: 0.04)
    node.TEACHER_TEMP_WARMUP = 3  # epochs, at least 0 (source: 3)
    node.CENTRE_MOMENTUM = 0.9  # of the teacher's centre, in [0, 1] (DINO: 0.9)
    node.MOMENTUM = 0.9998  # of the teacher at the first step, in [0, 1]; 1 at the last (source: 0.9998)
    node.SAVE = "teacher"  # whose adapters are saved and evaluated: teacher | student (DINO: teacher)
    cfg.TRAINER.IMODINO = node


def check_adapter_keys(cfg: Any, name: str) -> None:
    """Checks the keys that both trainers have, but PREC."""
    path = f"TRAINER.{name}"
    check_whole(cfg, f"{path}.DIM")
    check_whole(cfg, f"{path}.MEASURE_IMAGES", 2)
    check_whole(cfg, f"{path}.MEASURE_FREQ", 0)


def check_imo_config(cfg: Any) -> None:
    """Checks TRAINER.IMO."""
    check_adapter_keys(cfg, "IMO")
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
    check_choice(cfg, f"{path}.SAVE", ("teacher", "student"))
    for key in ("GLOBAL_SCALE", "LOCAL_SCALE"):
        scale = cfg.TRAINER.IMODINO[key]
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"Expected {path}.{key} to be two rising numbers above 0, at most 1, but got {scale}")
    known = ("random_flip", "colorjitter", "randomgrayscale", "gaussian_blur", "solarize", "normalize")
    unknown = [name for name in cfg.TRAINER.IMODINO.AUGMENT if name not in known]
    if unknown:
        raise ValueError(f"Expected {path}.AUGMENT to hold some of {', '.join(known)} but got {unknown[0]!r}")
