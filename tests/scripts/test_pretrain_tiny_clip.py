"""The pretraining world and the script, run for a few steps as a user would run it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scripts.dev.pretrain_tiny_clip import main
from scripts.dev.tiny_world import OBJECTS, SWAPPED, caption_batch, render_pool, true_pairs
from trainers.clip import load_clip


def test_pool_does_not_depend_on_the_number_of_workers() -> None:
    one, two = render_pool(40, seed=3, workers=1), render_pool(40, seed=3, workers=2)
    assert len(one) == 40 and one.images.shape == (40, 64, 64, 3) and one.foreground.shape == (40, 8, 8)
    assert np.array_equal(one.images, two.images) and np.array_equal(one.object, two.object)
    assert not np.array_equal(one.images, render_pool(40, seed=4, workers=1).images)


def test_captions_say_what_the_annotator_sees() -> None:
    pool, rng = render_pool(300, seed=5, workers=1), np.random.default_rng(0)
    index = np.arange(300)
    captions, seen = caption_batch(pool, index, rng, mixup=0.0, mixed_up=SWAPPED)
    assert np.array_equal(seen[:, 0], pool.object)
    pairs = true_pairs(captions.mentioned, seen)
    assert pairs.diagonal().all() and 0.003 < pairs.mean() < 0.2
    for i, j in np.argwhere(pairs)[:50]:
        said = captions.mentioned[j]
        truth = np.array([pool.object[i], pool.color[i], pool.background[i], pool.texture[i]])
        assert ((said < 0) | (said == truth)).all()
    _, always = caption_batch(pool, index, rng, mixup=1.0, mixed_up=SWAPPED)
    for i in index:
        name = OBJECTS[pool.object[i]]
        assert OBJECTS[always[i, 0]] == SWAPPED.get(name, name)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="pretraining needs torch >= 2.9")
def test_the_script_writes_a_checkpoint_that_loads(tmp_path) -> None:
    threads = str(torch.get_num_threads())
    command = ["--steps", "1", "--pool", "32", "--batch", "16", "--watched", "17", "--threads", threads]
    states = []
    for stage in ("joint", "text"):
        with torch.random.fork_rng():
            assert main([*command, "--stage", stage, "--output", str(tmp_path)]) == 0
        states.append(load_file(tmp_path / "tiny_clip.safetensors"))
    for name, value in states[0].items():
        if name.startswith("visual."):
            assert torch.equal(value, states[1][name]), name  # the text stage leaves the image encoder alone
    assert not torch.equal(states[0]["text_projection"], states[1]["text_projection"])
    stages = json.loads((tmp_path / "tiny_clip.json").read_text())["record"]["stages"]
    assert [stage["stage"] for stage in stages] == ["joint", "text"]
    assert all(s["pairs"] == 16 and set(s["watched_accuracy"]) >= {"digits", "shapes_probe16"} for s in stages)
    clip = load_clip("tiny", weights=str(tmp_path))
    assert clip.image_size == 64 and clip.encode_text(["a photo of a circle."]).shape == (1, clip.embed_dim)
