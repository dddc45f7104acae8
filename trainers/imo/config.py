"""Settings of the adapters' trainers: TRAINER.IMO.* and TRAINER.IMODINO.*.

"source" is the authors' code, akres001/CLIP_fewshot_imo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..base import MethodConfig, key
from ..modules.overlap_adapters import FORMS

AUGMENTATIONS = ("random_flip", "colorjitter", "randomgrayscale", "gaussian_blur", "solarize", "normalize")


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Settings that both trainers have."""

    dim: int = key(64, "bottleneck width r of the adapters, which are fp32", low=1, source="64")
    form: str = key(
        "beside",
        "beside: x' + mlp(ln_2(x')) + SCALE up(relu(down(x'))) in each block, x' what enters the MLP; after (ours): "
        "h + up(gelu(down(h))), h the block's output; on ResNets, which the source does not have, both see h",
        choices=FORMS,
        source="beside",
    )
    scale: float = key(
        0.03, "factor of what is added with FORM beside", above=0, source="0.03 for labels, 0.1 for DINO"
    )
    dropout: float = key(
        0.1,
        "share of the bottlenecks' entries that are dropped in training",
        low=0,
        high=0.99,
        source="0.1 for labels, 0 for DINO",
    )
    features: str = key(
        "raw",
        "what classifier or projection head takes: features as CLIP's encoder gives them (raw), or, normalized (ours), "
        "of length LOGIT_SCALE (IMO) or the root of their width (IMODINO)",
        choices=("raw", "normalized"),
        source="raw",
    )
    measure_images: int = key(
        1000,
        "overlap and feature variance are measured on this many validation images of the generic set, before the first "
        "step and after each epoch",
        low=2,
    )
    measure_freq: int = key(0, "measure every so many steps, too; 0: only after each epoch", low=0)


@dataclass(frozen=True)
class IMOConfig(AdapterConfig):
    """Settings of IMO."""

    view: str = key(
        "center_crop_unnormalized",
        "training images: as INPUT.TRANSFORMS says (augmented), as at test time (center_crop), or the same with values "
        "from 0 to 1",
        choices=("augmented", "center_crop", "center_crop_unnormalized"),
        source="center_crop_unnormalized, where normalization is commented out",
    )
    init_images: int = key(
        0,
        "training images of each class whose mean feature the classifier starts as, centered; 0: it starts at random",
        low=0,
        source="0",
    )
    logit_scale: float = key(
        0.0,
        "with FEATURES normalized, the scale of what the classifier takes; 0: CLIP's own; with too large a one the "
        "classifier is too sure, and features are driven together",
        low=0,
    )


@dataclass(frozen=True)
class IMODINOConfig(AdapterConfig):
    """Settings of IMODINO. OPTIM.LR is the rate per 256 images (source: 8e-4)."""

    scale: float = key(0.1, "factor of what is added with FORM beside", above=0, source="0.1")
    dropout: float = key(
        0.0, "share of the bottlenecks' entries that are dropped in training", low=0, high=0.99, source="0"
    )
    local_crops: int = key(10, "local crops beside two global ones", low=0, source="10")
    global_scale: tuple[float, ...] = key((0.25, 1.0), "share of the image's area in a global crop", source="0.25 to 1")
    local_scale: tuple[float, ...] = key((0.05, 0.25), "the same of a local crop", source="0.05 to 0.25")
    augment: tuple[str, ...] = key(AUGMENTATIONS, "what crops go through, with DINO's strengths: some of the default")
    crop_mean: tuple[float, ...] = key(
        (0.485, 0.456, 0.406), "mean that crops are normalized with; (): INPUT's", source="ImageNet's, as DINO"
    )
    crop_std: tuple[float, ...] = key(
        (0.229, 0.224, 0.225), "deviation that crops are normalized with; (): INPUT's", source="ImageNet's, as DINO"
    )
    hidden_dim: int = key(2048, "width of the projection head", low=1, source="2048, as DINO")
    bottleneck_dim: int = key(256, "width of what the head's MLP ends in", low=1, source="256, as DINO")
    out_dim: int = key(65536, "K, the head's outputs", low=2, source="65536, as DINO")
    train_head: bool = key(False, "whether the student's head is trained", source="no; DINO: yes")
    freeze_last_layer: int = key(0, "epochs in which the head's last layer is not trained", low=0, source="0; DINO: 1")
    student_temp: float = key(0.1, "temperature of the student", above=0, source="0.1, as DINO")
    teacher_temp: float = key(
        0.07, "temperature of the teacher from epoch TEACHER_TEMP_WARMUP - 1 on", above=0, source="0.07, as DINO"
    )
    teacher_temp_start: float = key(0.04, "temperature of the teacher in epoch 0", above=0, source="0.04, as DINO")
    teacher_temp_warmup: int = key(3, "epochs until TEACHER_TEMP is reached", low=0, source="3")
    centre_momentum: float = key(0.9, "momentum of the teacher's centre", low=0, high=1, source="0.9, as DINO")
    momentum: float = key(
        0.9998, "momentum of the teacher at the first step; 1 at the last", low=0, high=1, source="0.9998"
    )
    schedule: str = key(
        "dino",
        "rate by step: dino: from 0 in OPTIM.WARMUP_EPOCH epochs to the full rate, then along a cosine over the "
        "remaining steps to LR_MIN; optim: as OPTIM says",
        choices=("dino", "optim"),
    )
    lr_min: float = key(2e-6, "rate at which the schedule dino ends", low=0, source="2e-6")
    weight_decay_end: float = key(
        0.4, "weight decay goes from OPTIM.WEIGHT_DECAY to this along a cosine", low=0, source="0.04 to 0.4"
    )
    clip_grad: float = key(0.3, "largest norm of each parameter's gradient; 0: any", low=0, source="0.3; DINO: 3")
    save: str = key(
        "teacher", "whose adapters are saved and evaluated", choices=("teacher", "student"), source="teacher, as DINO"
    )

    def check(self, path: str) -> None:
        """Check means, deviations, scales of crops, and names of augmentations; see MethodConfig."""
        for name, values, low in (("CROP_MEAN", self.crop_mean, -math.inf), ("CROP_STD", self.crop_std, 0.0)):
            if len(values) not in (0, 3) or not all(low < value < math.inf for value in values):
                above = " above 0" if low == 0 else ""
                raise ValueError(f"Expected {path}.{name} to be () or three numbers{above} but got {values}")
        for name, scale in (("GLOBAL_SCALE", self.global_scale), ("LOCAL_SCALE", self.local_scale)):
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"Expected {path}.{name} to be two rising numbers above 0, at most 1, but got {scale}")
        unknown = [name for name in self.augment if name not in AUGMENTATIONS]
        if unknown:
            raise ValueError(
                f"Expected {path}.AUGMENT to hold some of {', '.join(AUGMENTATIONS)} but got {unknown[0]!r}"
            )
