"""2SFS: first the LayerNorms of both encoders, then a linear classifier that starts from the adapted texts.

Farina et al., Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages, 2025. One recipe for all
datasets, without validation images. With f, t the features of the encoders whose LayerNorms have learnt gains and
biases, and s CLIP's scale:

    first stage     logits = s f T^T                         learns the gains and biases
    second stage    logits = s f normalize(W)^T, W = T       learns W; the encoders are fixed
    test            W's row for a class that was trained on, t for another class

Legend: B images, C classes, D width of a block, E width of the joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import Classifier, CountedTrainer, Learner, MethodConfig, ViewsTrainer, key, known_rows, precision
from .clip import CLIP, BlockEdit, fill_template
from .features import FrozenPart

NORMS = ("blocks", "all")


class OwnNorms(BlockEdit, nn.ModuleDict):
    """Gains and biases of an encoder's LayerNorms, by block and name: `3.ln_1.weight`, ...

    Args:
        norms: the LayerNorms by the number and name of BlockEdit's `norm`; they stay as they are.
    """

    def __init__(self, norms: Mapping[tuple[int, str], nn.LayerNorm]) -> None:
        super().__init__()
        self._at: dict[tuple[int, str], nn.ParameterDict] = {}
        for (number, which), norm in norms.items():
            own = nn.ParameterDict({name: nn.Parameter(p.detach().float().clone()) for name, p in named(norm)})
            block = self[str(number)] if str(number) in self else nn.ModuleDict()
            assert isinstance(block, nn.ModuleDict)
            block[which] = self._at[number, which] = own
            self[str(number)] = block

    def norm(self, number: int, which: str, norm: nn.LayerNorm) -> tuple[Tensor, Tensor] | None:
        """Return the learnt gain and bias of a LayerNorm; None: it keeps its own. See BlockEdit."""
        own = self._at.get((number, which))
        return None if own is None else (own["weight"], own["bias"])


def named(norm: nn.LayerNorm) -> list[tuple[str, Tensor]]:
    """Return gain and bias of a LayerNorm by their names; a bias that it does not have is zero."""
    return [("weight", norm.weight), ("bias", torch.zeros_like(norm.weight) if norm.bias is None else norm.bias)]


class TwoStageLearner(Learner):
    """The LayerNorms of both encoders, `visual` and `text`, and the classifier's weights, `classifier` [C, E].

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        every: whether the LayerNorms outside the blocks (ln_pre, ln_post, ln_final) are learnt, too.

    Attributes:
        known: which of the present classes have a row of the classifier, [C].
        mixed: whether some have none.

    Raises:
        ValueError: the image encoder is a ResNet.
    """

    known: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], every: bool) -> None:
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "second": False}
        super().__init__(classnames, facts)
        clip.visual.check_edits([OwnNorms({})], "TwoStageFS")

        def chosen(tower: Any) -> OwnNorms:
            return OwnNorms({at: norm for at, norm in tower.norms().items() if every or 1 <= at[0] <= tower.depth})

        self.visual, self.text = chosen(clip.visual), chosen(clip.text)
        self.classifier = nn.Parameter(torch.zeros(len(classnames), clip.embed_dim))
        self.mixed = self.second = False
        self.register_buffer("known", torch.ones(len(classnames), dtype=torch.bool), persistent=False)

    @property
    def second(self) -> bool:
        """Say whether the second stage has begun, so that the classifier counts."""
        return bool(self.facts["second"])

    @second.setter
    def second(self, value: bool) -> None:
        self.facts["second"] = value
        self.visual.requires_grad_(not value)
        self.text.requires_grad_(not value)
        self.classifier.requires_grad_(value)

    def resting(self) -> int:
        """Return the number of parameters that the present stage leaves alone."""
        return sum(p.numel() for p in self.parameters() if not p.requires_grad)

    def know(self, known: Sequence[bool]) -> None:
        """Say which of the present classes have a row of the classifier."""
        self.known.copy_(torch.tensor(known))
        self.mixed = not all(known)

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over a checkpoint's stage."""
        self.second = bool(facts.get("second", self.second))

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state` with the classifier's rows of the present classes, zeros for those not trained on."""
        self.know([True] * len(self.classnames))
        if trained is None or state["classifier"].shape[:1] != (len(trained),):
            return state
        rows = known_rows(self.classnames, trained, indices)
        self.know([row is not None for row in rows])
        weights = torch.cat([state["classifier"], state["classifier"].new_zeros(1, state["classifier"].shape[1])])
        return {**state, "classifier": weights[[len(trained) if row is None else row for row in rows]]}


class TwoStageClassifier(Classifier):
    """CLIP with LayerNorms of its own and, in the second stage, a linear classifier.

    Args:
        clip, classnames, learner: see Classifier.
        templates: those of the zero-shot reference; the first is the prompt that is trained with.
        every: see TwoStageLearner.
    """

    learner: TwoStageLearner
    first_adapted = 1

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], learner: TwoStageLearner, every: bool
    ) -> None:
        super().__init__(clip, classnames, templates, learner)
        self.every = every
        self._tokens = clip.text.tokenise([fill_template(templates[0], name) for name in classnames])

    @torch.no_grad()
    def frozen_part(self, images: Tensor) -> FrozenPart:
        """Return what enters the first block; where ln_pre is learnt, the images themselves."""
        return FrozenPart(hidden=images) if self.every else super().frozen_part(images)

    def encode(self, part: FrozenPart) -> Tensor:
        """Encode images with the learnt LayerNorms: features [B, E], not normalized, fp32.

        In the second stage nothing here has gradients, and `part` may hold these features.
        """
        if part.features is not None:
            return part.features
        assert part.hidden is not None
        visual, edits = self.clip.visual, [self.learner.visual]
        hidden = visual.prefix(part.hidden, 0, edits) if self.every else part.hidden
        return visual.suffix(hidden, 1, edits).float()

    def adapted_texts(self) -> Tensor:
        """Return the texts' features from the encoder with the learnt LayerNorms, [C, E], normalized, fp32."""
        text = self.clip.text
        return F.normalize(text.suffix(text.prefix(self._tokens, 0), 1, [self.learner.text]).float(), dim=-1)

    def compute_text(self) -> Tensor:
        """Return what images are compared with, [C, E], normalized, fp32: texts or rows of the classifier."""
        learner = self.learner
        if not learner.second:
            return self.adapted_texts()
        rows = F.normalize(learner.classifier, dim=-1)
        return torch.where(learner.known[:, None], rows, self.adapted_texts()) if learner.mixed else rows

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for the frozen part of images, or for their features."""
        return self.logits(self.encode(part), self.text_features())

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return zero-shot logits and the method's, [B, C] each; see Classifier."""
        if not self.every:
            return super().both(images)
        return self.logits(self.clip.encode_image(images), self.zeroshot), self.classify(self.frozen_part(images))

    @torch.no_grad()
    def begin_second(self) -> None:
        """Begin the second stage: the classifier starts from the adapted texts."""
        self.learner.classifier.copy_(self.adapted_texts())
        self.learner.know([True] * len(self.classnames))
        self.learner.second = True


@dataclass(frozen=True)
class TwoStageConfig(MethodConfig):
    """Settings of 2SFS; defaults as published."""

    n_iters: int = key(300, "steps per shot (DATASET.NUM_SHOTS), in place of OPTIM.MAX_EPOCH, which 0 keeps", low=0)
    first_share: float = key(0.6, "share of the first stage in the steps", low=0, high=1)
    norms: str = key(
        "blocks",
        "which LayerNorms are learnt: the two of every block (blocks), or also ln_pre, ln_post and ln_final (all)",
        choices=NORMS,
        source="blocks, by what its code does",
    )
    lr_min: float = key(1e-6, "rate at which the cosine of each stage ends", low=0, high=1)
    prec: str = precision("amp", "LayerNorms and classifier are in fp32")


@TRAINER_REGISTRY.register()
class TwoStageFS(CountedTrainer):
    """Two stages: LayerNorms, then a linear classifier. One optimizer serves both.

    AdamW passes over what has no gradient, and counts the steps of each tensor by itself. So each stage is as if it had
    an optimizer of its own.
    """

    node_name = "TWOSTAGEFS"
    paper = "Farina et al. 2025"
    learns = "LayerNorms of both encoders, then a linear classifier"
    config = TwoStageConfig
    main_head = "twostagefs"
    needs_transformer = "which learns the LayerNorms of both encoders"
    network: TwoStageClassifier

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> TwoStageClassifier:
        """Build CLIP with LayerNorms of its own and a classifier."""
        every = self.settings.norms == "all"
        learner = TwoStageLearner(clip, classnames, every)
        self.fitted_parameters = learner.resting()  # reported beside those of the present stage
        return TwoStageClassifier(clip, classnames, templates, learner, every)

    def split(self, count: int) -> tuple[int, ...]:
        """Return the shares of both stages in a number of steps, or of epochs."""
        first = int(count * self.settings.first_share)
        return first, count - first

    def build_schedule(self, optim: Any) -> Any:
        """Build the schedule per step, a cosine that starts anew with the second stage, and settle the steps.

        Another schedule than a cosine without warm-up goes once through both stages.
        """
        self.count_stages()
        if self.cfg.OPTIM.LR_SCHEDULER != "cosine" or self.cfg.OPTIM.WARMUP_EPOCH > 0:
            return super().build_schedule(optim)
        first, second = self.stages
        lowest, highest = self.settings.lr_min, optim.defaults["lr"]

        def rate(step: int) -> float:
            at, length = (step, first) if step < first else (step - first, second)
            return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(1, at / max(1, length)))) / 2

        return torch.optim.lr_scheduler.LambdaLR(optim, lambda step: rate(step) / highest)

    def before_epoch(self) -> None:
        """Begin the second stage with its first epoch; kept views are then kept as features."""
        super().before_epoch()
        second = self.place()[0] == 1
        if second and not self.network.learner.second:
            with self._autocast():
                self.network.begin_second()
            if self._views is not None:
                self._views.close()
        self.network.learner.second = second
        self.fitted_parameters = self.network.learner.resting()

    def _frozen_part(self, images: Tensor) -> FrozenPart:
        part = ViewsTrainer._frozen_part(self, images)
        if not self.network.learner.second:
            return part
        with self._autocast(), torch.no_grad():
            return FrozenPart(features=self.network.encode(part))
