"""The network of DLR-CLIP: a frozen CLIP, what is learnt beside it, its five heads and its named losses.

Legend: B images, C classes, E width of the joint embedding, T of mean patches. Logits are fp32, [B, C], and multiplied
by CLIP's scale.

    clip   zero-shot CLIP with the dataset's templates, frozen
    cma    CLIP with the cross-modal adapter in both encoders, one prompt per class
    glr    zero-shot logits with a learnt, gated residual
    final  w * cma + (1 - w) * glr, w [B, 1] learnt per image
    fused  beta * cma + (1 - beta) * glr, beta one number chosen on validation images after training
    robust r * final + (1 - r) * clip, where asked for; see robust.py
    proto, proto_patch, proto_cma, mixed: classifiers that compare images with images, on frozen features, on mean
           patches and on adapted features, and the mixture of all branches, where asked for; see prototypes.py and
           mixture.py

Blocks before the first adapted one see no adapter, and the first adapted one differs only by what its adapter adds. So
images run through these blocks once for both branches, without autograd. Callers may keep what does not depend on what
is learnt, and give it in place of the images: `features`, the zero-shot branch's normalized features, and `hidden`,
what enters the first adapted block.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.learner import TextCache
from ..clip import CLIP, BlockEdit, clean_classname, zeroshot_weights
from ..features import FrozenPart, PatchReader, features_and_patches
from ..modules.cross_modal_adapter import CrossModalAdapter, build_adapter
from .calibration import SOURCE
from .config import ALL_HEADS, MIXED_HEAD, ROBUST_HEAD, DLRCLIPConfig
from .glr import fuse
from .learner import DLRCLIPLearner
from .shared import neighbor_weights
from .skd import mean_abs_difference, skd_loss
from .text_branch import AdaptedText

logger = logging.getLogger(__name__)


class ImageFeatures(NamedTuple):
    """Hold the features of images, fp32; only those of the adapted branch have gradients.

    Attributes:
        clip: normalized features [B, E] of the frozen branch.
        cma: those of the adapted branch; None: CMA is off.
        patches: mean patches [B, T] of the frozen image encoder; None: they are not read, as in training.
    """

    clip: Tensor
    cma: Tensor | None = None
    patches: Tensor | None = None

    def by_branch(self) -> dict[str, Tensor]:
        """Return those that are there, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def frozen(self) -> Tensor:
        """Return what does not depend on what is learnt, [B, E] or, with patches, [B, E + T]."""
        return self.clip if self.patches is None else torch.cat([self.clip, self.patches], dim=-1)


