"""The configuration keys of DLR-CLIP, TRAINER.DLRCLIP.* and INPUT.VIEWS*, and their check."""

from __future__ import annotations

import math
from typing import Any

HEADS = ("clip", "cma", "glr", "final", "fused")
ROBUST_HEAD = "robust"  # the sixth, where TRAINER.DLRCLIP.FUSION is robust
FUSIONS = ("learned", "robust")
PRECISIONS = ("fp32", "fp16", "amp", "bf16")
GLR_MODES = ("dense", "shared")
BETA_TIES = ("weight", "smallest")


def add_dlrclip_config(cfg: Any) -> None:
    """Adds the keys to `cfg` unless they are there. "source" below is the published method and its code."""
    if "INPUT" in cfg and "VIEWS" not in cfg.INPUT:
        # Seeded augmentations of each training image; epoch e uses view e mod VIEWS. What the frozen blocks make of a
        # view is computed once and kept. 0: fresh augmentation in every epoch, as in the source.
        cfg.INPUT.VIEWS = 0
        cfg.INPUT.VIEWS_MEMORY = 4.0  # GiB of RAM (in each process) to keep it in, at least 0; more goes to a file
    if "DLRCLIP" in cfg.TRAINER:
        return
    node = type(cfg)()

    # Switches of the three parts; for ablations.
    node.CMA = True  # cross-modal adapter; off: cma_logits = clip_logits
    node.GLR = True  # gate logit refiner; off: glr_logits = clip_logits (the source then puts cma_logits there)
    node.SKD = True  # smoothed distillation from the zero-shot branch; on: no direct losses on the CMA branch

    # Precision of the frozen backbone: fp32 | fp16 | amp (fp32 weights, autocast) | bf16. What is learnt is fp32.
    node.PREC = "fp32"

    # Memory and speed; none of these changes the numbers beyond rounding.
    node.TEXT_CHUNK = (
        0  # training: most classes whose prompts are encoded at once, each chunk once more backward; 0: all
    )
    node.CHECKPOINTING = False  # training: adapted blocks are computed again backward, not kept
    node.COMPILE = False  # training: the encoders run through torch.compile (minutes at the start; needs a compiler)

    # CMA
    node.TEXT_CTX_INIT = "a photo of a"  # prompt of the adapted text branch: "<this> <class>."
    # The source's encoder, which applies the adapters, is not public: what is marked "guess" may be other there.
    node.START = 5  # first adapted block, counted from 1 (source: 5)
    # Last adapted block, at least START; clipped to each encoder's depth (source: 12). Guess: that this means eight
    # blocks, 5 to 12. The source's cma.py builds seven adapters, numbered 5 to 11, of encoders with 12 blocks: END 11
    # where blocks are counted from 1 there, as its "index 0" suggests, START 6 where they are counted from 0.
    node.END = 12
    node.DIM = 32  # bottleneck width r, at least 1 (source: 32)
    node.SCALE = 0.01  # (initial) value of the scale of each block's adapter, finite (source: 0.01)
    node.LEARN_SCALE = True  # guess: the scales are learnt (source: its README says so, its cma.py keeps a number)
    # Adapters' weights get 1 / SCALE times their gradient, as in MMA, whose adapters these are. Guess: they do not.
    node.GRAD_SCALING = False

    # GLR
    # dense: layers of the size of the class list, as in the source; on other classes GLR passes zero-shot logits on.
    # shared: GLR and the fusion gate see statistics of each class's logits through one network for all classes, and
    # apply to any class list (ours).
    node.GLR_MODE = "dense"
    node.GLR_DIM = 512  # dense: feature size d, at least 1 (source: 512)
    node.SHARED_DIM = 64  # shared: feature size d of each class, at least 1; memory grows with images * classes * d
    node.RES_SCALE = 0.01  # initial value of the learnable scale of the residual on the logits, finite (source: 0.01)
    node.FIXED_ALPHA = None  # in [0, 1]: replaces the gate alpha; None: learnt

    # Fusion
    node.FUSION_DIM = 128  # hidden width of the fusion gate, at least 1 (guess: the source's gate is not public)
    node.FIXED_WEIGHT = None  # in [0, 1]: replaces the fusion weight w; None: learnt
    # Which of equally good betas is taken: weight (the one nearest to the mean learnt w; ours) | smallest (source).
    node.BETA_TIES = "weight"

    # learned: the five heads. robust: a sixth head beside them, which leans to zero-shot CLIP where signs that need no
    # label speak against the adapted branch; fitted after training to validation images and corruptions of them (ours).
    node.FUSION = "learned"

    # Weights of the losses, each at least 0 and 0 = absent. L1 is the mean absolute difference to clip_logits.
    node.LOSS = type(cfg)()
    node.LOSS.CE_CMA = 1.0  # cross-entropy of cma_logits; absent when SKD is on or CMA is off
    node.LOSS.CE_GLR = 1.0  # cross-entropy of glr_logits; absent when GLR is off
    node.LOSS.CE_FINAL = 1.0  # cross-entropy of final_logits
    node.LOSS.L1_CMA = 1.0  # L1(cma, clip); absent when SKD is on or CMA is off
    node.LOSS.L1_GLR = 1.0  # L1(glr, clip); absent when GLR is off

    # SKD
    node.LAMBDA = 0.01  # weight of the distillation loss, at least 0 (source: 0.01)
    node.T = 2.0  # temperature, above 0 (source: 2)
    node.SMOOTHING = 0.2  # share of the uniform distribution in the teacher, in [0, 1) (source: 0.2)

    node.EPS = 1e-4  # epsilon of Adam-type optimisers, above 0 (source: 1e-4); others have none
    node.HEAD = "final"  # the head that is reported as the accuracy: clip | cma | glr | final | fused | robust

    cfg.TRAINER.DLRCLIP = node


