"""The network of DLR-CLIP: a frozen CLIP, what is learnt beside it, its five heads and its named losses.

Legend: B images, C classes, E width of the joint embedding. Logits are fp32, [B, C], and multiplied by CLIP's scale.

    clip   zero-shot CLIP with the dataset's templates, frozen
    cma    CLIP with the cross-modal adapter in both encoders, one prompt per class
    glr    zero-shot logits with a learnt, gated residual
    final  w * cma + (1 - w) * glr, w [B, 1] learnt per image
    fused  beta * cma + (1 - beta) * glr, beta one number chosen on validation images after training
    robust r * final + (1 - r) * clip, where asked for; see robust.py

Blocks before the first adapted one see no adapter, and the first adapted one differs by what its adapter adds: images
run through them once, without autograd, for both branches. What of an image does not depend on what is learnt may be
given instead: `features`, normalised, of the zero-shot branch, and `hidden`, what enters the first adapted block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import pack_record, unpack_record
from ..clip import CLIP, clean_classname, zeroshot_weights
from ..clip.blocks import add_adapter
from ..features import FrozenPart
from ..modules.cross_modal_adapter import CrossModalAdapter, build_adapter
from .config import HEADS, ROBUST_HEAD
from .glr import FusionGate, GateLogitRefiner, fuse
from .robust import RobustMixture
from .shared import SharedFusion, SharedRefiner, neighbour_weights
from .skd import mean_abs_difference, skd_loss
from .text_branch import AdaptedText

logger = logging.getLogger(__name__)

# The running mean of w forgets with this momentum once it has seen 1 / MOMENTUM steps; before, it is the plain mean.
MOMENTUM = 0.1


class DLRCLIPLearner(nn.Module):
    """What is trained and saved: CMA, GLR, the fusion gate, and what they were trained on.

    A checkpoint describes itself: its state holds the training class list and `facts` about the frozen CLIP beside
    the weights, and loading it gives the layers of size C (dense mode) that class list's size.

    Args:
        classnames: the training class list.
        cma: the adapter, or None where CMA is off.
        glr: arguments of the refiner other than the number of classes, or None where GLR is off.
        shared: refiner and fusion gate are SharedRefiner and SharedFusion, which serve any class list.
        fusion_dim: hidden width of the fusion gate.
        fixed_weight: a number that replaces the fusion gate; None: learn it.
        robust: the mixture of the robust head, or None where there is no such head.
        facts: plain values that a checkpoint must agree on to be used with this learner.
    """

    weight_mean: Tensor  # running mean of w over training
    weight_steps: Tensor  # number of steps it has seen
    beta: Tensor  # chosen fusion coefficient; nan: not chosen
    beta_n: Tensor  # number of validation images it was chosen on; 0: on none

    def __init__(
        self,
        classnames: Sequence[str],
        *,
        cma: CrossModalAdapter | None,
        glr: Mapping[str, Any] | None,
        shared: bool = False,
        fusion_dim: int = 128,
        fixed_weight: float | None = None,
        robust: RobustMixture | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.cma = cma
        self.robust = robust
        self.glr: GateLogitRefiner | SharedRefiner | None = None
        self.fusion: FusionGate | SharedFusion | None = None
        self.shared = shared
        self.fixed_weight = fixed_weight
        self.facts = dict(facts or {})
        self._glr_arguments = None if glr is None else dict(glr)
        self._fusion_dim = fusion_dim
        self.register_buffer("weight_mean", torch.tensor(0.5 if fixed_weight is None else float(fixed_weight)))
        self.register_buffer("weight_steps", torch.tensor(0))
        self.register_buffer("beta", torch.tensor(float("nan"), dtype=torch.float64))  # 0.54 stays 0.54
        self.register_buffer("beta_n", torch.tensor(0))
        self.classnames: list[str] = []
        self._size_for(classnames)

    def _size_for(self, classnames: Sequence[str]) -> None:
        """Makes the class list the training class list; builds the layers of size C anew where C changes."""
        old, self.classnames = len(self.classnames), list(classnames)
        if len(self.classnames) == old or (self.shared and old):
            return
        device, dense = self.beta.device, () if self.shared else (len(classnames),)
        if self._glr_arguments is not None:
            refiner: Any = SharedRefiner if self.shared else GateLogitRefiner
            self.glr = refiner(*dense, **self._glr_arguments).to(device)
        if self.fixed_weight is None:
            gate: Any = SharedFusion if self.shared else FusionGate
            self.fusion = gate(*dense, hidden=self._fusion_dim).to(device)

    def fusion_weight(self, cma_logits: Tensor) -> Tensor:
        """w [B, 1] from cma_logits [B, C]; of the training classes, unless the gate is a shared one."""
        if self.fusion is None:
            return cma_logits.new_full((len(cma_logits), 1), self.fixed_weight or 0.0)
        return self.fusion(cma_logits)

    def mean_weight(self) -> Tensor:
        """The mean learnt w (or the fixed one), []."""
        return self.weight_mean if self.fixed_weight is None else torch.full_like(self.weight_mean, self.fixed_weight)

    def coefficient(self) -> Tensor:
        """The chosen beta, or the mean learnt w while none is chosen, []."""
        return torch.where(torch.isnan(self.beta), self.mean_weight(), self.beta)

    @torch.no_grad()
    def observe(self, weight: Tensor) -> None:
        """Takes one step's w [B, 1] into the running mean."""
        self.weight_steps += 1
        rate = torch.clamp(1.0 / self.weight_steps, min=MOMENTUM)
        self.weight_mean += rate * (weight.float().mean() - self.weight_mean)

    def get_extra_state(self) -> Tensor:
        """The training class list and the facts, as JSON in a uint8 tensor (which safe loaders admit)."""
        return pack_record({"classnames": self.classnames, "facts": self.facts})

    def set_extra_state(self, state: Tensor) -> None:
        """Called by load_state_dict before the weights of the submodules are loaded."""
        self._size_for(unpack_record(state)["classnames"])


