"""The search of Tip-Adapter, Tip-X and their corrected forms: grids, accuracy, and values the sources fix per dataset.

Sources: the configs of gaopengcuhk/Tip-Adapter (`configs/*.yaml`), `hparam_search` of vishaal27/SuS-X (`tipx.py`), and
`run.py` of akres001/CLIP_fewshot_imo.

Legend: n images, N keys, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.search import Axis, best_place
from ..modules.cache import cache_logits

GRID_NUMBERS = 2**24  # most numbers in the logits of the grid points that are evaluated at once


class TipValues(NamedTuple):
    """The values that Tip-Adapter's source fixes for a dataset.

    Attributes:
        beta_end, alpha_end: upper ends of the grid.
        beta, alpha: values used where none is searched; the keys of Tip-Adapter-F are trained with them.
        epoch_factor: epochs of Tip-Adapter-F, divided by the 20 that it has elsewhere.
    """

    beta_end: float
    alpha_end: float
    beta: float
    alpha: float
    epoch_factor: int = 1


# By the names of our datasets. The source writes them caltech101, dtd, eurosat, fgvc, food101, imagenet, ...
TIP_VALUES = {
    "Caltech101": TipValues(12, 5, 1, 3),
    "DescribableTextures": TipValues(13, 13, 1, 2),
    "EuroSAT": TipValues(12, 10, 1, 2, epoch_factor=5),  # 100 epochs
    "FGVCAircraft": TipValues(30, 30, 1, 5),
    "Food101": TipValues(10, 10, 1, 1.17),
    "ImageNet": TipValues(7, 3, 1, 1.17),
    "OxfordFlowers": TipValues(50, 50, 1, 10),
    "OxfordPets": TipValues(7, 3, 1, 1.17),
    "StanfordCars": TipValues(20, 10, 1, 3),
    "SUN397": TipValues(12, 10, 1, 1.17),
    "UCF101": TipValues(7, 3, 1, 3),
}


def tip_values(dataset: str) -> TipValues:
    """Return the source's values for a dataset, or those for ImageNet where the source lacks the dataset."""
    return TIP_VALUES.get(dataset, TIP_VALUES["ImageNet"])


def values_origin(dataset: str) -> str:
    """Return words that name the origin of the values of `tip_values`."""
    return f"Tip-Adapter's code for {dataset if dataset in TIP_VALUES else 'ImageNet'}"


class Grid(NamedTuple):
    """Axes of beta, alpha and gamma, and the order of the loops over them: of equal points the first one is taken.

    Attributes:
        beta, alpha, gamma: see Axis. An `end` of 0 stands for that of the dataset, see TipValues.
        first: the outermost loop: "beta" (then gamma, then alpha) or "alpha" (then beta, then gamma).
    """

    beta: Axis
    alpha: Axis
    gamma: Axis
    first: str


GRIDS = {
    # Tip-Adapter has no gamma: the axis is Tip-X's.
    "tip": Grid(Axis(0.1, 0, 200), Axis(0.1, 0, 20), Axis(0.1, 30, 50), "beta"),
    "tipx": Grid(Axis(1, 50, 200), Axis(0.1, 50, 20), Axis(0.1, 30, 50), "alpha"),
    "overlap": Grid(Axis(0, 20, 20, True), Axis(0, 20, 200, True), Axis(0, 30, 50, True), "alpha"),
}


def grid_of(
    name: str,
    dataset: str,
    scale: Sequence[float] = (),
    steps: Sequence[int] = (),
    gamma_end: float = 0.0,
    gamma_steps: int = 0,
) -> Grid:
    """Return the named grid, changed to the ends and numbers of values that are given.

    Args:
        name: a name in GRIDS.
        dataset: name of the dataset, on which Tip-Adapter's grid depends.
        scale: upper ends of (beta, alpha); (): the grid's.
        steps: numbers of values of (beta, alpha); (): the grid's.
        gamma_end, gamma_steps: upper end and number of values of gamma; 0: the grid's.
    """
    grid, values = GRIDS[name], tip_values(dataset)
    beta_end, alpha_end = scale or (grid.beta.end or values.beta_end, grid.alpha.end or values.alpha_end)
    betas, alphas = steps or (grid.beta.steps, grid.alpha.steps)
    return Grid(
        grid.beta._replace(end=float(beta_end), steps=betas),
        grid.alpha._replace(end=float(alpha_end), steps=alphas),
        grid.gamma._replace(end=gamma_end or grid.gamma.end, steps=gamma_steps or grid.gamma.steps),
        grid.first,
    )


def grid_accuracy(
    clip_logits: Tensor,
    affinity: Tensor,
    key_labels: Tensor,
    labels: Tensor,
    alphas: Sequence[float],
    betas: Sequence[float],
    text: Tensor | None = None,
    gammas: Sequence[float] = (0.0,),
) -> Tensor:
    """Return the accuracy (percent) at every point of the grid, [betas, gammas, alphas].

    Args:
        clip_logits: [n, C]. affinity: [n, N], cosines. key_labels: [N]. labels: [n].
        text: [n, C], Tip-X's third term without gamma; None: without that term.
    """
    points = torch.cartesian_prod(torch.tensor(gammas), torch.tensor(alphas)).to(clip_logits)  # [points, 2]
    out = torch.zeros(len(betas), len(points), dtype=torch.float64)
    at_once = max(1, GRID_NUMBERS // clip_logits.numel())
    for i, beta in enumerate(betas):
        cache = cache_logits(affinity, key_labels, clip_logits.shape[1], beta)
        for first in range(0, len(points), at_once):
            gamma, alpha = points[first : first + at_once, :, None, None].unbind(1)
            logits = clip_logits + alpha * cache if text is None else clip_logits + gamma * text + alpha * cache
            hits = (logits.argmax(dim=-1) == labels).double().mean(dim=-1)
            out[i, first : first + at_once] = 100.0 * hits.cpu()
    return out.unflatten(1, (len(gammas), len(alphas)))


class GridPoint(NamedTuple):
    """A point of the grid, and its accuracy (percent) on the images it was chosen on."""

    alpha: float
    beta: float
    gamma: float
    accuracy: float


def best_point(
    accuracy: Tensor,
    alphas: Sequence[float],
    betas: Sequence[float],
    gammas: Sequence[float] = (0.0,),
    first: str = "beta",
) -> GridPoint:
    """Return the point of the grid with the highest accuracy.

    Args:
        accuracy: [betas, gammas, alphas].
        first: "beta": of equal points, take the one with the least beta, then gamma, then alpha; "alpha": the one with
            the least alpha, then beta, then gamma.
    """
    i, j, k = best_place(accuracy, None if first == "beta" else lambda place: (place[2], place[0], place[1]))
    return GridPoint(alphas[k], betas[i], gammas[j], float(accuracy.max()))