def _check_number(
    node: Any,
    key: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    path: str = "TRAINER.DLRCLIP",
) -> None:
    value = node[key]
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if number and low <= value <= high and not (open_low and value == low) and not (open_high and value == high):
        return
    bounds = []
    if low > -math.inf:
        bounds.append(f"{'above' if open_low else 'at least'} {low:g}")
    if high < math.inf:
        bounds.append(f"{'below' if open_high else 'at most'} {high:g}")
    wanted = " and ".join(bounds) or "finite"
    raise ValueError(f"Expected {path}.{key} to be a number, {wanted}, but got {value!r}")


def _check_whole(node: Any, key: str, low: int = 1, path: str = "TRAINER.DLRCLIP") -> None:
    value = node[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"Expected {path}.{key} to be a whole number, at least {low}, but got {value!r}")


def _check_choice(node: Any, key: str, choices: tuple[str, ...]) -> None:
    if node[key] not in choices:
        raise ValueError(f"Expected TRAINER.DLRCLIP.{key} to be one of {', '.join(choices)} but got {node[key]!r}")


def check_dlrclip_config(cfg: Any) -> None:
    """Checks every key of TRAINER.DLRCLIP, and INPUT.VIEWS*; needs neither CLIP nor data.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    if "DLRCLIP" not in cfg.TRAINER:
        raise ValueError("Expected the configuration to have a node TRAINER.DLRCLIP but got none: call extend_cfg(cfg)")
    if "VIEWS" in cfg.INPUT:
        _check_whole(cfg.INPUT, "VIEWS", 0, path="INPUT")
        _check_number(cfg.INPUT, "VIEWS_MEMORY", 0, path="INPUT")
    node = cfg.TRAINER.DLRCLIP
    for key in ("CMA", "GLR", "SKD", "CHECKPOINTING", "COMPILE", "LEARN_SCALE", "GRAD_SCALING"):
        if not isinstance(node[key], bool):
            raise ValueError(f"Expected TRAINER.DLRCLIP.{key} to be True or False but got {node[key]!r}")
    if not (node.CMA or node.GLR):
        raise ValueError("Expected TRAINER.DLRCLIP.CMA or .GLR to be on but got both off: nothing would be learnt")
    _check_choice(node, "PREC", PRECISIONS)
    _check_choice(node, "FUSION", FUSIONS)
    _check_choice(node, "HEAD", HEADS if node.FUSION == "learned" else (*HEADS, ROBUST_HEAD))
    _check_choice(node, "GLR_MODE", GLR_MODES)
    _check_choice(node, "BETA_TIES", BETA_TIES)
    if not isinstance(node.TEXT_CTX_INIT, str) or not node.TEXT_CTX_INIT.strip() or "{" in node.TEXT_CTX_INIT:
        raise ValueError(
            "Expected TRAINER.DLRCLIP.TEXT_CTX_INIT to be the words before the class name, such as 'a photo of a', "
            f"but got {node.TEXT_CTX_INIT!r}"
        )
    for key in ("START", "END", "DIM", "GLR_DIM", "SHARED_DIM", "FUSION_DIM"):
        _check_whole(node, key)
    _check_whole(node, "TEXT_CHUNK", 0)
    if node.START > node.END:
        raise ValueError(
            f"Expected TRAINER.DLRCLIP.START to be at most .END but got START {node.START} and END {node.END}"
        )
    for key in ("SCALE", "RES_SCALE"):
        _check_number(node, key, -math.inf)
    if node.GRAD_SCALING and node.SCALE == 0:
        raise ValueError("Expected TRAINER.DLRCLIP.SCALE not to be 0 where .GRAD_SCALING is True but got 0")
    for key in ("FIXED_ALPHA", "FIXED_WEIGHT"):
        if node[key] is not None:
            _check_number(node, key, 0, 1)
    _check_number(node, "LAMBDA", 0)
    _check_number(node, "T", 0, open_low=True)
    _check_number(node, "SMOOTHING", 0, 1, open_high=True)
    _check_number(node, "EPS", 0, open_low=True)
    for key in node.LOSS:
        _check_number(node.LOSS, key, 0, path="TRAINER.DLRCLIP.LOSS")
