"""The base class of backbones."""

from __future__ import annotations

from torch import nn


class Backbone(nn.Module):
    """Base of a backbone: ``forward`` gives features [B, out_features]; a subclass sets ``_out_features``."""

    _out_features: int

    @property
    def out_features(self) -> int:
        """Width of the features."""
        return self._out_features
