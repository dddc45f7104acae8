"""CLIP-LoRA's updates in PEFT's format, against the package itself on a small random CLIPModel."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from trainers.api.export.forms import merge_low_rank
from trainers.clip.hugging_face import as_open_clip
from trainers.clip.model import CLIP
from trainers.cliplora import CLIPLoRA, CLIPLoRAConfig, LoRAClassifier, LoRALearner
from trainers.modules.peft_files import read_peft, write_peft

peft = pytest.importorskip("peft", reason="pip install peft")
transformers = pytest.importorskip("transformers", reason="pip install transformers")

NAMES, TEMPLATE = ["river", "sea lake", "forest"], "a photo of a {}."
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
VISION = {**TEXT, "hidden_size": 48, "intermediate_size": 192, "image_size": 32, "patch_size": 8}
ARCH = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"layers": 3, "width": 48, "head_width": 24, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture
def model():
    """A CLIPModel whose tensors have no symmetry."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    config.text_config.projection_dim = config.vision_config.projection_dim = 24
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.logit_scale.fill_(4.6052)
    return model


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ours(model):
    """Our classifier around the same weights."""
    state = {name: value.clone() for name, value in as_open_clip(model.state_dict()).items()}

    def build(rank=2, alpha=1.0, dropout=0.25):
        twin = open_clip.CLIP(**ARCH)
        twin.load_state_dict(state, strict=False)
        clip = CLIP(twin, name="small")
        learner = LoRALearner(clip, NAMES, CLIPLoRAConfig(rank=rank, alpha=alpha, dropout=dropout))
        torch.manual_seed(3)
        with torch.no_grad():
            for p in learner.parameters():
                p.copy_(0.3 * torch.randn(p.shape))
        return LoRAClassifier(clip, NAMES, [TEMPLATE], learner).eval()

    return build


@torch.no_grad()
def logits_of(model, images):
    """Cosines of a CLIPModel, perhaps within PEFT's."""
    ids = open_clip.tokenize([TEMPLATE.format(name) for name in NAMES])
    image = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
    hidden = model.text_model(input_ids=ids).last_hidden_state
    text = model.text_projection(hidden[torch.arange(len(ids)), ids.argmax(dim=1)])
    return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).t()


@torch.no_grad()
def cosines(classifier, images):
    return classifier.both(images)[1] / classifier.clip.logit_scale


def scattered(model, **arguments):
    """An adapter that PEFT makes, with random matrices."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], **arguments})
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape))
    return adapted


@pytest.mark.parametrize(("rank", "alpha"), [(2, 1.0), (3, 0.7)])
def test_peft_gives_our_logits(model, ours, images, tmp_path, rank, alpha):
    classifier = ours(rank, alpha)
    plain = logits_of(model, images)
    write_peft(tmp_path, classifier.learner.towers, alpha, 0.25, "")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    want = cosines(classifier, images)
    assert float((logits_of(adapted, images) - want).abs().max()) < 1e-5 < float((plain - want).abs().max())
    assert adapted.peft_config["default"].lora_dropout == 0.25
    learner = ours(rank, alpha).learner
    for p in learner.parameters():
        p.data.zero_()
    learner.take(read_peft(tmp_path, learner.towers))
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters(), classifier.learner.parameters(), strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"lora_alpha": 3},
        {"lora_alpha": 1, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "lora_dropout": 0.1},
        {"target_modules": r"vision_model\..*\.k_proj", "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_adapters_of_peft_are_read(model, ours, images, tmp_path, arguments):
    adapted = scattered(model, **arguments)
    adapted.save_pretrained(tmp_path)
    classifier = ours()
    trainer = CLIPLoRA.__new__(CLIPLoRA)
    trainer.network = classifier
    trainer.load_model(tmp_path)
    np.testing.assert_allclose(cosines(classifier, images), logits_of(adapted, images), atol=1e-5)


def test_merged_weights_are_those_that_peft_merges(model, ours, tmp_path):
    classifier = ours()
    write_peft(tmp_path, classifier.learner.towers, 1.0, 0.0, "")
    state = {name: value.clone() for name, value in as_open_clip(model.state_dict()).items()}

    class Trainer:
        network = classifier

    merge_low_rank(Trainer, state)
    merged = as_open_clip(peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload().state_dict())
    assert state.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(state[name].detach(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"use_dora": True}, "no use_dora, but got use_dora True"),
        ({"target_modules": ["q_proj", "out_proj"]}, r"alone but got .*out_proj\.lora_A"),
        ({"target_modules": ["fc1"]}, r"alone but got .*fc1\.lora_A"),
        ({"rank_pattern": {"q_proj": 4}}, "no rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "no alpha_pattern"),
        ({"bias": "lora_only"}, "no bias, but got bias 'lora_only'"),
        ({"modules_to_save": ["visual_projection"]}, "no modules_to_save"),
        ({"init_lora_weights": "pissa"}, "no init_lora_weights"),
        ({"r": 4}, "TRAINER.CLIPLORA.RANK to be 4, as in .*, but got 2"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused(model, ours, tmp_path, arguments, told):
    scattered(model, **arguments).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        read_peft(tmp_path, ours().learner.towers)


def test_broken_folders(ours, tmp_path):
    classifier = ours()
    towers, file = classifier.learner.towers, tmp_path / "adapter_model.safetensors"
    with pytest.raises(FileNotFoundError, match="to hold adapter_config.json but it does not"):
        read_peft(tmp_path, towers)
    write_peft(tmp_path, towers, 1.0, 0.0, "")
    # Copies: older versions of safetensors map the file, which is written anew below.
    state = {name: value.clone() for name, value in load_file(file).items()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def check(told, error=ValueError, state=state, **changes):
        save_file(state, file)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=told):
            read_peft(tmp_path, towers)

    check("PEFT's type LORA but got 'IA3'", peft_type="IA3")
    check("r to be a number above 0 but got 0", r=0)
    check("lora_alpha to be a number above 0 but got 'x'", lora_alpha="x")
    check("no some_new_key", some_new_key=1)
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    check("it has one of them", state={n: value for n, value in state.items() if n != name})
    check(r"to have shape \(2, 32\) but got \(2, 8\)", state={**state, name: torch.zeros(2, 8)})
    deeper = name.replace("layers.0", "layers.7")
    check("alone but got .*layers.7", state={**state, deeper: torch.zeros(2, 32)})
    file.write_bytes(b"no file")
    with pytest.raises(ValueError, match="to be a safetensors file"):
        read_peft(tmp_path, towers)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="to hold adapter_model.safetensors"):
        read_peft(tmp_path, towers)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="to be JSON"):
        read_peft(tmp_path, towers)
