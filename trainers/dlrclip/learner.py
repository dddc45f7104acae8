"""The learner of DLR-CLIP, which is trained and saved: CMA, GLR, the fusion gate, and their training class list.

Legend: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import Learner, unpack_record
from ..clip import CLIP
from ..features import read_blocks
from ..modules.cross_modal_adapter import CrossModalAdapter
from .config import PROTO_PATCH_HEAD, DLRCLIPConfig
from .glr import FusionGate, GateLogitRefiner
from .mixture import Mixture
from .prototypes import PatchPrototypes, Prototypes
from .robust import RobustMixture
from .shared import SharedFusion, SharedRefiner

# The running mean of w is the plain mean until it has seen 1 / MOMENTUM steps; then it forgets with this momentum.
MOMENTUM = 0.1


class DLRCLIPLearner(Learner):
    """The module that is trained and saved: CMA, GLR, the fusion gate, and a record of what they were trained on.

    A checkpoint describes itself: beside the weights, its state holds the training class list and `facts` about the
    frozen CLIP. Loading a checkpoint gives the layers of size C (dense mode) the size of its class list.

    Args:
        clip: the frozen CLIP; the checkpoint keeps its name and digest.
        classnames: the training class list.
        settings: see DLRCLIPConfig.
        cma: the adapter, or None where CMA is off.
    """

    UNSAID = {"glr_mode": "dense"}  # the first checkpoints do not name the mode: dense was the only one

    weight_mean: Tensor  # running mean of w over training
    weight_steps: Tensor  # number of steps that the mean has seen
    beta: Tensor  # chosen fusion coefficient; nan: not chosen
    beta_n: Tensor  # number of validation images that beta was chosen on; 0: on none

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], settings: DLRCLIPConfig, cma: CrossModalAdapter | None
    ) -> None:
        facts: dict[str, Any] = {"backbone": clip.name, "weights_digest": clip.weights_digest}
        if cma is not None:
            facts["context"] = settings.text_ctx_init.strip()
        super().__init__((), {**facts, "glr_mode": settings.glr_mode})
        self.settings = settings
        self.cma = cma
        self.robust = RobustMixture(clip.embed_dim) if settings.fusion == "robust" else None
        self.mixture = Mixture(settings.branches(), settings.mixture.ridge) if settings.mixes else None
        self.prototypes: Any = torch.nn.ModuleDict()  # head -> Prototypes
        self._width = clip.embed_dim
        self.patch_blocks = read_blocks(clip.visual) if settings.reads_patches else ()
        self._patch_widths = [clip.visual.widths[number] for number in self.patch_blocks]
        self.glr: GateLogitRefiner | SharedRefiner | None = None
        self.fusion: FusionGate | SharedFusion | None = None
        self.shared = settings.glr_mode == "shared"
        self.fixed_weight = settings.fixed_weight
        fixed = 0.5 if self.fixed_weight is None else float(self.fixed_weight)
        self.register_buffer("weight_mean", torch.tensor(fixed))
        self.register_buffer("weight_steps", torch.tensor(0))
        self.register_buffer("beta", torch.tensor(float("nan"), dtype=torch.float64))  # 0.54 stays 0.54
        self.register_buffer("beta_n", torch.tensor(0))
        self._size_for(classnames)

    def _size_for(self, classnames: Sequence[str]) -> None:
        """Make the class list the training class list; build the layers of size C anew where C changes."""
        old, self.classnames = len(self.classnames), list(classnames)
        if len(self.classnames) == old:
            return
        device, dense = self.beta.device, () if self.shared else (len(classnames),)
        settings = self.settings
        for head in settings.prototypes():
            if head == PROTO_PATCH_HEAD:
                classifier: Prototypes = PatchPrototypes(len(classnames), self._patch_widths)
            else:
                classifier = Prototypes(len(classnames), self._width)
            self.prototypes[head] = classifier.to(device)
        if self.shared and old:
            return
        if settings.glr:
            refiner: Any = SharedRefiner if self.shared else GateLogitRefiner
            dim = settings.shared_dim if self.shared else settings.glr_dim
            self.glr = refiner(*dense, dim=dim, res_scale=settings.res_scale, fixed_alpha=settings.fixed_alpha).to(
                device
            )
        if self.fixed_weight is None and settings.trains:
            gate: Any = SharedFusion if self.shared else FusionGate
            self.fusion = gate(*dense, hidden=settings.fusion_dim).to(device)

    def fusion_weight(self, cma_logits: Tensor) -> Tensor:
        """Return w [B, 1] for cma_logits [B, C], of the training classes unless the gate is a shared one."""
        if self.fusion is None:
            return cma_logits.new_full((len(cma_logits), 1), self.fixed_weight or 0.0)
        return self.fusion(cma_logits)

    def mean_weight(self) -> Tensor:
        """Return the mean learnt w (or the fixed one), []."""
        return self.weight_mean if self.fixed_weight is None else torch.full_like(self.weight_mean, self.fixed_weight)

    def coefficient(self) -> Tensor:
        """Return the chosen beta, or the mean learnt w while none is chosen, []."""
        return torch.where(torch.isnan(self.beta), self.mean_weight(), self.beta)

    @torch.no_grad()
    def observe(self, weight: Tensor) -> None:
        """Add one step's w [B, 1] to the running mean."""
        self.weight_steps += 1
        rate = torch.clamp(1.0 / self.weight_steps, min=MOMENTUM)
        self.weight_mean += rate * (weight.float().mean() - self.weight_mean)

    def set_extra_state(self, state: Tensor) -> None:
        """Adopt the checkpoint's class list, before the weights of the submodules are loaded."""
        self._size_for(unpack_record(state)["classnames"])

    def take(self, state: Mapping[str, Tensor], indices: Sequence[int] | None = None) -> None:
        """Load a checkpoint's state, with its class list; see Learner.

        Raises:
            ValueError: the state is not from DLR-CLIP, or was made with another CLIP, prompt or architecture.
        """
        if "_extra_state" not in state:
            raise ValueError("Expected a checkpoint of DLRCLIP but got something else")
        super().take(state, indices)

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Make the checkpoint's class list the training class list; all of the state serves it."""
        self._size_for(trained or ())
        if self.robust is not None and "robust.bank" in state:  # as many training images as the checkpoint's run had
            self.robust.bank = self.robust.bank.new_empty(len(state["robust.bank"]), *self.robust.bank.shape[1:])
        return state
