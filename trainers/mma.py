"""MMA, the multi-modal adapter: DLR-CLIP's cross-modal adapter alone, trained by cross-entropy.

Yang et al., MMA: Multi-Modal Adapter for Vision-Language Models, 2024. Unlike in DLR-CLIP the scale is fixed, and
gradients are scaled (see modules/cross_modal_adapter.py). What precedes the first adapted block is computed once for
the prompts, and without autograd for the images.

Legend: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import Classifier, EncoderTrainer, Learner, MethodConfig, key, precision
from .base.keys import check_number
from .clip import CLIP, clean_classname
from .features import FrozenPart
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
        settings: see MMAConfig.
    """

    learner: AdapterLearner

    def __init__(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], settings: MMAConfig) -> None:
        adapter = build_adapter(
            clip,
            settings.adapter_start,
            settings.adapter_end,
            settings.adapter_dim,
            settings.adapter_scale,
            learn_scale=False,
            grad_scaling=settings.grad_scaling,
        )
        context = settings.text_ctx_init.replace("_", " ").strip()
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "context": context}
        super().__init__(clip, classnames, templates, AdapterLearner(adapter, classnames, facts))
        self._text_start, self.first_adapted = adapter.text_edit.first_block, adapter.visual_edit.first_block
        prompts = [f"{context} {clean_classname(name)}.".strip() for name in classnames]
        with torch.no_grad():
            self._text_state = clip.text.prefix(clip.text.tokenise(prompts), self._text_start - 1)

    def compute_text(self) -> Tensor:
        """Return the adapted encoder's text features [C, E], normalized, fp32."""
        features = self.clip.text.suffix(self._text_state, self._text_start, [self.learner.cma.text_edit])
        return F.normalize(features.float(), dim=-1)

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for what enters the first adapted block."""
        assert part.hidden is not None and self.first_adapted is not None
        features = self.clip.visual.suffix(part.hidden, self.first_adapted, [self.learner.cma.visual_edit])
        return self.logits(features, self.text_features())


@dataclass(frozen=True)
class MMAConfig(MethodConfig):
    """Settings of MMA.

    The defaults are those of the source's train.py, so that the source's YAML files mean here what they mean there. Its
    experiments set other values in these files: ADAPTER_START 5, ADAPTER_SCALE 0.001 (configs/trainers/mma).
    """

    text_ctx_init: str = key("", "words before the class name in the prompt of the adapted branch", words=True)
    prec: str = precision("amp", "the adapters are in fp32")
    adapter_start: int = key(4, "first adapted block, counted from 1", low=1)
    adapter_end: int = key(12, "last adapted block, at least ADAPTER_START; clipped to each encoder's depth", low=1)
    adapter_dim: int = key(32, "bottleneck width", low=1)
    adapter_scale: float = key(0.1, "factor of what an adapter adds; not learnt", above=0)
    grad_scaling: bool = key(True, "adapters' weights get 1 / ADAPTER_SCALE times their gradient, as in the source")

    def check(self, path: str) -> None:
        """Check that the last adapted block does not come before the first; see MethodConfig."""
        check_number(self.adapter_end, f"{path}.ADAPTER_END", low=self.adapter_start)


@TRAINER_REGISTRY.register()
class MMA(EncoderTrainer):
    """Multi-modal adapter."""

    recipe = 2
    node_name = "MMADAPTER"
    paper = "Yang et al. 2024"
    learns = "adapters shared by both encoders"
    config = MMAConfig
    model_name = "adapter_learner"  # as published
    main_head = "mma"

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> MMAClassifier:
        """Build CLIP with adapters in both encoders."""
        return MMAClassifier(clip, classnames, templates, self.settings)
