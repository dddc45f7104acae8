"""Settings of DLR-CLIP, TRAINER.DLRCLIP.*; those of kept views are in base/views_trainer.py.

"source" is the published method and its code. The source's encoder, which applies the adapters, is not public: where a
value is called a guess, the source may differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..base import MethodConfig, key, precision

HEADS = ("clip", "cma", "glr", "final", "fused")
ROBUST_HEAD = "robust"  # the sixth, where TRAINER.DLRCLIP.FUSION is robust
# Further heads where TRAINER.DLRCLIP.FUSION is mixture: prototype classifiers on frozen features, on patches and on
# adapted features, and the mixture of all branches.
PROTO_HEAD, PROTO_PATCH_HEAD, PROTO_CMA_HEAD, MIXED_HEAD = "proto", "proto_patch", "proto_cma", "mixed"
ALL_HEADS = (*HEADS, ROBUST_HEAD, PROTO_HEAD, PROTO_PATCH_HEAD, PROTO_CMA_HEAD, MIXED_HEAD)
NEEDED_FUSION = {ROBUST_HEAD: "robust", MIXED_HEAD: "mixture"}


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses; a loss of weight 0 is absent. L1 is the mean absolute difference to clip_logits."""

    ce_cma: float = key(1.0, "cross-entropy of cma_logits; absent when SKD is on or CMA is off", low=0)
    ce_glr: float = key(1.0, "cross-entropy of glr_logits; absent when GLR is off", low=0)
    ce_final: float = key(1.0, "cross-entropy of final_logits", low=0)
    l1_cma: float = key(1.0, "L1(cma, clip); absent when SKD is on or CMA is off", low=0)
    l1_glr: float = key(1.0, "L1(glr, clip); absent when GLR is off", low=0)


@dataclass(frozen=True)
class MixtureKeys:
    """Hold the settings of the third level (ours), which count where FUSION is mixture."""

    proto: bool = key(True, "a prototype classifier on frozen features takes part: head proto")
    proto_patch: bool = key(
        True,
        "one on the mean patches of two blocks of the frozen image encoder takes part: head proto_patch; absent for a "
        "backbone that is taken as a whole, such as SigLIP",
    )
    proto_cma: bool = key(True, "one on adapted features takes part: head proto_cma; absent when CMA is off")
    views: int = key(
        4,
        "seeded augmentations of each training image that prototypes are made of, beside the image as it is at test "
        "time",
        low=0,
    )
    ridge: float = key(
        1.0,
        "how strongly the weights of the branches are drawn to their starting point, at which each branch has a share "
        "that grows with the probability it gives to the right class",
        low=0,
    )


