"""Checkpoints in every form, at the size of the real models, and everything that can be wrong with them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from trainers.clip import CLIP, check_backbone, load_clip
from trainers.clip.checkpoint import checkpoint_form, read_checkpoint

PROMPTS = ["a photo of a cat.", "a photo of a hot air balloon.", "a photo of an ox."]


def openai_state(name: str) -> dict[str, Tensor]:
    """Random state dict as OpenAI's archives have it: fp16 matrices, fp32 norms and embeddings, three extra numbers."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name + "-quickgelu"))
        open_clip.convert_weights_to_lp(model, torch.float16)
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            state[key] = torch.tensor(0)
        elif key.endswith("running_var") or ((".bn" in key or "ln_" in key) and key.endswith("weight")):
            state[key] = 0.5 + 0.5 * torch.rand(value.shape, generator=generator)
        elif value.ndim < 2:
            state[key] = 0.1 * torch.randn(value.shape, generator=generator)
        else:
            std = (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else value.shape[-1] ** -0.5
            state[key] = torch.empty(value.shape).normal_(std=std, generator=generator)
        state[key] = state[key].to(value.dtype)
    state["logit_scale"] = torch.tensor(2.0)
    return {**state, "input_resolution": torch.tensor(224), "context_length": torch.tensor(77),
            "vocab_size": torch.tensor(49408)}  # fmt: skip


@pytest.fixture(scope="module", params=["ViT-B-16", "RN50"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CLIP, open_clip.CLIP]]:
    """Our CLIP and open_clip's, of the same random file in OpenAI's format."""
    state = openai_state(request.param)
    path = tmp_path_factory.mktemp("openai") / "weights.pt"
    torch.save(state, path)
    name = request.param.replace("ViT-B-16", "ViT-B/16")
    check_backbone(name, path)
    clip = load_clip(name, weights=path)
    path.unlink()
    yield clip, build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float()


def test_logits_of_an_openai_checkpoint_equal_open_clip(pair):
    clip, model = pair
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, _ = model.get_logits(images, open_clip.tokenize(PROMPTS))
        image = F.normalize(clip.encode_image(images), dim=-1)
        logits = clip.logit_scale * image @ F.normalize(clip.encode_text(PROMPTS), dim=-1).T
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01  # a test of anything but a constant


def test_text_savings_change_nothing_at_full_size(pair, oracle):
    """Cut at the longest prompt and shared prefix, with adapters, against all 77 positions of every prompt."""
    clip, model = pair
    adapters = oracle.Adapters(clip.text.widths, tuple(range(5, 13)))
    with torch.no_grad():
        ours = clip.text.suffix(clip.text.prefix(clip.text.tokenise(PROMPTS), 4), 5, [adapters])
        expected = oracle.naive_text(model, PROMPTS, adapters)
    torch.testing.assert_close(F.normalize(ours, dim=-1), F.normalize(expected, dim=-1), atol=1e-5, rtol=0)


def test_sizes_of_the_real_models(pair):
    clip, _ = pair
    assert clip.image_size == 224 and clip.text.depth == 12 and clip.text.width == 512
    if clip.visual.kind == "vit":
        assert (clip.embed_dim, clip.visual.depth, clip.visual.widths[12]) == (512, 12, 768)
    else:
        assert (clip.embed_dim, clip.visual.depth, clip.visual.adaptable) == (1024, 16, tuple(range(8, 17)))
        assert clip.visual.widths[16] == 2048


# The remaining forms on a small model: "tiny" reads its architecture from a file, so any form will do for its reader.


@pytest.fixture
def state(build_model) -> dict[str, Tensor]:
    return build_model("vit").state_dict()


@pytest.mark.parametrize("form", ["bare", "wrapped", "data parallel", "text module", "legacy pickle", "safetensors"])
def test_forms(tmp_path, state, form):
    path = tmp_path / "weights.pt"
    saved = dict(state)
    if form == "wrapped":
        torch.save({"epoch": 3, "name": "x", "state_dict": saved, "optimizer": {"state": {}}}, path)
    elif form == "data parallel":
        torch.save({"state_dict": {"module." + key: value for key, value in saved.items()}}, path)
    elif form == "text module":
        top = ("visual.", "logit_scale")
        torch.save({key if key.startswith(top) else "text." + key: value for key, value in saved.items()}, path)
    elif form == "legacy pickle":
        torch.save(saved, path, _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        save_file(saved, path)
    else:
        saved["logit_scale"] = saved["logit_scale"].reshape(1)
        torch.save({**saved, "attn_mask": torch.zeros(77, 77), "vocab_size": torch.tensor(49408)}, path)
    read = read_checkpoint(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.skipif(not hasattr(torch.jit, "script"), reason="this torch writes no TorchScript archives")
@pytest.mark.filterwarnings("ignore")
def test_torchscript_archive(tmp_path):
    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(3, 2)
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    part = Part()
    torch.jit.save(torch.jit.script(part), tmp_path / "archive.pt")
    assert checkpoint_form(tmp_path / "archive.pt") == "torchscript"
    read = read_checkpoint(tmp_path / "archive.pt")
    assert read.keys() == {"proj.weight", "proj.bias"}
    assert torch.equal(read["proj.weight"], part.proj.weight)


class Payload:
    """What a hostile checkpoint does: a call while unpickling."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_is_more_than_tensors_is_refused_unread(tmp_path, zipped):
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    torch.save({"state_dict": {"x": torch.ones(1)}, "y": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="nothing but tensors") as caught:
        load_clip("ViT-B/16", weights=path)
    assert not marker.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "hold a state dict but got dict"),
        ([torch.ones(1)], "hold a state dict but got list"),
        ({"a": torch.ones(1), "b": 3}, "'b' is not"),
    ],
)
def test_other_content(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_clip("RN50", weights=tmp_path / "other.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_checkpoints(tmp_path, state):
    path = tmp_path / "weights.pt"
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="but got neither"):
            check_backbone("ViT-B/16", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="but got neither"):
        check_backbone("ViT-B/16", path)
    with pytest.raises(FileNotFoundError, match="but there is none"):
        check_backbone("ViT-B/16", tmp_path / "absent.pt")
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    check_backbone("ViT-B/16", path)  # looks like safetensors: only reading tells
    with pytest.raises(ValueError, match="readable safetensors file"):
        load_clip("ViT-B/16", weights=path)
    path.write_bytes(pickle.dumps({"x": 1})[:-4])
    with pytest.raises(ValueError, match="Expected"):
        load_clip("ViT-B/16", weights=path)


def test_weights_of_another_architecture(tmp_path, state):
    state.pop("ln_final.bias")
    state["surprise"] = torch.ones(1)
    torch.save(state, tmp_path / "small.pt")
    with pytest.raises(ValueError) as caught:
        load_clip("ViT-B/32", weights=tmp_path / "small.pt")
    message = str(caught.value)
    assert "weights of ViT-B/32" in message and "unknown (surprise)" in message and "missing" in message
    assert "visual.class_embedding (64,) instead of (768,)" in message


def test_wrong_precision_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="one of fp32, fp16, amp, bf16 but got 'int8'"):
        load_clip("ViT-B/32", weights=tmp_path / "absent.pt", precision="int8")
