"""Training steps of methods beside DLR-CLIP as published: the oracle and the yardstick of ours.

Written from the methods' formulas over the parameters of our networks, and calling none of their code:
* every class's prompt goes through the whole text encoder at the full context length (77 tokens), in every step;
* every image goes through the whole image encoder, also where nothing in it is learnt, and a second time where the
  method compares with the frozen CLIP;
* every block computes every token.
What depends on the class list and the frozen CLIP alone (zero-shot classifiers) is encoded once per run, here too.
Attention is the fused kernel, and frozen parts have no graph, in both.

`METHODS` has the rows of the comparison by name: a trainer, or a stage or an option of one. `LEFT_OUT` says why the
other trainers that learn within the encoders are not compared.
"""

from __future__ import annotations

from benchmarks.published.encoders import Published
from benchmarks.published.prompts import TCP, CoCoOp, CoOp, CoOpDePT, KgCoOp, ProGrad
from benchmarks.published.tokens import IVLP, MMRL, MMRLPP, VPT, CoPrompt, MaPLe, PromptSRC
from benchmarks.published.weights import MMA, CLIPLoRA, FirstStage, SecondStage

METHODS: dict[str, type[Published]] = {
    "CoOp": CoOp,
    "CoOp+DePT": CoOpDePT,
    "CoCoOp": CoCoOp,
    "KgCoOp": KgCoOp,
    "ProGrad": ProGrad,
    "TCP": TCP,
    "VPT": VPT,
    "IVLP": IVLP,
    "MaPLe": MaPLe,
    "PromptSRC": PromptSRC,
    "CoPrompt": CoPrompt,
    "MMRL": MMRL,
    "MMRLPP": MMRLPP,
    "MMA": MMA,
    "CLIPLoRA": CLIPLoRA,
    "TwoStageFS-1": FirstStage,
    "TwoStageFS-2": SecondStage,
}

LEFT_OUT = {
    "DLRCLIP": "it has a benchmark of its own, bench_step.py",
    "IMO": "it encodes no text, and adapts every block of the image tower: hardly anything can be left out",
    "IMODINO": "as IMO",
}


def trainer_of(name: str) -> str:
    """Return the registered name of the trainer that a row belongs to; what is no row is a trainer's name itself."""
    return (METHODS[name].trainer if name in METHODS else "") or name