@dataclass(frozen=True)
class DLRCLIPConfig(MethodConfig):
    """Settings of DLR-CLIP. The defaults are the published form."""

    # Switches of the three parts, for ablations.
    cma: bool = key(True, "cross-modal adapter; off: cma_logits = clip_logits")
    glr: bool = key(True, "gate logit refiner; off: glr_logits = clip_logits", source="off: glr_logits = cma_logits")
    skd: bool = key(True, "smoothed distillation from the zero-shot branch; on: no direct losses on the CMA branch")
    prec: str = precision("fp32", "what is learnt is fp32")

    # Memory and speed; none of these changes the numbers beyond rounding.
    text_chunk: int = key(
        0,
        "training: most classes whose prompts are encoded at once, each chunk once more backward; 0: all",
        low=0,
    )
    checkpointing: bool = key(False, "training: adapted blocks are computed again backward, not kept")
    compile: bool = key(
        False, "training: the encoders run through torch.compile (minutes at the start; needs a compiler)"
    )
    compile_mode: str = key(
        "default",
        "mode of torch.compile; reduce-overhead: on a GPU it also captures CUDA graphs, which keep more memory",
        choices=("default", "reduce-overhead"),
    )

    # CMA
    text_ctx_init: str = key("a photo of a", "prompt of the adapted text branch: '<this> <class>.'")
    start: int = key(5, "first adapted block, counted from 1", low=1, source="5")
    # The source's cma.py builds seven adapters, numbered 5 to 11, for encoders with 12 blocks. If it counts blocks from
    # 1, as its "index 0" suggests, that is END 11 here; if it counts them from 0, that is START 6.
    end: int = key(
        12,
        "last adapted block, at least START; clipped to each encoder's depth",
        low=1,
        source="12; a guess that this means eight blocks, 5 to 12",
    )
    dim: int = key(32, "bottleneck width r", low=1, source="32")
    scale: float = key(0.01, "(initial) value of the scale of each block's adapter", source="0.01")
    learn_scale: bool = key(
        True, "the scales are learnt", source="guess: its README says so, its cma.py keeps a number"
    )
    grad_scaling: bool = key(
        False,
        "adapters' weights get 1 / SCALE times their gradient, as in MMA, whose adapters these are",
        source="guess: they do not",
    )

    # GLR
    glr_mode: str = key(
        "dense",
        "dense: layers of the size of the class list; on other classes GLR passes zero-shot logits on; shared (ours): "
        "GLR and the fusion gate see statistics of each class's logits through one network for all classes, and apply "
        "to any class list",
        choices=("dense", "shared"),
        source="dense",
    )
    glr_dim: int = key(512, "dense: feature size d", low=1, source="512")
    shared_dim: int = key(64, "shared: feature size d of each class; memory grows with images * classes * d", low=1)
    res_scale: float = key(0.01, "initial value of the learnable scale of the residual on the logits", source="0.01")
    fixed_alpha: float | None = key(None, "replaces the gate alpha; None: learnt", low=0, high=1)

    # Fusion
    fusion_dim: int = key(128, "hidden width of the fusion gate", low=1, source="guess: its gate is not public")
    fixed_weight: float | None = key(None, "replaces the fusion weight w; None: learnt", low=0, high=1)
    beta_ties: str = key(
        "weight",
        "which of equally good betas is taken: the one nearest to the mean learnt w (weight, ours), or the smallest",
        choices=("weight", "smallest"),
        source="smallest",
    )
    fusion: str = key(
        "learned",
        "learned: the five heads; robust (ours): a sixth head beside them, which leans to zero-shot CLIP where signs "
        "that need no label speak against the adapted branch; fitted after training to validation images and "
        "corruptions of them; mixture (ours): heads beside the five that compare images with images, and a mixture of "
        "all branches; fitted after training to validation images",
        choices=("learned", "robust", "mixture"),
    )
    mixture: MixtureKeys = field(default_factory=MixtureKeys)

    loss: LossWeights = field(default_factory=LossWeights)

    # SKD
    lambda_: float = key(0.01, "weight of the distillation loss", low=0, source="0.01")
    t: float = key(2.0, "temperature", above=0, source="2")
    smoothing: float = key(0.2, "share of the uniform distribution in the teacher", low=0, below=1, source="0.2")

    eps: float = key(1e-4, "epsilon of Adam-type optimizers; others have none", above=0, source="1e-4")
    head: str = key(
        "final", "the head that is reported as the accuracy; robust and mixed only with FUSION of that kind",
        choices=(*HEADS, ROBUST_HEAD, MIXED_HEAD),
    )  # fmt: skip

    def check(self, path: str) -> None:
        """Check that something is learnt and that the head exists; see MethodConfig."""
        if not (self.cma or self.glr or self.prototypes()):
            raise ValueError(f"Expected {path}.CMA or .GLR to be on but got both off: nothing would be learnt")
        for head, fusion in NEEDED_FUSION.items():
            if self.head == head and self.fusion != fusion:
                names = ", ".join(HEADS)
                raise ValueError(
                    f"Expected {path}.HEAD to be one of {names} but got {head!r}, which needs FUSION {fusion}"
                )
        if not self.text_ctx_init.strip() or "{" in self.text_ctx_init:
            raise ValueError(
                f"Expected {path}.TEXT_CTX_INIT to be the words before the class name, such as 'a photo of a', "
                f"but got {self.text_ctx_init!r}"
            )
        if self.start > self.end:
            raise ValueError(f"Expected {path}.START to be at most .END but got START {self.start} and END {self.end}")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(
                f"Expected {path}.COMPILE to be True where .COMPILE_MODE is {self.compile_mode} but it is not"
            )
        if self.grad_scaling and self.scale == 0:
            raise ValueError(f"Expected {path}.SCALE not to be 0 where .GRAD_SCALING is True but got 0")

    def without_patches(self) -> DLRCLIPConfig:
        """Return the settings for an image encoder that is taken as a whole, whose patches cannot be read."""
        return replace(self, mixture=replace(self.mixture, proto_patch=False))

    @property
    def reads_patches(self) -> bool:
        """Say whether the patches of the frozen image encoder are read."""
        return PROTO_PATCH_HEAD in self.prototypes()

    @property
    def mixes(self) -> bool:
        """Say whether branches are mixed after training; prototype classifiers may be among them."""
        return self.fusion == "mixture"

    @property
    def trains(self) -> bool:
        """Say whether anything is trained; if not, all that is fitted takes a moment."""
        return self.cma or self.glr

    def prototypes(self) -> list[str]:
        """Return the heads of the prototype classifiers that take part."""
        wanted = {
            PROTO_HEAD: self.mixture.proto,
            PROTO_PATCH_HEAD: self.mixture.proto_patch,
            PROTO_CMA_HEAD: self.mixture.proto_cma and self.cma,
        }
        return [head for head, on in wanted.items() if on and self.mixes]

    def branches(self) -> list[str]:
        """Return the heads that are mixed, the safest first."""
        wanted = {"cma": self.cma, "glr": self.glr}
        return ["clip", *self.prototypes(), *(head for head, on in wanted.items() if on)]

    def present_losses(self) -> dict[str, float]:
        """Return the weights, by name, of the losses that take part.

        Without distillation: CE(cma) + CE(glr) + CE(final) + L1(cma, clip) + L1(glr, clip). With distillation, the two
        direct losses of the adapted branch are left out, and the distillation of clip into final is added.

        Raises:
            ValueError: something is trained, and no loss is left.
        """
        if not self.trains:
            return {}
        wanted = {
            "ce_cma": self.cma and not self.skd,
            "ce_glr": self.glr,
            "ce_final": True,
            "l1_cma": self.cma and not self.skd,
            "l1_glr": self.glr,
        }
        present = {name: getattr(self.loss, name) for name, on in wanted.items() if on}
        if self.skd:
            present["kd"] = self.lambda_
        present = {name: weight for name, weight in present.items() if weight != 0}
        if not present:
            raise ValueError("Expected at least one loss with a weight above 0 but got none")
        return present
