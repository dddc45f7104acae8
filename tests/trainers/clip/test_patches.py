"""Mean patches of two blocks beside CLIP's features, against hooks on open_clip's own blocks."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from trainers.clip import CLIP
from trainers.features import ImageEncoder, PatchEncoder, PatchReader, features_and_patches, read_blocks


def blocks_of(model, kind):
    """open_clip's own blocks, in order."""
    visual = model.visual
    if kind == "vit":
        return list(visual.transformer.resblocks)
    return [block for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4) for block in stage]


def naive(model, kind, images, numbers):
    """The mean over patches, one after the other, of what leaves open_clip's blocks, side by side."""
    outs = {}
    for number, block in enumerate(blocks_of(model, kind), start=1):
        block.register_forward_hook(lambda module, args, out, number=number: outs.update({number: out}))
    model.encode_image(images)
    rows = []
    for i in range(len(images)):
        parts = []
        for number in numbers:
            out = outs[number][i]
            patches = (
                list(out[1:])
                if kind == "vit"
                else [out[:, y, x] for y in range(len(out[0])) for x in range(len(out[0, 0]))]
            )
            parts.append(sum(patches) / len(patches))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@torch.no_grad()
def test_patches_lie_beside_the_very_features(build_model, images, kind):
    model = build_model(kind)
    clip = CLIP(model)
    encoder = PatchEncoder(clip, "fp32", contextlib.nullcontext)
    assert encoder.blocks == read_blocks(clip.visual) and encoder.blocks[-1] == clip.visual.depth
    got = encoder(images)
    assert got.shape == (len(images), encoder.width) and got.dtype == torch.float32
    plain = ImageEncoder(clip, "fp32", contextlib.nullcontext)
    assert torch.equal(got[:, : clip.embed_dim], plain(images))
    want = naive(model, kind, images, encoder.blocks)
    torch.testing.assert_close(got[:, clip.embed_dim :], want, atol=1e-5, rtol=1e-4)
    assert encoder.weights_digest != plain.weights_digest


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@torch.no_grad()
def test_blocks_may_be_run_in_two_parts(build_model, images, kind):
    visual = CLIP(build_model(kind)).visual
    numbers = range(1, visual.depth + 1)
    whole = PatchReader(visual, numbers)
    want = features_and_patches(visual, visual.prefix(images, 0), 1, whole)
    for start in numbers:
        reader = PatchReader(visual, numbers)
        got = features_and_patches(visual, visual.prefix(images, start - 1, [reader]), start, reader)
        assert torch.equal(got, want)


@pytest.mark.parametrize(("depth", "expected"), [(1, (1,)), (2, (1, 2)), (6, (4, 6)), (12, (8, 12)), (24, (16, 24))])
def test_the_blocks_are_at_two_thirds_and_last(depth, expected):
    assert read_blocks(SimpleNamespace(depth=depth)) == expected


def test_wrong_blocks(build_model, images):
    visual = CLIP(build_model("vit")).visual
    hidden = visual.prefix(images, 0)
    with pytest.raises(ValueError, match=r"start to be in 1\.\.5 but got 0"):
        visual.through(hidden, 0, 1)
    for stop in (0, 5):
        with pytest.raises(ValueError, match=rf"stop to be in 1\.\.4 but got {stop}"):
            visual.through(hidden, 2, stop)
