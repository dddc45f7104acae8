"""Random CLIPs of toy size, as open_clip's own modules."""

import open_clip
import torch

NAMES = ["forest", "highway_road", "river", "sea lake", "industrial buildings"]


def random_open_clip(kind="vit", vision_layers=4, text_layers=4, seed=0):
    """An open_clip.CLIP with random weights and a logit scale of 100, image size 32."""
    torch.manual_seed(seed)
    if kind == "vit":
        vision = {"layers": vision_layers, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 32}
    else:
        vision = {"layers": (1, 1, 1, 2), "width": 4, "head_width": 32, "patch_size": None, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": text_layers}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)
        for name, p in model.named_parameters():  # the usual initialization of these is too timid to tell prompts apart
            if "positional" in name or "embedding" in name:
                p.normal_(std=0.3)
    return model.eval()
