"""Small random CLIPs of open_clip's other kinds: encoders of timm and Hugging Face, CoCa, other pooling."""

import contextlib
import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

WORDS = ["a", "photo", "of", "the", "number", "digit", "zero", "one", "two", "three", "red", "green", "blue", "circle"]
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
CLIPS_TEXT = {**TEXT, "vocab_size": 49408}
TIMM = {"timm_model_pretrained": False}
VIT = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
SIGLIP_TEXT = {
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-06},
}
# Name -> open_clip's configuration; "words" stands for a tokenizer, "roberta" and such for a model of that kind.
KINDS = {
    "small-siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_pool": "map",
            "timm_proj": "none",
            **TIMM,
        },
        "text_cfg": {**TEXT, **SIGLIP_TEXT, "hf_tokenizer_name": "words"},
    },
    "small-eva": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "eva02_tiny_patch14_224",
            "timm_pool": "token",
            "timm_proj": None,
            **TIMM,
        },
        "text_cfg": CLIPS_TEXT,
    },
    "small-convnext": {  # its text encoder is a plain CLIP's
        "embed_dim": 32,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", **TIMM},
        "text_cfg": CLIPS_TEXT,
    },
    "small-clipa": {
        "embed_dim": 32,
        "vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "hf_tokenizer_name": "words", "pool_type": "last", "no_causal_mask": True},
    },
    "small-coca": {
        "embed_dim": 32,
        "custom_text": True,
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**CLIPS_TEXT, "embed_cls": True, "output_tokens": True},
    },
    **{
        f"small-{kind}": {
            "embed_dim": 32,
            "quick_gelu": True,
            "vision_cfg": VIT,
            "text_cfg": {"hf_model_name": kind, "hf_tokenizer_name": "words", "hf_proj_type": "mlp", **length},
        }
        for kind, length in (
            ("roberta", {"context_length": 16}),
            ("mt5", {"context_length": 16}),
            ("m2m_100", {"context_length": 16, "hf_pooler_type": "cls_pooler"}),  # NLLB's
        )
    },
}


def write_tokenizer(folder: Path) -> str:
    """A tokenizer of whole words whose texts end as SigLIP's do, with the token that also fills."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<unk>": 0, "</s>": 1, **{word: number for number, word in enumerate(WORDS, 2)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    marks = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return str(folder)


def write_text_model(folder: Path, kind: str) -> str:
    """The architecture of a small text model of Hugging Face."""
    sizes = {
        "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "mt5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "is_encoder_decoder": True},
        "m2m_100": {
            **{"d_model": 32, "is_encoder_decoder": True},
            **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
            **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
        },
    }[kind]
    told = {"model_type": kind, "vocab_size": 64, "max_position_embeddings": 40, "pad_token_id": 1, **sizes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told))
    return str(folder)


def random_state(kind: str) -> dict[str, torch.Tensor]:
    """Tensors as `open_clip.create_model` makes them, of sizes that let features differ from image to image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(kind, pretrained=None, pretrained_text=False)
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1 and "token_embedding" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
            elif "embedding" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


@contextlib.contextmanager
def known_towers(folder: Path, kinds=tuple(KINDS)):
    """Within this block open_clip knows these models; gives a file of random weights for each."""
    factory = open_clip.factory
    paths, known = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    local = {"words": write_tokenizer(folder / "words")}
    configs = folder / "configs"
    configs.mkdir()
    for kind in kinds:
        config = json.loads(json.dumps(KINDS[kind]))
        for key in ("hf_tokenizer_name", "hf_model_name"):
            if key in config["text_cfg"]:
                what = config["text_cfg"][key]
                config["text_cfg"][key] = local.get(what) or write_text_model(folder / what, what)
        (configs / f"{kind}.json").write_text(json.dumps(config))
    open_clip.add_model_config(configs)
    try:
        files = {}
        for kind in kinds:
            files[kind] = folder / f"{kind}.safetensors"
            save_file(random_state(kind), files[kind])
        yield files
    finally:
        factory._MODEL_CONFIG_PATHS[:] = paths
        factory._MODEL_CONFIGS = known
