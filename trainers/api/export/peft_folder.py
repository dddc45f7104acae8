"""Write CLIP-LoRA's updates as an adapter for Hugging Face's CLIPModel, and run what such a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...modules.peft_files import read_peft, write_peft
from .measures import Run
from .module import Exported
from .subject import Subject

# Backbones whose weights lie at Hugging Face as a CLIPModel.
BASES = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}


def write_peft_of(subject: Subject, folder: Path) -> None:
    """Write the folder, which is made."""
    trainer = subject.model.trainer
    learner, cfg = trainer.network.learner, trainer.cfg
    folder.mkdir()
    base = "" if cfg.MODEL.BACKBONE.WEIGHTS else BASES.get(cfg.MODEL.BACKBONE.NAME, "")
    write_peft(folder, learner.towers, trainer.settings.alpha, learner.dropout, base)


def run_peft(folder: Path, subject: Subject, module: Exported) -> Run:
    """Return what classifies images with a folder's updates, in the place of those that were trained."""
    learner = subject.model.trainer.network.learner

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        own = {name: value.clone() for name, value in learner.named_parameters()}
        try:
            for p in learner.parameters():
                p.zero_()
            learner.take(read_peft(folder, learner.towers))
            return module(images)
        finally:
            learner.load_state_dict({**learner.state_dict(), **own})

    return run