class DLRCLIPNetwork(nn.Module):
    """The network of DLR-CLIP; see the head of this file.

    Only `learner` is to be trained and saved; whether it is in training mode decides what `forward` does.

    Args:
        clip: a frozen CLIP, on its device.
        classnames: class names in the order of their labels.
        templates: zero-shot prompt templates, each with one "{}".
        settings: see DLRCLIPConfig; of them, TEXT_CHUNK, CHECKPOINTING, COMPILE and COMPILE_MODE count in
            training only.

    Raises:
        ValueError: CMA and GLR are both off, no loss is left, or the blocks do not exist in this CLIP.
    """

    zeroshot: Tensor  # [C, E], normalized

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], settings: DLRCLIPConfig
    ) -> None:
        super().__init__()
        if clip.visual.kind == "opaque":
            settings = settings.without_patches()
        settings.check("TRAINER.DLRCLIP")
        self.clip = clip
        self.templates = templates
        self.context = settings.text_ctx_init.strip()
        adapter = None
        if settings.cma:
            adapter = build_adapter(
                clip,
                settings.start,
                settings.end,
                settings.dim,
                settings.scale,
                settings.learn_scale,
                settings.grad_scaling,
            )
        self.learner = DLRCLIPLearner(clip, classnames, settings, adapter).to(clip.device)
        self.loss_weights = settings.present_losses()
        self.temperature, self.smoothing = settings.t, settings.smoothing
        self._text_start = adapter.text_edit.first_block if adapter else 1
        self._visual_start = adapter.visual_edit.first_block if adapter else 1
        self._text_chunk, self._checkpointing = settings.text_chunk, settings.checkpointing
        self._wrap: Callable[[Any], Any] | None = None
        if settings.compile:
            self._wrap = functools.partial(torch.compile, mode=settings.compile_mode)
        self._train_frozen, self._train_adapted = self._run_frozen, self._run_adapted
        if self._wrap is not None:
            self._train_frozen, self._train_adapted = self._wrap(self._run_frozen), self._wrap(self._run_adapted)
        self.register_buffer("zeroshot", torch.empty(0), persistent=False)
        self.bind(classnames)

    # Class lists

    def bind(self, classnames: Sequence[str], class_indices: Sequence[int] | None = None) -> None:
        """Set the class list that logits are given for.

        * The training class list: everything applies.
        * A part of it, if `class_indices` gives the position of each class in the training class list: everything is
          computed over the training class list, then the columns of the part are taken.
        * Another class list: shared GLR and fusion apply as they are. Dense ones, whose layers have the size of the
          training class list, cannot: glr_logits = clip_logits, and w = its mean in training (or the fixed one).
          Each call logs which of the two happens.

        Raises:
            ValueError: the class list is empty.
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
            self._neighbors = (neighbor_weights(self.zeroshot),) if shared else ()
            if self.learner.cma is not None:
                tokens = self.clip.text.tokenise([f"{self.context} {clean_classname(name)}." for name in computed])
                self._text = AdaptedText(
                    self.clip.text, tokens, self._text_start, self._text_chunk, self._checkpointing, self._wrap
                )
        self._text_cache = TextCache()

    # Branches

    def _logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return logits [B, C] for normalized features [B, E] and [C, E]; all are fp32, even under autocast."""
        with torch.autocast(device_type=image_features.device.type, enabled=False):
            return self.clip.logit_scale * image_features @ text_features.t()

    def text_features(self) -> Tensor:
        """Return the adapted branch's normalized text features [C, E], kept between calls while nothing is learnt."""
        cma = self.learner.cma
        assert cma is not None
        training = self.learner.training and torch.is_grad_enabled()
        return self._text_cache.get(cma, lambda: self._text.features(cma, training=training))

    def _run_frozen(self, hidden: Tensor, with_features: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the first adapted block without its adapter and, with `with_features`, the zero-shot branch after it.

        Args:
            hidden: what enters the block.
            with_features: whether the zero-shot features are wanted.

        Returns:
            What the block's adapter sees, the block's output, and the normalized zero-shot features [B, E], fp32, or
            None.
        """
        visual, start = self.clip.visual, self._visual_start
        seen, out = visual.enter(hidden, start)
        features = F.normalize(visual.suffix(out, start + 1).float(), dim=-1) if with_features else None
        return seen, out, features

    def _run_adapted(self, cma: CrossModalAdapter, seen: Tensor, out: Tensor) -> Tensor:
        """Return the adapted branch's normalized features [B, E], fp32, with gradients.

        Args:
            cma: the adapter.
            seen, out: what `_run_frozen` returns first.
        """
        visual, start, edits = self.clip.visual, self._visual_start, [cma.visual_edit]
        out = visual.join(out, edits, start, seen)
        checkpointing = self._checkpointing and self.learner.training
        return F.normalize(visual.suffix(out, start + 1, edits, checkpointing).float(), dim=-1)

    @torch.no_grad()
    def frozen_part(self, images: Tensor) -> FrozenPart:
        """Return the activations of images [B, 3, H, W] that do not depend on what is learnt.

        They may be kept, and given to `forward` whenever the same images come again.
        """
        hidden = self.clip.visual.prefix(images, self._visual_start - 1)
        _, _, features = self._run_frozen(hidden, True)
        assert features is not None
        return FrozenPart(features, hidden if self.learner.cma is not None else None)

    def image_features(
        self, images: Tensor | None, features: Tensor | None = None, hidden: Tensor | None = None
    ) -> ImageFeatures:
        """Return the features of all branches. The arguments are those of `forward`.

        Raises:
            ValueError: neither images nor all that is needed of them is given, or known features lack the patches.
        """
        cma, training = self.learner.cma, self.learner.training
        blocks = () if training else self.learner.patch_blocks
        seen = out = None
        with torch.no_grad():
            if features is None and blocks:
                hidden, features = self._read(images, blocks)
            if cma is not None or features is None:
                hidden = self._prefix(images) if hidden is None else hidden
                run = self._train_frozen if training else self._run_frozen
                seen, out, computed = run(hidden, features is None)
                features = computed if features is None else features
        assert features is not None
        frozen = self.split(features) if blocks else ImageFeatures(features)
        if cma is None or seen is None or out is None:
            return frozen
        return frozen._replace(cma=(self._train_adapted if training else self._run_adapted)(cma, seen, out))

    def split(self, frozen: Tensor) -> ImageFeatures:
        """Return features [..., E], or [..., E + T] where patches are read, by branch.

        Raises:
            ValueError: patches are read, and none is there.
        """
        if not self.learner.patch_blocks:
            return ImageFeatures(frozen)
        features, patches = frozen.tensor_split([self.clip.embed_dim], dim=-1)
        if not patches.shape[-1]:
            raise ValueError("Expected known features with mean patches beside them but got none of those")
        return ImageFeatures(features, patches=patches)

    def _prefix(self, images: Tensor | None, edits: Sequence[BlockEdit] = ()) -> Tensor:
        """Return what enters the first adapted block."""
        if images is None:
            raise ValueError("Expected images, or all that is needed of them, but got neither")
        return self.clip.visual.prefix(images, self._visual_start - 1, edits)

    def _read(self, images: Tensor | None, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what enters the first adapted block, and zero-shot features beside mean patches [B, E + T]."""
        reader = PatchReader(self.clip.visual, blocks)
        hidden = self._prefix(images, [reader])
        return hidden, features_and_patches(self.clip.visual, hidden, self._visual_start, reader)

    @torch.no_grad()
    def clip_logits(self, features: Tensor) -> Tensor:
        """Return clip_logits [B, C] for normalized features [B, E] of the frozen branch."""
        return self._logits(features, self.zeroshot)

    def forward(
        self, images: Tensor | None = None, *, features: Tensor | None = None, hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the logits [B, C] of the heads, and the numbers [B, 1] that mix them.

        Args:
            images: [B, 3, H, W]; not needed where the other two are given.
            features: normalized features [B, E] of zero-shot CLIP, fp32, where they are known: then the blocks
                that only the zero-shot branch needs are not run. Where patches are read, and the learner is in
                evaluation mode, [B, E + T], as PatchEncoder gives them.
            hidden: what enters the first adapted block, where it is known; see `frozen_part`.

        Returns:
            clip, cma, glr, final [B, C], weight [B, 1] and, where GLR is applied, alpha [B, 1]. While the learner is in
            evaluation mode, also fused and, where there are such, robust [B, C] with trust [B, 1], and proto,
            proto_patch, proto_cma and mixed [B, C].

        Raises:
            ValueError: the learner is in training mode, and the class list is not the training class list.
        """
        if self.learner.training and self.classnames != self.learner.classnames:
            raise ValueError("Expected to train on the class list that the learner was made for but got another one")
        if self.learner.training and self._wrap is not None:
            # A step runs several captured graphs. Without this, each would take the memory of those before it.
            torch.compiler.cudagraph_mark_step_begin()
        return self._outputs(self.image_features(images, features, hidden))

    def _outputs(self, found: ImageFeatures) -> dict[str, Tensor]:
        learner = self.learner
        clip_logits = self.clip_logits(found.clip)
        cma_logits = clip_logits if found.cma is None else self._logits(found.cma, self.text_features())
        glr_logits, alpha = clip_logits, None
        if self.refines:
            if learner.glr is not None:
                glr_logits, alpha = learner.glr(clip_logits, cma_logits, *self._neighbors)
            weight = learner.fusion_weight(cma_logits)
        else:
            weight = learner.mean_weight().expand(len(clip_logits), 1)
        logits = {"clip": clip_logits, "cma": cma_logits, "glr": glr_logits}
        logits["final"] = fuse(cma_logits, glr_logits, weight)
        values = {"weight": weight, **({} if alpha is None else {"alpha": alpha})}
        if not learner.training:
            logits["fused"] = fuse(cma_logits, glr_logits, learner.coefficient())
            if learner.robust is not None:
                logits[ROBUST_HEAD], values["trust"] = learner.robust(found.clip, clip_logits, logits["final"])
            if learner.mixture is not None:
                logits |= self._mixed(logits, found)
        if self.columns is not None:
            logits = {name: value[:, self.columns] for name, value in logits.items()}
        return {**logits, **values}

    def _mixed(self, logits: Mapping[str, Tensor], features: ImageFeatures) -> dict[str, Tensor]:
        """Return the logits [B, C] of the prototype classifiers and of the mixture, which are for trained classes.

        For another class list the mixture is zero-shot CLIP: the images of other classes say nothing about it, and
        what the branches learnt from them harms (docs/METHODS.md).
        """
        if not self.seen:
            return {MIXED_HEAD: logits["clip"]}
        compared = features.by_branch()
        found = {head: classifier(compared[SOURCE[head]]) for head, classifier in self.learner.prototypes.items()}
        assert self.learner.mixture is not None
        return {**found, MIXED_HEAD: self.learner.mixture({**logits, **found})}

    @torch.no_grad()
    def heads(self, images: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits [B, C] of all heads; the learner must be in evaluation mode.

        The arguments are those of `forward`.
        """
        return self.report(images, features)["heads"]

    @torch.no_grad()
    def report(self, images: Tensor | None, features: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
        """Return `heads`, `values` (alpha, weight, trust, [B, 1]) and `features` (see ImageFeatures); see `forward`."""
        found = self.image_features(images, features)
        outputs = self._outputs(found)
        return {
            "heads": {head: outputs[head] for head in ALL_HEADS if head in outputs},
            "values": {name: outputs[name] for name in ("alpha", "weight", "trust") if name in outputs},
            "features": found.by_branch(),
        }

    def losses(
        self,
        outputs: Mapping[str, Tensor],
        labels: Tensor,
        class_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> dict[str, Tensor]:
        """Return the named losses, each times its weight; their sum is to be minimized.

        A loss that is switched off is absent.

        Args:
            outputs: what `forward` returns.
            labels: [B].
            class_loss: the cross-entropy of logits and labels, or what stands in its place.
        """
        terms = {}
        for name, weight in self.loss_weights.items():
            kind, _, branch = name.partition("_")
            if kind == "ce":
                value = class_loss(outputs[branch], labels)
            elif kind == "l1":
                value = mean_abs_difference(outputs[branch], outputs["clip"])
            else:
                value = skd_loss(
                    outputs["final"], outputs["clip"], temperature=self.temperature, smoothing=self.smoothing
                )
            terms[name] = weight * value
        return terms

    def train(self, mode: bool = True) -> DLRCLIPNetwork:
        """Set the learner's mode; the frozen CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self
