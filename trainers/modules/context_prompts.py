"""Prompts in which the words around the class name are vectors that are learnt.

Legend: C classes, n context vectors, L tokens of the longest prompt, D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..clip.templates import clean_classname
from ..clip.text import TextState, TextTower, count_shared, count_tokens

POSITIONS = ("end", "middle", "front")


def word_vectors(text: TextTower, words: str) -> Tensor:
    """Return the token embeddings [n, D] of `words`, without start and end of text."""
    tokens = text.tokenise([words])
    return text.token_embedding(tokens.ids[0, 1 : int(tokens.eot[0])]).detach().float()


def _check_room(names: Sequence[str], n_ctx: int, context_length: int, rest: str) -> None:
    # A prompt that is cut loses its full stop, its name or its end, and another token would be read in its place.
    own = [count - 2 for count in count_tokens([rest.format(name) for name in names])]  # of name and full stop
    room = context_length - 2 - n_ctx
    if max(own) > room:
        longest = max(range(len(own)), key=own.__getitem__)
        beside = count_tokens([rest.format("")])[0] - 2
        words = "a full stop" if rest == "{}." else repr(rest)
        raise ValueError(
            f"Expected class names of at most {room - beside} tokens beside {n_ctx} context vectors and {words} (the "
            f"text encoder reads {context_length} tokens) but {sum(size > room for size in own)} are longer, such as "
            f"{_short(names[longest])} with {own[longest] - beside}: take fewer vectors, or call these classes shorter"
        )


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")


class ContextPrompts(nn.Module):
    """The fixed tokens of the prompts, and where the context vectors go.

    A prompt is "<start> v_1 ... v_n <class name> . <end>" with the class name at the end, in the middle (after the
    first n // 2 vectors) or in front; the tokens after <end> change nothing and are left out. With the name at the end,
    other words may stand in the place of "<class name> ." (`rest`), and words may stand between vectors and name
    ("v_1 v_2 of a <class name> .").

    Args:
        text: the text tower.
        classnames: class names in the order of their labels.
        n_ctx: n.
        words: text that stands in front of the name when prompts are tokenized; the vectors take the place of its first
            n tokens. "": n placeholders.
        position: where the class name is.
        rest: what follows the vectors, with {} for the class name.

    Raises:
        ValueError: a class name leaves no room for the vectors (the message says how long names may be), n leaves no
            room for any name, `words` have fewer than n tokens, or `position` is not one of POSITIONS (with further
            words: not "end").
    """

    prefix: Tensor  # [C, 1, D], embedding of the start of text
    suffix: Tensor  # [C, L - 1 - n, D], embeddings of class name, full stop and end of text
    eot: Tensor  # [C], position of the end of text
    order: Tensor  # [C, L], index in (prefix, context, suffix) of the token that stands at each place

    def __init__(
        self,
        text: TextTower,
        classnames: Sequence[str],
        n_ctx: int,
        words: str = "",
        position: str = "end",
        rest: str = "{}.",
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(
                f"Expected the class name's position to be one of {', '.join(POSITIONS)} but got {position!r}"
            )
        names = [clean_classname(name) for name in classnames]
        context = words or " ".join(["X"] * n_ctx)
        if n_ctx > text.context_length - 3:  # start, end and a token of the name
            raise ValueError(f"Expected at most {text.context_length - 3} context vectors but got {n_ctx}")
        self.further = count_tokens([words])[0] - 2 - n_ctx if words else 0  # tokens of the words behind the vectors
        if self.further < 0 or (self.further and position != "end"):
            raise ValueError(f"Expected words of at least {n_ctx} tokens, at the end if more, but got {words!r}")
        _check_room(names, n_ctx + self.further, text.context_length, rest)
        tokens = text.tokenise([f"{context} {rest.format(name)}" for name in names])
        length, device = tokens.ids.shape[1], tokens.ids.device
        embedded = text.token_embedding(tokens.ids).detach().to(text.dtype)  # [C, L, D]
        name_lengths = text.tokenise(names).eot - 1  # [C]
        before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]  # vectors before the name
        self.n_ctx, self.before = n_ctx, before
        rows = []
        for size in name_lengths.tolist():
            context_at, name_at = 1 + torch.arange(n_ctx), 1 + n_ctx + torch.arange(size)
            tail = torch.arange(1 + n_ctx + size, length)
            start = torch.zeros(1, dtype=torch.long)
            rows.append(torch.cat([start, context_at[:before], name_at, context_at[before:], tail])[:length])
        self.register_buffer("prefix", embedded[:, :1].contiguous(), persistent=False)
        self.register_buffer("suffix", embedded[:, 1 + n_ctx :].contiguous(), persistent=False)
        self.register_buffer("eot", tokens.eot, persistent=False)
        self.register_buffer("order", torch.stack(rows).to(device), persistent=False)

    def state(self, text: TextTower, context: Tensor) -> TextState:
        """Return what enters the first text block: the prompts, embedded, with these context vectors.

        Args:
            text: the text tower.
            context: one for all classes [n, D], or one for each [C, n, D].
        """
        context = context.to(self.prefix.dtype)
        # The leading tokens that all prompts have in common are computed once: with one context for all classes, the
        # start of text, the vectors before the name and further words.
        shared = 1 + (self.before + self.further if context.ndim == 2 else 0)
        shared = count_shared(shared, len(self.prefix), self.prefix.device)
        x = torch.cat([self.prefix, context.expand(len(self.prefix), -1, -1), self.suffix], dim=1)  # [C, L, D]
        if self.before < self.n_ctx:
            x = x.gather(1, self.order.unsqueeze(-1).expand_as(x))
        x = x + text.positional_embedding[: x.shape[1]].to(x.dtype)
        return TextState(x[:1, :shared], x[:, shared:], self.eot - shared, next_block=1)
