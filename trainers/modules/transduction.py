"""Assign images to Gaussians together: each image also listens to its nearest neighbors.

    ln z_n = lambda ln y_n + (ln p(x_n | mu, sigma) + a_n) / 50 + constant,    a_n = 50 / (2 m) sum_p (w_np + w_pn) z_p

z are assignments, y zero-shot probabilities. w_np is the similarity of the images n and p where p is one of the m
nearest neighbors of n, and 0 elsewhere (Zanella et al., Boosting Vision-Language Models with Transduction, 2024, and
Realistic Test-Time Adaptation of Vision-Language Models, 2025).

No matrix of queries by queries is built. Sums go in a fixed order, so that a GPU gives the same numbers every time.

Legend: Q queries, S supports, C classes, E width of the features, m neighbors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 50.0  # of likelihood and neighbors, beside the texts
NEIGHBORS = 3
ROUNDS = 10  # updates of the Gaussians
STEPS = 5  # updates of the assignments in each round
SMALLEST = 1e-12  # of a variance: where all images agree
AT_ONCE = 2**24  # numbers of a chunk


class Edges(NamedTuple):
    """Edges of a graph in groups; no two edges of a group end in the same row."""

    groups: list[tuple[Tensor, Tensor, Tensor]]  # row, column, weight
    rows: int

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of weight * values[column] over the edges of each row, [rows, C], for values [columns, C]."""
        total = values.new_zeros(self.rows, values.shape[1])
        size = max(1, AT_ONCE // max(1, values.shape[1]))
        for group in self.groups:
            for row, column, weight in zip(*(part.split(size) for part in group), strict=True):
                total[row] = total[row].addcmul(weight[:, None], values[column])
        return total


def grouped(rows: Tensor, columns: Tensor, weights: Tensor, count: int) -> Edges:
    """Return the edges [n] in groups: the first edge of each row, the second one of each, and so on.

    Args:
        rows, columns: the places that an edge joins.
        weights: in the type that sums are to have.
        count: number of rows.
    """
    order = rows.argsort(stable=True)
    rows, columns, weights = rows[order], columns[order], weights[order]
    degree = rows.bincount(minlength=count)
    rank = torch.arange(len(rows), device=rows.device) - (degree.cumsum(0) - degree)[rows]
    order = rank.argsort(stable=True)
    sizes = rank.bincount().tolist()
    parts = (part[order].split(sizes) for part in (rows, columns, weights))
    return Edges(list(zip(*parts, strict=True)), count)


def nearest(images: Tensor, queries: Tensor, count: int, *, own: bool, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Return similarity and place of the nearest queries of each image, [n, m] each, found in chunks.

    Args:
        images: [n, E]. queries: [Q, E].
        count: m; fewer where there are fewer queries.
        own: whether the images are the queries; then no image is its own neighbor.
        skip: how many of the nearest are left out.
    """
    count = min(count, max(0, len(queries) - skip - int(own)))
    weights, places = [], []
    start = 0
    for part in images.split(max(1, AT_ONCE // len(queries))):
        similar = part @ queries.t()
        if own:
            each = torch.arange(len(part), device=part.device)
            similar[each, start + each] = -torch.inf
        found = similar.topk(min(count + skip, len(queries)), dim=1)
        weights.append(found.values[:, skip:])
        places.append(found.indices[:, skip:])
        start += len(part)
    return torch.cat(weights), torch.cat(places)


class Graph(NamedTuple):
    """The neighbors of the queries."""

    edges: Edges  # between queries, in both directions
    pull: Tensor | None  # what supports give: the sum over them of w times the one-hot label, [Q, C]


def neighbor_graph(
    queries: Tensor,
    supports: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    classes: int = 0,
    neighbors: int = NEIGHBORS,
    displaced: bool = False,
) -> Graph:
    """Return the graph of queries [Q, E], whose supports [S, E] with labels [S] pull at the queries nearest to them.

    Args:
        classes: C, where there are supports.
        displaced: do as TransCLIP's code does. It lists neighbors by supports, then queries, assignments by queries,
            then supports, so that most images take the neighbors of others. A support's neighbors there are the 2nd to
            4th nearest queries.
    """
    rows = [nearest(queries, queries, neighbors, own=True)]
    if supports is not None:
        skip = 1 if displaced else 0
        rows.insert(0 if displaced else 1, nearest(supports, queries, neighbors, own=False, skip=skip))
    width = min(places.shape[1] for _, places in rows)  # they differ only where queries are very few
    weights, places = (torch.cat([part[:, :width] for part in parts]) for parts in zip(*rows, strict=True))
    own, size = torch.arange(len(places), device=places.device)[:, None].expand_as(places), len(queries)
    rows_of, columns, w = own[:size].flatten(), places[:size].flatten(), weights[:size].flatten()
    edges = grouped(torch.cat([rows_of, columns]), torch.cat([columns, rows_of]), w.repeat(2), size)
    if supports is None or labels is None:
        return Graph(edges, None)
    pulls = grouped(places[size:].flatten(), own[size:].flatten() - size, weights[size:].flatten(), size)
    return Graph(edges, pulls.sum(F.one_hot(labels, classes).to(queries.dtype)))


def log_likelihood(queries: Tensor, means: Tensor, variances: Tensor, *, of_each: bool) -> Tensor:
    """Return -1/2 sum_e (x - mu)^2 / sigma for every query and class, [Q, C]; each row's largest is 0.

    Args:
        queries: [Q, E].
        means: [C, E], float64.
        variances: [1, E] or [C, E], float64.
        of_each: whether classes have variances of their own; then -1/2 sum_e ln sigma belongs to it.
    """
    precision = variances.reciprocal()
    linear = (means * precision).t()
    constant = (means.square() * precision).sum(dim=1)
    if of_each:
        constant = constant + variances.log().sum(dim=1)
    found = queries.new_empty(len(queries), len(means))
    for rows, out in zip(*(x.split(max(1, AT_ONCE // sum(means.shape))) for x in (queries, found)), strict=True):
        x = rows.double()
        value = x @ linear - constant / 2
        if of_each:  # else it is the same for every class
            value -= x.square() @ precision.t() / 2
        out.copy_(value - value.amax(dim=1, keepdim=True))
    return found


def assign(
    prior: Tensor, likelihood: Tensor, z: Tensor, graph: Graph, neighbors: int = NEIGHBORS
) -> tuple[Tensor, Tensor]:
    """Update the assignments STEPS times, and return what they are the softmax of, and themselves, [Q, C] each.

    Args:
        prior: lambda ln y, [Q, C].
        likelihood: [Q, C].
        z: assignments until now, [Q, C].
        graph: the neighbors.
        neighbors: m.
    """
    base = torch.add(prior, likelihood, alpha=1 / TEMPERATURE)
    if graph.pull is not None:
        base.add_(graph.pull, alpha=1 / (2 * neighbors))
    for _ in range(STEPS):
        scores = torch.add(base, graph.edges.sum(z), alpha=1 / (2 * neighbors))
        z = scores.softmax(dim=1)
    return scores, z


class Moments(NamedTuple):
    """Weighted sums over the queries, in float64."""

    mass: Tensor  # sum_n z_nk, [C]
    first: Tensor  # sum_n z_nk x_n, [C, E]
    second: Tensor  # sum_n z_nk x_n^2, [C, E], or, over all classes, [1, E]


def moments(queries: Tensor, z: Tensor, *, of_each: bool) -> Moments:
    """Return the weighted sums of queries [Q, E] under assignments [Q, C].

    Args:
        of_each: whether the squares are summed for each class.
    """
    classes, width = z.shape[1], queries.shape[1]
    mass, first, second = (
        z.new_zeros(shape, dtype=torch.float64)
        for shape in ((classes,), (classes, width), (classes if of_each else 1, width))
    )
    size = max(1, AT_ONCE // (classes + width))
    for part, weights in zip(queries.split(size), z.split(size), strict=True):
        x, w = part.double(), weights.double().t()
        mass += w.sum(dim=1)
        first += w @ x
        second += (w if of_each else w.sum(dim=0, keepdim=True)) @ x.square()
    return Moments(mass, first, second)


def spread(sums: Moments, means: Tensor) -> Tensor:
    """Return the sum of z (x - mu)^2 over the queries, [C, E] or, over all classes, [1, E].

    Args:
        sums: `second` may be of each class, or of all.
        means: [C, E].
    """
    linear, constant = -2 * means * sums.first, sums.mass[:, None] * means.square()
    if len(sums.second) == 1:
        linear, constant = linear.sum(dim=0), constant.sum(dim=0)
    return sums.second + linear + constant


def directions(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Return vectors [C, E] with length 1; a row of `otherwise` [C, E] where there is no direction."""
    length = vectors.norm(dim=1, keepdim=True)
    known = length > 0
    return torch.where(known, vectors / torch.where(known, length, 1), otherwise)
