"""Names that upstream's modules offer because they import them; other projects import these names from there.

A module of ours asks here for a name that it does not have. So no module imports anything, or grows, for the sake of
such a name. Upstream's trainers and layers for domain adaptation, its network zoo, its data sets and the single
operations of its RandAugment are out of scope.
"""

from __future__ import annotations

import importlib
from typing import Any

_LIBRARIES = {
    "F": "torch.nn.functional",
    "Image": "PIL.Image",
    "Optimizer": "torch.optim:Optimizer",
    "OrderedDict": "collections:OrderedDict",
    "SequenceMatcher": "difflib:SequenceMatcher",
    "SummaryWriter": "torch.utils.tensorboard:SummaryWriter",
    "T": "torchvision.transforms",
    "TorchDataset": "torch.utils.data:Dataset",
    "confusion_matrix": "sklearn.metrics:confusion_matrix",
    "copy": "copy",
    "defaultdict": "collections:defaultdict",
    "errno": "errno",
    "f1_score": "sklearn.metrics:f1_score",
    "nn": "torch.nn",
    "np": "numpy",
    "osp": "os.path",
    "partial": "functools:partial",
    "random": "random",
    "sys": "sys",
    "time": "time",
    "torch": "torch",
    "tqdm": "tqdm:tqdm",
    "warnings": "warnings",
    **{
        name: f"torchvision.transforms:{name}"
        for name in (
            *("CenterCrop", "ColorJitter", "Compose", "GaussianBlur", "Normalize", "RandomApply", "RandomCrop"),
            *("RandomGrayscale", "RandomHorizontalFlip", "RandomResizedCrop", "Resize", "ToTensor"),
        )
    },
}
_OURS = {
    **{
        name: f"dassl.utils:{name}"
        for name in (
            *("AverageMeter", "MetricMeter", "check_isfile", "load_checkpoint", "mkdir_if_missing"),
            *("resume_from_checkpoint", "save_checkpoint", "tolist_if_not"),
        )
    },
    **{name: f"dassl.data.transforms.autoaugment:{name}" for name in ("CIFAR10Policy", "ImageNetPolicy", "SVHNPolicy")},
    **{name: f"dassl.optim.warmup:{name}" for name in ("ConstantWarmupScheduler", "LinearWarmupScheduler")},
    "RAdam": "dassl.optim.radam:RAdam",
    "RandAugment": "torchvision.transforms.v2:RandAugment",
    "build_backbone": "dassl.modeling:build_backbone",
    "build_head": "dassl.modeling:build_head",
}
OFFERED = {
    "dassl.data.data_manager": ("T", "TorchDataset"),
    "dassl.data.datasets.base_dataset": ("check_isfile", "osp"),
    "dassl.data.samplers": ("copy", "np"),
    "dassl.data.transforms.randaugment": ("RandAugment", "np", "random"),
    "dassl.data.transforms.transforms": (
        *("CIFAR10Policy", "CenterCrop", "ColorJitter", "Compose", "F", "GaussianBlur", "ImageNetPolicy", "Normalize"),
        *("RandAugment", "RandomApply", "RandomCrop", "RandomGrayscale", "RandomHorizontalFlip", "RandomResizedCrop"),
        *("Resize", "SVHNPolicy", "ToTensor", "np", "random"),
    ),
    "dassl.engine.trainer": (
        *("AverageMeter", "MetricMeter", "OrderedDict", "SummaryWriter", "build_backbone", "build_head"),
        *("load_checkpoint", "mkdir_if_missing", "nn", "np", "osp", "resume_from_checkpoint", "save_checkpoint"),
        *("tolist_if_not", "tqdm"),
    ),
    "dassl.evaluation.evaluator": ("confusion_matrix", "defaultdict", "f1_score", "np", "osp"),
    "dassl.optim.lr_scheduler": ("ConstantWarmupScheduler", "LinearWarmupScheduler", "torch"),
    "dassl.optim.optimizer": ("RAdam", "torch", "warnings"),
    "dassl.utils.logger": ("mkdir_if_missing", "osp"),
    "dassl.utils.tools": ("Image", "SequenceMatcher", "errno", "osp", "sys", "time"),
    "dassl.utils.torchtools": ("OrderedDict", "mkdir_if_missing", "osp", "partial"),
}


def upstream_name(module: str, name: str) -> Any:
    """Return what upstream's module ``module`` offers as ``name``, for our module's ``__getattr__``.

    Raises:
        AttributeError: upstream's module offers no such name, or the name is out of scope.
    """
    if name not in OFFERED.get(module, ()):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    where, _, attribute = (_OURS.get(name) or _LIBRARIES[name]).partition(":")
    found = importlib.import_module(where)
    return getattr(found, attribute) if attribute else found