class DLRCLIPNetwork(nn.Module):
    """See the head of this file.

    Only `learner` is to be trained and saved; whether it is in training mode decides what `forward` does.

    Args:
        clip: a frozen CLIP, on its device.
        classnames: class names in the order of their labels.
        templates: zero-shot prompt templates, each with one "{}".
        cma, glr, skd: switches.
        context: words before the class name in the prompt of the adapted branch.
        start, end, dim, scale, learn_scale, grad_scaling: see `build_adapter` and CrossModalAdapter.
        shared: see DLRCLIPLearner.
        glr_dim, res_scale, fixed_alpha: see GateLogitRefiner and SharedRefiner.
        fusion_dim, fixed_weight: see DLRCLIPLearner.
        robust: whether there is a robust head.
        loss_weights: weights of ce_cma, ce_glr, ce_final, l1_cma, l1_glr; 1 where absent.
        kd_weight, temperature, smoothing: weight of the distillation loss, and see `skd_loss`.
        text_chunk: most classes whose prompts are encoded at once in training (exact, less memory); 0: no limit.
        checkpointing: in training, adapted blocks are computed again in the backward pass (exact, less memory).
        compile: in training, the encoders run through torch.compile.

    Raises:
        ValueError: CMA and GLR are both off, no loss is left, or the blocks do not exist in this CLIP.
    """

    zeroshot: Tensor  # [C, E], normalised

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        templates: Sequence[str],
        *,
        cma: bool = True,
        glr: bool = True,
        skd: bool = True,
        context: str = "a photo of a",
        start: int = 5,
        end: int = 12,
        dim: int = 32,
        scale: float = 0.01,
        learn_scale: bool = True,
        grad_scaling: bool = False,
        shared: bool = False,
        glr_dim: int = 512,
        res_scale: float = 0.01,
        fixed_alpha: float | None = None,
        fusion_dim: int = 128,
        fixed_weight: float | None = None,
        robust: bool = False,
        loss_weights: Mapping[str, float] | None = None,
        kd_weight: float = 0.01,
        temperature: float = 2.0,
        smoothing: float = 0.2,
        text_chunk: int = 0,
        checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not (cma or glr):
            raise ValueError("Expected CMA or GLR to be on but got both off: nothing would be learnt")
        self.clip = clip
        self.templates = list(templates)
        self.context = context.strip()
        adapter = build_adapter(clip, start, end, dim, scale, learn_scale, grad_scaling) if cma else None
        facts: dict[str, Any] = {"backbone": clip.name, "weights_digest": clip.weights_digest}
        if cma:
            facts["context"] = self.context
        facts["glr_mode"] = "shared" if shared else "dense"
        self.learner = DLRCLIPLearner(
            classnames,
            cma=adapter,
            glr={"dim": glr_dim, "res_scale": res_scale, "fixed_alpha": fixed_alpha} if glr else None,
            shared=shared,
            fusion_dim=fusion_dim,
            fixed_weight=fixed_weight,
            robust=RobustMixture(clip.embed_dim) if robust else None,
            facts=facts,
        ).to(clip.device)
        self.loss_weights = _present_losses(cma, glr, skd, loss_weights or {}, kd_weight)
        self.temperature, self.smoothing = temperature, smoothing
        self._text_start = min(int(i) for i in adapter.text) if adapter else 1
        self._visual_start = min(adapter.share) if adapter else 1
        self._text_chunk, self._checkpointing = text_chunk, checkpointing
        self._wrap: Callable[[Any], Any] | None = torch.compile if compile else None
        self._train_frozen, self._train_adapted = self._run_frozen, self._run_adapted
        if self._wrap is not None:
            self._train_frozen, self._train_adapted = self._wrap(self._run_frozen), self._wrap(self._run_adapted)
        self.register_buffer("zeroshot", torch.empty(0), persistent=False)
        self.bind(classnames)

    # Class lists

    def bind(self, classnames: Sequence[str], class_indices: Sequence[int] | None = None) -> None:
        """Sets the class list that logits are given for.

        * the training class list: everything applies;
        * a part of it, said by `class_indices` (position in the training class list of each class): everything is
          computed over the training class list, then its columns are taken;
        * another class list: shared GLR and fusion apply as they are. Dense ones, whose layers have the size of the
          training class list, cannot: glr_logits = clip_logits, and w = its mean in training (or the fixed one).
          Which it is, is logged once.

        Raises:
            ValueError: no class.
        """
        names = list(classnames)
        if not names:
            raise ValueError("Expected at least one class name but got none")
        trained = self.learner.classnames
        indices = None if class_indices is None else [int(i) for i in class_indices]
        subset = indices is not None and all(0 <= i < len(trained) for i in indices)
        subset = subset and [trained[i] for i in indices or []] == names
        self.classnames = names
        self.seen = names == trained or subset
        self.columns = torch.tensor(indices, device=self.clip.device) if subset and names != trained else None
        shared = self.learner.shared
        self.refines = self.seen or shared
        if not self.seen:
            instead = (
                "the logit refiner and the fusion gate, which are shared by all classes, apply to it"
                if shared
                else "the logit refiner passes the zero-shot logits on, and the fusion weight is its mean in training, "
                f"{float(self.learner.mean_weight()):.4f}"
            )
            logger.info(
                "The class list (%d classes) is not the one trained on (%d classes): %s",
                len(names), len(trained), instead,
            )  # fmt: skip
        computed = trained if subset else names
        with torch.no_grad():
            self.zeroshot = zeroshot_weights(self.clip, computed, self.templates).float()
            self._neighbours = (neighbour_weights(self.zeroshot),) if shared else ()
            if self.learner.cma is not None:
                tokens = self.clip.text.tokenise([f"{self.context} {clean_classname(name)}." for name in computed])
                self._text = AdaptedText(
                    self.clip.text, tokens, self._text_start, self._text_chunk, self._checkpointing, self._wrap
                )
        self._text_cache: tuple[Any, Tensor] | None = None

    # Branches

    def _logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Normalised [B, E] and [C, E], fp32 -> [B, C]; in fp32 even under autocast."""
        with torch.autocast(device_type=image_features.device.type, enabled=False):
            return self.clip.logit_scale * image_features @ text_features.t()

    def text_features(self) -> Tensor:
        """Normalised text features [C, E] of the adapted branch; kept between calls while nothing has been learnt."""
        cma = self.learner.cma
        assert cma is not None
        if self.learner.training:
            self._text_cache = None
            return self._text.features(cma, training=torch.is_grad_enabled())
        key = tuple((p.data_ptr(), p._version) for p in cma.parameters())
        if self._text_cache is None or self._text_cache[0] != key:
            with torch.no_grad():
                self._text_cache = key, self._text.features(cma, training=False)
        return self._text_cache[1]

    def _run_frozen(self, hidden: Tensor, with_features: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """What enters the first adapted block -> what its adapter sees, its output, and the zero-shot features."""
        visual, start = self.clip.visual, self._visual_start
        seen, out = visual.enter(hidden, start)
        features = F.normalize(visual.suffix(out, start + 1).float(), dim=-1) if with_features else None
        return seen, out, features

    def _run_adapted(self, cma: CrossModalAdapter, seen: Tensor, out: Tensor) -> Tensor:
        """-> normalised features [B, E] of the adapted branch, fp32, with gradients."""
        visual, start = self.clip.visual, self._visual_start
        adapt = cma.adapt_tokens if visual.kind == "vit" else cma.adapt_map
        out = add_adapter(out, adapt, start, seen)
        checkpointing = self._checkpointing and self.learner.training
        return F.normalize(visual.suffix(out, start + 1, adapt, checkpointing=checkpointing).float(), dim=-1)

    @torch.no_grad()
    def frozen_part(self, images: Tensor) -> FrozenPart:
        """What of images [B, 3, H, W] may be kept and given to `forward` as often as they come."""
        hidden = self.clip.visual.prefix(images, self._visual_start - 1)
        _, _, features = self._run_frozen(hidden, True)
        assert features is not None
        return FrozenPart(features, hidden if self.learner.cma is not None else None)

    def image_features(
        self, images: Tensor | None, features: Tensor | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """-> normalised features [B, E] of the frozen and of the adapted branch (None: CMA is off), fp32.

        Gradients are in the second only. Arguments as `forward`'s.
        """
        visual, cma, training = self.clip.visual, self.learner.cma, self.learner.training
        seen = out = None
        with torch.no_grad():
            if cma is not None or features is None:
                if hidden is None:
                    if images is None:
                        raise ValueError("Expected images, or all that is needed of them, but got neither")
                    hidden = visual.prefix(images, self._visual_start - 1)
                run = self._train_frozen if training else self._run_frozen
                seen, out, computed = run(hidden, features is None)
                features = computed if features is None else features
        assert features is not None
        if cma is None or seen is None or out is None:
            return features, None
        return features, (self._train_adapted if training else self._run_adapted)(cma, seen, out)

    def branches(self, frozen: Tensor, adapted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of `image_features` -> (clip_logits, cma_logits), each [B, C]; gradients in the second only."""
        with torch.no_grad():
            clip_logits = self._logits(frozen, self.zeroshot)
        return clip_logits, clip_logits if adapted is None else self._logits(adapted, self.text_features())

    def forward(
        self, images: Tensor | None = None, *, features: Tensor | None = None, hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """-> clip, cma, glr, final [B, C], weight [B, 1] and, where GLR is applied, alpha [B, 1].

        While the learner is in evaluation mode, also fused and, where there is one, robust [B, C] with trust [B, 1].

        Args:
            images: [B, 3, H, W]; not needed where the other two are given.
            features: normalised features [B, E] of zero-shot CLIP, fp32, where they are known: its blocks are not run.
            hidden: what enters the first adapted block, where it is known; see `frozen_part`.
        """
        if self.learner.training and self.classnames != self.learner.classnames:
            raise ValueError("Expected to train on the class list that the learner was made for but got another one")
        return self._outputs(*self.image_features(images, features, hidden))

    def _outputs(self, frozen: Tensor, adapted: Tensor | None) -> dict[str, Tensor]:
        learner = self.learner
        clip_logits, cma_logits = self.branches(frozen, adapted)
        glr_logits, alpha = clip_logits, None
        if self.refines:
            if learner.glr is not None:
                glr_logits, alpha = learner.glr(clip_logits, cma_logits, *self._neighbours)
            weight = learner.fusion_weight(cma_logits)
        else:
            weight = learner.mean_weight().expand(len(clip_logits), 1)
        logits = {"clip": clip_logits, "cma": cma_logits, "glr": glr_logits}
        logits["final"] = fuse(cma_logits, glr_logits, weight)
        values = {"weight": weight, **({} if alpha is None else {"alpha": alpha})}
        if not learner.training:
            logits["fused"] = fuse(cma_logits, glr_logits, learner.coefficient())
            if learner.robust is not None:
                logits[ROBUST_HEAD], values["trust"] = learner.robust(frozen, clip_logits, logits["final"])
        if self.columns is not None:
            logits = {name: value[:, self.columns] for name, value in logits.items()}
        return {**logits, **values}

    @torch.no_grad()
    def heads(self, images: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Logits [B, C] of all heads; the learner must be in evaluation mode. Arguments as `forward`'s."""
        return self.report(images, features)["heads"]

    @torch.no_grad()
    def report(self, images: Tensor, features: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
        """`heads`, `values` (alpha, weight, trust, [B, 1]), `features` (clip, cma, [B, E]). See `forward`."""
        frozen, adapted = self.image_features(images, features)
        outputs = self._outputs(frozen, adapted)
        return {
            "heads": {head: outputs[head] for head in (*HEADS, ROBUST_HEAD) if head in outputs},
            "values": {name: outputs[name] for name in ("alpha", "weight", "trust") if name in outputs},
            "features": {"clip": frozen} if adapted is None else {"clip": frozen, "cma": adapted},
        }

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The named losses, each times its weight; one that is switched off is absent. Their sum is to be minimised."""
        terms = {}
        for name, weight in self.loss_weights.items():
            kind, _, branch = name.partition("_")
            if kind == "ce":
                value = F.cross_entropy(outputs[branch], labels)
            elif kind == "l1":
                value = mean_abs_difference(outputs[branch], outputs["clip"])
            else:
                value = skd_loss(
                    outputs["final"], outputs["clip"], temperature=self.temperature, smoothing=self.smoothing
                )
            terms[name] = weight * value
        return terms

    def train(self, mode: bool = True) -> DLRCLIPNetwork:
        """Sets the learner's mode; the frozen CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self


def _present_losses(
    cma: bool, glr: bool, skd: bool, weights: Mapping[str, float], kd_weight: float
) -> dict[str, float]:
    """Name -> weight of the losses that take part.

    Without distillation: CE(cma) + CE(glr) + CE(final) + L1(cma, clip) + L1(glr, clip). With it, the two direct losses
    of the adapted branch go and the distillation of clip into final comes.
    """
    unknown = set(weights) - {"ce_cma", "ce_glr", "ce_final", "l1_cma", "l1_glr"}
    if unknown:
        raise ValueError(
            f"Expected loss weights for ce_cma, ce_glr, ce_final, l1_cma, l1_glr but got {sorted(unknown)}"
        )
    wanted = {
        "ce_cma": cma and not skd,
        "ce_glr": glr,
        "ce_final": True,
        "l1_cma": cma and not skd,
        "l1_glr": glr,
    }
    present = {name: float(weights.get(name, 1.0)) for name, on in wanted.items() if on}
    if skd:
        present["kd"] = float(kd_weight)
    present = {name: weight for name, weight in present.items() if weight != 0}
    if not present:
        raise ValueError("Expected at least one loss with a weight above 0 but got none")
    return present
