"""Methods on frozen features as published: the yardstick of ours.

Written from the methods' formulas, over the features that our trainers have, and calling none of their code. Each
computes as its source does: a search computes all logits anew at each point of its grid, what a source lays out for
every pair is laid out, what it loops over in Python is looped over. All is fp32, as in the sources but for those that
take half precision on GPUs. Left out is what sources compute only to show it or to choose on test images: accuracies
of every epoch, the same search again on test images.

What our trainers do otherwise on purpose (docs/METHODS.md) is done so here, too, as results are to be equal: choices
are made on few-shot validation images, the last epoch counts, a class's start is not drawn at random.

`METHODS` has the computations by trainer. `LEFT_OUT` says why the other trainers on frozen features have none.
"""

from __future__ import annotations

from benchmarks.published.frozen.base import Published
from benchmarks.published.frozen.caches import APE, APET, TipAdapter, TipAdapterF, TipX
from benchmarks.published.frozen.closed import GDA, TIMO, LinearProbe, LPPlusPlus, ProKeR
from benchmarks.published.frozen.steps import (
    CLAP,
    FAR,
    RLA,
    AMUTuning,
    CLIPAdapter,
    CrossModalProbe,
    DeIL,
    JCLIPAdapter,
    ProLIP,
    TaskRes,
)
from benchmarks.published.frozen.transductive import EMDirichlet, StatA, TransCLIP

METHODS: dict[str, type[Published]] = {
    "TipAdapter": TipAdapter,
    "TipAdapterF": TipAdapterF,
    "TipX": TipX,
    "APE": APE,
    "APET": APET,
    "GDA": GDA,
    "TIMO": TIMO,
    "ProKeR": ProKeR,
    "LinearProbe": LinearProbe,
    "LPPlusPlus": LPPlusPlus,
    "CLIPAdapter": CLIPAdapter,
    "JCLIPAdapter": JCLIPAdapter,
    "TaskRes": TaskRes,
    "CLAP": CLAP,
    "CrossModalProbe": CrossModalProbe,
    "ProLIP": ProLIP,
    "RLA": RLA,
    "AMUTuning": AMUTuning,
    "FAR": FAR,
    "DeIL": DeIL,
    "TransCLIP": TransCLIP,
    "StatA": StatA,
    "EMDirichlet": EMDirichlet,
}

LEFT_OUT = {
    "DAC": "its code is not public, so that there is no computation as published",
    "TipAdapterPP": "it is TipAdapter on features that adapters correct",
    "TipXPP": "it is TipX on features that adapters correct",
    "ZeroshotCLIP": "one product of features and texts, in which nothing can be saved",
    "ZeroshotCLIP2": "as ZeroshotCLIP",
}
