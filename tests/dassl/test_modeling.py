"""SimpleNet from registered parts, and the default build_model around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dassl.config import get_cfg_default
from dassl.engine import SimpleNet
from dassl.modeling import (
    BACKBONE_REGISTRY,
    NETWORK_REGISTRY,
    Backbone,
    build_backbone,
    build_head,
    build_network,
)
from dassl.utils import InputError


class MeanColor(Backbone):
    def __init__(self, pretrained=True):
        super().__init__()
        self._out_features = 3

    def forward(self, x):
        return x.mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "MeanColor", MeanColor)


def make_cfg(*pairs):
    cfg = get_cfg_default()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "MeanColor", *pairs])
    return cfg


def test_shapes():
    images = torch.randn(4, 3, 8, 8)
    cfg = make_cfg("MODEL.HEAD.NAME", "mlp", "MODEL.HEAD.HIDDEN_LAYERS", (6, 5), "MODEL.HEAD.DROPOUT", 0.1)
    net = SimpleNet(cfg, cfg.MODEL, 10)
    logits, features = net(images, return_feature=True)
    assert logits.shape == (4, 10) and features.shape == (4, net.fdim) == (4, 5)
    kinds = [type(layer).__name__ for layer in net.head.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2
    bare = SimpleNet(cfg := make_cfg(), cfg.MODEL, 0)
    assert bare(images).shape == (4, 3) and bare.classifier is None


def test_wrong_names_and_values():
    with pytest.raises(KeyError, match="MeanColour"):
        build_backbone("MeanColour")
    with pytest.raises(KeyError, match="HEAD"):
        build_head("mpl")
    with pytest.raises(InputError, match="HIDDEN_LAYERS"):
        build_head("mlp", in_features=3, hidden_layers=())
    with pytest.raises(InputError, match='got "tanh"'):
        build_head("mlp", in_features=3, hidden_layers=4, activation="tanh")


def test_networks(monkeypatch):
    monkeypatch.setitem(NETWORK_REGISTRY._obj_map, "linear", nn.Linear)
    assert build_network("linear", in_features=2, out_features=1).weight.shape == (1, 2)
