"""Training images of the adapters: seed and epoch alone decide batches and augmentations, in any number of processes.

Legend: B images of a step in all processes together, G global and L local crops, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from dassl.data import DatasetWrapper

from ..features import SeededViews
from ..features.loaders import workers_like


def process_rank() -> tuple[int, int]:
    """Return this process's number and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_of_processes(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of each value over the processes, which have equal parts of a batch."""
    world = process_rank()[1]
    if world == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return dict(zip(values, (total / world).tolist(), strict=True))


class EpochBatches:
    """The batches of an epoch, one per step: each lists this process's share, as rows of `SeededViews`.

    The order of the images follows from seed and epoch. Epoch e reads view e of each image. The last, smaller batch of
    an epoch is left out unless it is the only one.

    Args:
        n: number of images. batch_size: B. seed: 0 or more.

    Raises:
        ValueError: B cannot be shared out evenly among the processes.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.rank, self.world = process_rank()
        size = min(n, batch_size)
        self.size = size - size % self.world if size < batch_size else size
        if self.size % self.world or not self.size:
            raise ValueError(
                f"Expected DATALOADER.TRAIN_X.BATCH_SIZE, of all processes together, to be a multiple of their number "
                f"({self.world}) but got {batch_size}"
            )
        self.n, self.seed, self.epoch = n, seed, 0
        self._skipped = 0

    def __len__(self) -> int:
        return self.n // self.size

    def skip(self, count: int) -> None:
        """Leave out the first `count` batches of the next pass, which a resumed run has seen."""
        self._skipped = count

    def __iter__(self) -> Iterator[list[int]]:
        skipped, self._skipped = self._skipped, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.n, generator=generator) + self.epoch * self.n
        for batch in order[: len(self) * self.size].view(len(self), self.size)[skipped:]:
            yield batch[self.rank :: self.world].tolist()


class MultiCrop:
    """Transform of a PIL image to G global crops [G, 3, S, S] and L local ones [L, 3, S, S].

    Local crops are enlarged to S: the towers' position embeddings are for that size, and CLIP has seen no other. (The
    source of DINO gives smaller images to its own networks, which costs less.)

    Args:
        size: (S, S).
        local: L.
        global_scale, local_scale: range of a crop's share of the image's area.
        switches: which of random_flip, colorjitter, randomgrayscale, gaussian_blur, solarize, normalize are on; their
            strengths and probabilities are DINO's.
        mean, std: mean and deviation that crops are normalized with.
    """

    def __init__(
        self,
        size: tuple[int, int],
        local: int,
        global_scale: tuple[float, float],
        local_scale: tuple[float, float],
        switches: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.local = local

        def crop(scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
            steps: list[Any] = [v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC)]
            if "random_flip" in switches:
                steps.append(v2.RandomHorizontalFlip())
            if "colorjitter" in switches:
                steps.append(v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8))
            if "randomgrayscale" in switches:
                steps.append(v2.RandomGrayscale(0.2))
            if "gaussian_blur" in switches:
                kernel = max(3, size[0] // 10 // 2 * 2 + 1)
                steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur))
            if "solarize" in switches and solarize > 0:
                steps.append(v2.RandomSolarize(128, p=solarize))
            steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
            if "normalize" in switches:
                steps.append(v2.Normalize(list(mean), list(std)))
            return v2.Compose(steps)

        self.globals = (crop(global_scale, 1.0, 0.0), crop(global_scale, 0.1, 0.2))
        self.locals = crop(local_scale, 0.5, 0.0)

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        big = torch.stack([crop(image) for crop in self.globals])
        small = [self.locals(image) for _ in range(self.local)]
        return big, torch.stack(small) if small else big[:0]


def training_loader(cfg: Any, items: Sequence[Any], transform: Any, seed: int, epochs: int, like: Any) -> Any:
    """Return a loader of this process's share of the batches; its `batch_sampler` is an `EpochBatches`.

    Args:
        cfg: the configuration; BATCH_SIZE counts the images of all processes together.
        items: the training images.
        transform: what makes a view of an image.
        seed: 0 or more.
        epochs: number of views of each image.
        like: a loader of the toolbox; the new one gets as many reader processes, which start in the same way.
    """
    readers = workers_like(like)
    views = SeededViews(DatasetWrapper(cfg, items, transform=transform), epochs, seed)
    return torch.utils.data.DataLoader(
        views,
        batch_sampler=EpochBatches(len(items), cfg.DATALOADER.TRAIN_X.BATCH_SIZE, seed),
        num_workers=readers["num_workers"],
        worker_init_fn=readers["worker_init_fn"],
        persistent_workers=readers["num_workers"] > 0,
    )
