"""MMA, the multi-modal adapter: DLR-CLIP's cross-modal adapter alone, trained by cross-entropy.

Yang et al., MMA: Multi-Modal Adapter for Vision-Language Models, 2024. Unlike in DLR-CLIP the scale is fixed, and
gradients are scaled (see dlrclip/cma.py). What precedes the first adapted block is computed once for the prompts, and
without autograd for the images.

Legend: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import Classifier, EncoderTrainer, Learner, check_bool, check_number, check_whole, check_words
from .clip import CLIP, clean_classname
from .modules.cross_modal_adapter import CrossModalAdapter, build_adapter


class AdapterLearner(Learner):
    """The adapters of both encoders.

    Args:
        adapter: the cross-modal adapter.
        classnames: class names in the order of their labels.
        facts: what a checkpoint must agree on.
    """

    def __init__(self, adapter: CrossModalAdapter, classnames: Sequence[str], facts: dict[str, Any]) -> None:
        super().__init__(classnames, facts)
        self.cma = adapter


class MMAClassifier(Classifier):
    """CLIP with adapters in both encoders.

    Args:
        clip, classnames, templates: see Classifier.
        context: words before the class name in the adapted branch's prompt "<context> <class>."; "": none.
        start, end, dim, scale, grad_scaling: see `build_adapter`.
    """

    learner: AdapterLearner

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        templates: Sequence[str],
        *,
        context: str = "a photo of a",
        start: int = 5,
        end: int = 12,
        dim: int = 32,
        scale: float = 0.001,
        grad_scaling: bool = True,
    ) -> None:
        adapter = build_adapter(clip, start, end, dim, scale, learn_scale=False, grad_scaling=grad_scaling)
        context = context.replace("_", " ").strip()
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "context": context}
        super().__init__(clip, classnames, templates, AdapterLearner(adapter, classnames, facts))
        self._text_start, self._visual_start = min(int(i) for i in adapter.text), min(adapter.share)
        prompts = [f"{context} {clean_classname(name)}.".strip() for name in classnames]
        with torch.no_grad():
            self._text_state = clip.text.prefix(clip.text.tokenise(prompts), self._text_start - 1)

    def compute_text(self) -> Tensor:
        """Text features [C, E], normalised, fp32."""
        features = self.clip.text.suffix(self._text_state, self._text_start, self.learner.cma.adapt_text)
        return F.normalize(features.float(), dim=-1)

    def _prefix(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.clip.visual.prefix(images, self._visual_start - 1)

    def _adapted(self, hidden: Tensor) -> Tensor:
        visual, cma = self.clip.visual, self.learner.cma
        adapt = cma.adapt_tokens if visual.kind == "vit" else cma.adapt_map
        return self.logits(visual.suffix(hidden, self._visual_start, adapt), self.text_features())

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, C]."""
        return self._adapted(self._prefix(images))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> zero-shot logits and those of the adapted encoders."""
        hidden = self._prefix(images)
        plain = self.clip.visual.suffix(hidden, self._visual_start)
        return self.logits(plain, self.zeroshot), self._adapted(hidden)


@TRAINER_REGISTRY.register()
class MMA(EncoderTrainer):
    """Multi-modal adapter."""

    recipe = 2
    node_name = "MMADAPTER"
    model_name = "adapter_learner"  # as published
    main_head = "mma"

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.MMADAPTER to `cfg` unless it is there.

        The defaults are those of the source's train.py, so that its own YAML files mean here what they mean there. Its
        experiments set other values in these files: ADAPTER_START 5, ADAPTER_SCALE 0.001 (configs/trainers/mma).
        """
        if "MMADAPTER" in cfg.TRAINER:
            return
        node = type(cfg)()
        node.TEXT_CTX_INIT = ""  # words before the class name in the prompt of the adapted branch
        node.PREC = "amp"  # precision of the frozen CLIP: fp32 | fp16 | amp | bf16; the adapters are in fp32
        node.ADAPTER_START = 4  # first adapted block, counted from 1
        node.ADAPTER_END = 12  # last adapted block, at least ADAPTER_START; clipped to each encoder's depth
        node.ADAPTER_DIM = 32  # bottleneck width, at least 1
        node.ADAPTER_SCALE = 0.1  # factor of what an adapter adds, above 0; not learnt
        # Adapters' weights get 1 / ADAPTER_SCALE times their gradient, as in the source; False: their own gradient.
        node.GRAD_SCALING = True
        cfg.TRAINER.MMADAPTER = node

    def check_node(self, cfg: Any) -> None:
        """Checks TRAINER.MMADAPTER."""
        check_words(cfg, "TRAINER.MMADAPTER.TEXT_CTX_INIT")
        for key in ("ADAPTER_START", "ADAPTER_DIM"):
            check_whole(cfg, f"TRAINER.MMADAPTER.{key}")
        check_whole(cfg, "TRAINER.MMADAPTER.ADAPTER_END", cfg.TRAINER.MMADAPTER.ADAPTER_START)
        check_number(cfg, "TRAINER.MMADAPTER.ADAPTER_SCALE", 0, 1e6, open_low=True)
        check_bool(cfg, "TRAINER.MMADAPTER.GRAD_SCALING")

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> MMAClassifier:
        """CLIP with adapters."""
        node = self.cfg.TRAINER.MMADAPTER
        return MMAClassifier(
            clip,
            classnames,
            templates,
            context=node.TEXT_CTX_INIT,
            start=node.ADAPTER_START,
            end=node.ADAPTER_END,
            dim=node.ADAPTER_DIM,
            scale=node.ADAPTER_SCALE,
            grad_scaling=node.GRAD_SCALING,
        )
