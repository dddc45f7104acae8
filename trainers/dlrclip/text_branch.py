"""The adapted text branch for one class list: the constants of each group of classes, and what a step computes.

Everything before the first adapted block, and that block without its adapter, is constant and computed once. A step
runs the rest:

* classes are grouped by prompt length, so that no prompt is padded to the longest of all where that costs more than
  another group;
* with `chunk`, no group has more classes than that, and each group is computed again in the backward pass, so that the
  activations of only one group at a time are alive;
* in data-parallel training each process encodes its share of the classes, and every process gets all features.

Legend: C classes, E width of the joint embedding, R processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..clip import PromptTokens, TextState, TextTower
from ..clip.blocks import recompute
from ..modules.cross_modal_adapter import CrossModalAdapter

# Cost of one more group beside its tokens, in tokens: the launches of its kernels, and the shared tokens once more.
GROUP_COST = {"cpu": 32, "cuda": 2048}

Chunk = tuple[Tensor, TextState, TextState]  # class numbers [n], what the first adapter sees, the block's output
Encode = Callable[[CrossModalAdapter, TextState, TextState, bool], Tensor]


def group_by_length(lengths: Sequence[int], most: int = 0, cost: int = 32) -> list[list[int]]:
    """Group prompts by length at the least cost, the shortest first.

    The cost is the sum over the groups of (prompts * longest prompt of the group + `cost`). Groups that are then larger
    than `most` are cut.

    Args:
        lengths: number of tokens of each prompt.
        most: largest number of prompts in a group; 0: any number.
        cost: what a group costs beside its tokens, in tokens.

    Returns:
        The positions in `lengths` of each group's prompts.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    ends = [k for k in range(1, len(order) + 1) if k == len(order) or lengths[order[k]] > lengths[order[k - 1]]]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # prompts grouped so far -> least cost, start of the last group
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((best[start][0] + (end - start) * longest + cost, start) for start in best)
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    groups = [order[start:end] for end, start in zip(cuts, cuts[1:], strict=False)][::-1]
    size = most or len(order)
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


class GatherRows(Function):
    """Give every process the rows that all processes have computed; differentiable.

    Data-parallel training averages the gradients of parameters over processes. Process r has the loss l_r of its own
    images, which depends on all rows W. Every process is to end with the mean over r of dl_r/dtheta. Row k reaches the
    parameters in one process only, q, whose contribution the averaging divides by R. So the gradient of row k in q must
    be the SUM over r of dl_r/dW_k. (Without the sum, q would see its own loss alone; with a mean, R times too little.)
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, shares: list[Tensor]) -> Tensor:
        """Return all rows [C, E].

        Args:
            mine: [n, E], the rows that this process has computed, those with the numbers shares[rank].
            shares: the row numbers of each process, together 0..C-1.
        """
        ctx.rows = shares[dist.get_rank()]
        padded = mine.new_zeros(max(map(len, shares)), mine.shape[1])  # collectives want equal sizes
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        rows = mine.new_empty(sum(map(len, shares)), mine.shape[1])
        for part, share in zip(parts, shares, strict=True):
            rows[share] = part[: len(share)]
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total)  # sum
        return total[ctx.rows], None


class AdaptedText:
    """The adapted text branch for one class list.

    Args:
        tower: the frozen text tower.
        tokens: a prompt per class.
        start: the first adapted block.
        chunk: most classes that are encoded at once when training; 0: no such limit.
        checkpointing: when training, compute blocks again in the backward pass (with `chunk`, groups are anyway).
        wrap: applied to the function that encodes a group when training; for torch.compile.
    """

    def __init__(
        self,
        tower: TextTower,
        tokens: PromptTokens,
        start: int,
        chunk: int = 0,
        checkpointing: bool = False,
        wrap: Callable[[Encode], Encode] | None = None,
    ) -> None:
        self.tower, self.tokens, self.start, self.chunk = tower, tokens, start, chunk
        self.checkpointing = checkpointing
        self._wrapped = self._encode if wrap is None else wrap(self._encode)
        self._chunks: dict[tuple[int, int], list[Chunk]] = {}  # (rank, R) -> the groups of that share
        self._shares: dict[int, tuple[list[Tensor], Tensor]] = {}  # R -> what `_order` returns

    def _order(self, processes: int) -> tuple[list[Tensor], Tensor]:
        """Return the class numbers of each process's share, and the place of each class in the first share.

        The numbers of a share are in the order in which its process encodes the classes.
        """
        if processes not in self._shares:  # computed once, because it takes a transfer from the device
            shares = [torch.cat(self._plan(r, processes)) for r in range(processes)]
            self._shares[processes] = shares, shares[0].argsort()
        return self._shares[processes]

    def _plan(self, rank: int, processes: int) -> list[Tensor]:
        """Return the class numbers of each group of a process's share.

        Shares are dealt out by prompt length, so that all processes have as much to do.
        """
        device, eot = self.tokens.eot.device, self.tokens.eot.cpu()
        share = eot.sort(stable=True).indices[rank::processes]
        own = (eot[share] + 1 - self.tokens.shared).tolist()  # the shared tokens do not count
        groups = group_by_length(own, self.chunk, GROUP_COST.get(device.type, GROUP_COST["cpu"]))
        return [share[group].to(device) for group in groups]

    @torch.no_grad()
    def _groups(self, rank: int, processes: int) -> list[Chunk]:
        """Return the groups of a process's share, with their constants, computed when first asked for."""
        if (rank, processes) not in self._chunks:
            chunks = []
            with torch.autocast(self.tokens.eot.device.type, enabled=False):  # once, so in the weights' own precision
                for rows in self._plan(rank, processes):
                    state = self.tower.prefix(self.tokens.take(rows), self.start - 1)
                    chunks.append((rows, *self.tower.enter(state)))
            self._chunks[rank, processes] = chunks
        return self._chunks[rank, processes]

    def _encode(self, cma: CrossModalAdapter, seen: TextState, out: TextState, checkpointing: bool) -> Tensor:
        """Return normalized features [n, E] of a group, fp32."""
        edits = [cma.text_edit]
        state = self.tower.join(out, edits, seen)
        features = self.tower.suffix(state, state.next_block, edits, checkpointing)
        return F.normalize(features.float(), dim=-1)

    def features(self, cma: CrossModalAdapter, training: bool) -> Tensor:
        """Return normalized features [C, E] of all classes, fp32.

        Args:
            cma: the adapter.
            training: whether this is for a training step, which all processes make together.
        """
        processes = dist.get_world_size() if training and dist.is_available() and dist.is_initialized() else 1
        if processes > len(self.tokens.eot):
            processes = 1  # some would have nothing to encode
        rank = dist.get_rank() if processes > 1 else 0
        parts = []
        for _, seen, out in self._groups(rank, processes):
            if not training:
                parts.append(self._encode(cma, seen, out, False))
            elif self.chunk:
                parts.append(recompute(self._wrapped, cma, seen, out, False))
            else:
                parts.append(self._wrapped(cma, seen, out, self.checkpointing))
        features, (shares, position) = torch.cat(parts), self._order(processes)
        return features[position] if processes == 1 else GatherRows.apply(features, shares)
