"""Backbone, optional head, linear classifier: the model of trainers that do not bring their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dassl.modeling import build_backbone, build_head


class SimpleNet(nn.Module):
    """A registered backbone, a head when one is configured, and a linear classifier when there are classes.

    Args:
        cfg: the whole config (``VERBOSE``).
        model_cfg: ``cfg.MODEL``.
        num_classes: C; 0: features only.
    """

    def __init__(self, cfg: Any, model_cfg: Any, num_classes: int, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = build_backbone(
            model_cfg.BACKBONE.NAME, verbose=cfg.VERBOSE, pretrained=model_cfg.BACKBONE.PRETRAINED, **kwargs
        )
        width = self.backbone.out_features
        self.head: Any = None
        if model_cfg.HEAD.NAME and model_cfg.HEAD.HIDDEN_LAYERS:
            self.head = build_head(
                model_cfg.HEAD.NAME,
                verbose=cfg.VERBOSE,
                in_features=width,
                hidden_layers=model_cfg.HEAD.HIDDEN_LAYERS,
                activation=model_cfg.HEAD.ACTIVATION,
                bn=model_cfg.HEAD.BN,
                dropout=model_cfg.HEAD.DROPOUT,
                **kwargs,
            )
            width = self.head.out_features
        self.classifier = nn.Linear(width, num_classes) if num_classes > 0 else None
        self._fdim = width

    @property
    def fdim(self) -> int:
        """Width of the features that go into the classifier."""
        return self._fdim

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        """Return logits [B, C] for images [B, 3, H, W].

        Without a classifier the result is the features [B, fdim]. With one, ``return_feature`` asks for the pair
        (logits, features).
        """
        features = self.backbone(x)
        if self.head is not None:
            features = self.head(features)
        if self.classifier is None:
            return features
        logits = self.classifier(features)
        return (logits, features) if return_feature else logits
