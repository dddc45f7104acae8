"""The part "evaluation": an evaluation pass as published and accelerated; see bench_eval.py."""

from __future__ import annotations

import argparse

import torch

from benchmarks import bench_eval
from benchmarks.gpu.session import Session


def evaluation(session: Session) -> None:
    """Rows: the results of bench_eval.py in bf16 at each number of classes."""
    images = session.sizes.images
    for classes in session.sizes.classes:
        given = {"model": session.model, "prompt_tokens": 13, "threads": torch.get_num_threads(), "seed": 0}
        given |= {"device": session.device.type, "precision": "bf16", "classes": classes, "images": images}
        found = bench_eval.run(argparse.Namespace(**given, batch=min(100, images), json=None))
        row = {key: found[key] for key in ("images_per_second", "logit_diff", "flop_ratio", "floor_ratios", "flops")}
        rates = {key: found[key] for key in ("ratio", "ratio_features", "ratio_hidden")}
        session.add(what="evaluation", mode="bf16", classes=classes, images=images, **rates, **row)
