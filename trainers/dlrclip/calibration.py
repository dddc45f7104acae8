"""Collect what the parts that are fitted after training need: features and logits of images, in order.

Legend: V views, N images, E width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import PROTO_CMA_HEAD, PROTO_HEAD, PROTO_PATCH_HEAD
from .learner import DLRCLIPLearner
from .prototypes import with_another

Report = Mapping[str, Mapping[str, Tensor]]  # what DLRCLIPNetwork.report returns
# Features [N, E] or [V, N, E] by branch: "clip", and where there are such "cma" and "patches"; see ImageFeatures.
Branches = Mapping[str, Tensor]

SOURCE = {  # what a prototype classifier compares
    PROTO_HEAD: "clip",
    PROTO_PATCH_HEAD: "patches",
    PROTO_CMA_HEAD: "cma",
}


@torch.no_grad()
def all_features(loaders: Iterable[tuple[Any, int]], features: Callable[[Any], Branches]) -> tuple[Branches, Tensor]:
    """Collect the features of the same N images in several views.

    Args:
        loaders: each with the number of views of the images that it gives, one view after the other.
        features: gives the features of a batch, by branch.

    Returns:
        The features [V, N, E] by branch, and the labels [N].
    """
    views: dict[str, list[Tensor]] = {}
    labels = torch.empty(0)
    for loader, count in loaders:
        parts: dict[str, list[Tensor]] = {}
        every = []
        for batch in loader:
            for name, value in features(batch).items():
                parts.setdefault(name, []).append(value)
            every.append(batch["label"])
        for name, part in parts.items():
            views.setdefault(name, []).append(torch.cat(part).unflatten(0, (count, -1)))
        labels = torch.cat(every)[: sum(map(len, every)) // count]  # each view repeats them
    return {name: torch.cat(value) for name, value in views.items()}, labels.to(views["clip"][0].device)


@torch.no_grad()
def all_reports(loader: Iterable[Any], report: Callable[[Any], tuple[Report, Tensor]]) -> tuple[Report, Tensor]:
    """Collect the features and the heads of all images of a loader, and their labels [N].

    Args:
        loader: batches.
        report: gives the report of a batch, and its labels.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {"features": {}, "heads": {}}
    labels = []
    for batch in loader:
        found, known = report(batch)
        labels.append(known)
        for group, names in parts.items():
            for name, value in found[group].items():
                names.setdefault(name, []).append(value)
    joined = {group: {name: torch.cat(value) for name, value in names.items()} for group, names in parts.items()}
    return joined, torch.cat(labels)


def fit_mixture(
    learner: DLRCLIPLearner,
    training: tuple[Branches, Tensor],
    texts: Branches,
    validation: tuple[Report, Tensor] | None,
    clip_logits: Callable[[Tensor], Tensor],
) -> None:
    """Fit the prototype classifiers, then the mixture of all branches.

    Without validation images, what the adapted branch knows by heart cannot be weighed: zero-shot CLIP and the
    prototypes on frozen features and patches are, by leaving out each training image in turn whose class has another.
    The prototypes on adapted features then get the weight of those on frozen features, shared half and half, and the
    other branches none. Where no class has two images, each is left out, its class is known by its text alone, and
    patches, of which no text says anything, get no weight.

    Args:
        learner: whose `prototypes` and `mixture` are fitted.
        training: features [V, N, E] of the training images by branch, and labels [N].
        texts: text features [C, E] of those branches that have texts.
        validation: what `all_reports` returns for the validation images; None: there are none.
        clip_logits: gives the zero-shot logits of normalized features.
    """
    features, labels = training
    mixture, left_out = learner.mixture, {}
    assert mixture is not None
    for head, classifier in learner.prototypes.items():
        branch = SOURCE[head]
        seen = None if validation is None else (validation[0]["features"][branch], validation[1])
        left_out[head] = classifier.fit(features[branch], labels, texts.get(branch), seen)
    if validation is not None:
        report, known = validation
        proto = {head: one(report["features"][SOURCE[head]]) for head, one in learner.prototypes.items()}
        mixture.fit({**{name: report["heads"][name] for name in mixture.branches if name not in proto}, **proto}, known)
        return
    tested = with_another(labels)
    frozen = {head: logits[tested] for head, logits in left_out.items() if SOURCE[head] != "cma" and logits is not None}
    if frozen:
        mixture.fit({"clip": clip_logits(features["clip"][0][tested]), **frozen}, labels[tested], left_out=True)
        if PROTO_HEAD in frozen:
            mixture.share(PROTO_HEAD, PROTO_CMA_HEAD)
