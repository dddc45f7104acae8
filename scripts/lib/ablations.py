"""Named variants of methods: what an ablation compares, and what `TRAINER@VARIANT` means on command lines.

A variant is a name (it stands in output folders), the group of the ablation that it belongs to, its row's label, and
the KEY VALUE pairs that make it of the configuration. A value that the configuration has anyway costs no further run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

FULL = "as configured"  # label of the method without a variant


class Variant(NamedTuple):
    """One row of an ablation.

    Attributes:
        tiny: True: for the tiny CLIP with its six blocks only; False: for the others only.
    """

    group: str
    name: str
    label: str
    options: tuple[str, ...]
    tiny: bool | None = None

    def suits(self, backbone: str) -> bool:
        """Return whether the variant makes sense for that backbone."""
        return self.tiny is None or self.tiny == (backbone == "tiny")


def _options(values: Mapping[str, object]) -> tuple[str, ...]:
    """Return KEY VALUE pairs for keys of TRAINER.DLRCLIP."""
    return tuple(part for key, value in values.items() for part in (f"TRAINER.DLRCLIP.{key}", str(value)))


def _switches(name: str, label: str, **on: bool) -> Variant:
    return Variant("parts", name, label, _options(on))


def _values(group: str, key: str, *values: float, tiny: bool | None = None) -> list[Variant]:
    return [
        Variant(group, f"{key.lower()}{value:g}", f"{key} {value:g}", (f"TRAINER.DLRCLIP.{key}", f"{value:g}"), tiny)
        for value in values
    ]


def _mixture(name: str, without: str = "", *off: str) -> Variant:
    """Return the form with the third level, without the parts whose switches are named."""
    values = {"FUSION": "mixture", "HEAD": "mixed", **dict.fromkeys(off, False)}
    return Variant("third level", name, f"FUSION mixture{without}", _options(values))


VARIANTS: dict[str, list[Variant]] = {
    "DLRCLIP": [
        _switches("cma", "CMA", GLR=False, SKD=False),
        _switches("glr", "GLR", CMA=False, SKD=False),
        _switches("cma+glr", "CMA + GLR", SKD=False),
        _switches("cma+skd", "CMA + SKD", GLR=False),
        Variant("refiner", "shared", "GLR_MODE shared", ("TRAINER.DLRCLIP.GLR_MODE", "shared")),
        Variant("fusion", "robust", "FUSION robust", ("TRAINER.DLRCLIP.FUSION", "robust")),
        _mixture("mixture"),
        _mixture("no-proto", ", no prototypes of frozen features", "MIXTURE.PROTO"),
        _mixture("no-proto-patch", ", no prototypes of patches", "MIXTURE.PROTO_PATCH"),
        _mixture("no-proto-cma", ", no prototypes of adapted features", "MIXTURE.PROTO_CMA"),
        _mixture("no-glr", ", no GLR", "GLR"),
        _mixture("no-cma", ", no CMA", "CMA"),
        _mixture("no-skd", ", no SKD", "SKD"),
        _mixture("training-free", ", no CMA, no GLR: nothing is trained", "CMA", "GLR"),
        *_values("alpha", "FIXED_ALPHA", 0.2, 0.5, 1),
        *_values("weight", "FIXED_WEIGHT", 0, 0.5, 1),
        *_values("layers", "START", 1),
        *_values("layers", "START", 3, tiny=True),
        *_values("layers", "START", 5),
        *_values("layers", "START", 9, tiny=False),
        *_values("layers", "END", 3, tiny=True),
        *_values("layers", "END", 8, tiny=False),
        *_values("dim", "DIM", 8, 32, 128),
        *_values("scale", "SCALE", 0.01, 0.1, 1),
        *_values("temperature", "T", 1, 2, 4),
        *_values("smoothing", "SMOOTHING", 0, 0.2, 0.5),
        *_values("lambda", "LAMBDA", 0.01, 0.1, 1),
    ],
}

_MAE = ("OPTIM.LOSS", "mae")
_UNCLEANED, _DROP, _RELABEL = (("DATASET.CLEANING", how) for how in ("none", "drop", "relabel"))
# Variants of every method, for training images with wrong labels; they are in no ablation. Each says how labels are
# cleaned, because a method's config may do that itself (DeIL's). A method that takes no other loss refuses those with
# mae.
FOR_ALL = [
    Variant("label noise", "mae", "OPTIM.LOSS mae, CLEANING none", (*_MAE, *_UNCLEANED)),
    Variant("label noise", "uncleaned", "CLEANING none", _UNCLEANED),
    Variant("label noise", "drop", "CLEANING drop", _DROP),
    Variant("label noise", "relabel", "CLEANING relabel", _RELABEL),
    Variant("label noise", "mae+drop", "OPTIM.LOSS mae, CLEANING drop", (*_MAE, *_DROP)),
    Variant("label noise", "mae+relabel", "OPTIM.LOSS mae, CLEANING relabel", (*_MAE, *_RELABEL)),
]
