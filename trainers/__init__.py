"""The methods. Importing this package registers every trainer; `extend_cfg` adds their configuration keys.

The same code is `trainers` in the checkout and `dlr_clip` once installed, hence relative imports everywhere below.
With an upstream Dassl, in one's own train.py:

    import dlr_clip
    cfg = get_cfg_default()
    dlr_clip.extend_cfg(cfg)
    dlr_clip.merge_from_file(cfg, dlr_clip.find_config("DLRCLIP", "rn50"))  # upstream's own does not know _BASE_

A new method is one file or folder here, found by being there, with a class under `@TRAINER_REGISTRY.register()`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from typing import Any

from .compat import be_heard, find_toolbox, first_come_first_served, merge_from_file

find_toolbox()  # before anything of the toolbox is imported

from dassl.engine import TRAINER_REGISTRY, TrainerX  # noqa: E402

be_heard(TrainerX, __name__)
first_come_first_served(TRAINER_REGISTRY, __name__)  # before the methods below register

# What lies here and is no method.
ROOMS = frozenset(
    (
        "api",
        "app",
        "base",
        "clip",
        "compat",
        "configs",
        "datasets",
        "features",
        "files",
        "modules",
        "portable",
        "scripts",
    )
)
for _found in pkgutil.iter_modules(__path__):
    if _found.name not in ROOMS and not _found.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_found.name}")

from .base import CLIPTrainer  # noqa: E402
from .clip import add_clip_config, complete_input  # noqa: E402
from .configs import find_config, warn_if_for_another  # noqa: E402

# Names of our trainers elsewhere (in titles of papers, in registries of other repositories) -> the name here. The names
# from elsewhere are not registered; where somebody asks for one, ours is suggested.
ALIASES = {
    "DLR": "DLRCLIP",
    "CLIPDLR": "DLRCLIP",
    "MultiModalAdapter": "MMA",
    "MMAdapter": "MMA",
    "CLIPZeroshot": "ZeroshotCLIP",
    "CLIPZeroshotEnsemble": "ZeroshotCLIP2",
    "ZSCLIP": "ZeroshotCLIP",
    "CLIP": "ZeroshotCLIP",
    "LP": "LinearProbe",
    "LinearProbeCLIP": "LinearProbe",
    "LPCLIP": "LinearProbe",
    "ContextOptimization": "CoOp",
    "ConditionalContextOptimization": "CoCoOp",
    "Tip": "TipAdapter",
    "TipF": "TipAdapterF",
    "TipPlusPlus": "TipAdapterPP",
    "SuSX": "TipX",
    "CrossModal": "CrossModalProbe",
    "CrossModalAdaptation": "CrossModalProbe",
    "CrossModalLinearProbe": "CrossModalProbe",
    "TaskResidual": "TaskRes",
    "ClassAdaptiveLinearProbe": "CLAP",
    "ADAPTER": "CLAP",
    "GaussianDiscriminantAnalysis": "GDA",
    "APE-T": "APET",
    "AMU": "AMUTuning",
    "AMU-Tuning": "AMUTuning",
    "DomainAlignedCLIP": "DAC",
    "TIMO-S": "TIMO",
    "LP++": "LPPlusPlus",
    "LinearProbe_P2": "LPPlusPlus",
    "RegLinearAdapter": "RLA",
    "RegularizedLinearAdapter": "RLA",
    "TransductiveDirichlet": "EMDirichlet",
    "TransductiveCLIP": "EMDirichlet",
    "LoRA": "CLIPLoRA",
    "2SFS": "TwoStageFS",
    "TwoStage": "TwoStageFS",
    "MMRLpp": "MMRLPP",
    "MMRL++": "MMRLPP",
    "IndependentVL": "IVLP",
    "SelfRegulatingPrompts": "PromptSRC",
    "IntraModalOverlap": "IMO",
}

__all__ = [
    "ALIASES",
    "FewShotClassifier",
    "complete_cfg",
    "extend_cfg",
    "find_config",
    "merge_from_file",
    "warn_if_for_another",
]


def extend_cfg(cfg: Any) -> None:
    """Add the keys of CLIP and of every registered trainer to `cfg`, in place; keys that exist are left alone."""
    add_clip_config(cfg)
    for name in TRAINER_REGISTRY.registered_names():
        trainer = TRAINER_REGISTRY.get(name)
        if hasattr(trainer, "add_config"):  # other people's trainers on upstream have none
            trainer.add_config(cfg)


def complete_cfg(cfg: Any, given: Collection[str]) -> None:
    """Fill the keys of INPUT that a configuration leaves open with what its backbone needs, in place.

    Args:
        cfg: an unfrozen configuration whose trainer is registered.
        given: keys that were given for this backbone, such as "INPUT.SIZE"; they stay.
    """
    if issubclass(TRAINER_REGISTRY.get(cfg.TRAINER.NAME), CLIPTrainer):
        complete_input(cfg, given)


def __getattr__(name: str) -> Any:
    """Import what is for people who write Python when it is asked for: it needs the datasets and scikit-learn, too."""
    if name != "FewShotClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.api").FewShotClassifier
