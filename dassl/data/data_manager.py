"""Build the loaders of a run from its config."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dassl.config import CfgNode
from dassl.upstream_names import upstream_name
from dassl.utils import InputError, distributed, read_image
from dassl.utils.logger import DETAIL

from .bad_images import skip_bad_images
from .datasets import DatasetBase, Datum, build_dataset
from .decoded_images import DecodedImages
from .label_noise import add_noise, read_noise
from .loaders import RunLoader
from .samplers import PlannedSampler, build_sampler
from .sharding import SharedBatches
from .transforms import INTERPOLATION_MODES, build_transform, least_side, to_float_tensor

logger = logging.getLogger(__name__)

__all__ = [
    "DataManager",
    "DatasetWrapper",
    "build_data_loader",
    "data_digest",
    "dataset_of",
    "seed_worker",
    "usable_workers",
]

Transform = Callable[[Any], Any]


def seed_worker(worker_id: int) -> None:
    """Seed Python's and NumPy's generators in a loader's worker process from torch's, which the loader has seeded.

    From then on, signals to the process group do not reach the worker.
    """
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
    # A signal to the whole group (Ctrl-C) is for the run's own process, which still needs a batch to finish its step.
    with contextlib.suppress(OSError, AttributeError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def usable_workers(requested: int) -> int:
    """Limit ``requested`` workers to this process's share of the usable CPUs; more would only take turns."""
    if requested < 0:
        raise InputError(f"Expected DATALOADER.NUM_WORKERS to be 0 or more but got {requested}")
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        available = os.cpu_count() or 1
    return min(requested, max(1, available // distributed.local_world_size()))


def build_data_loader(
    cfg: CfgNode,
    sampler_type: str = "SequentialSampler",
    data_source: Sequence[Datum] | None = None,
    batch_size: int = 64,
    n_domain: int = 0,
    n_ins: int = 2,
    tfm: Transform | Sequence[Transform] | None = None,
    is_train: bool = True,
    dataset_wrapper: Callable[..., Dataset[Any]] | None = None,
    seed: int | None = None,
    drop_last: bool = True,
) -> RunLoader:
    """Build a loader over ``data_source``.

    A training loader's augmentations depend on seed, epoch and position alone. In a job of several processes, a
    training loader gives each process its part of every batch (see sharding.py); all other loaders give each process
    everything.

    Args:
        cfg: the run's config.
        sampler_type, data_source, batch_size, n_domain, n_ins: as for ``build_sampler``; the whole job's batches.
        tfm: transform, or a list of them (then items hold img, img2, ...).
        is_train: whether the loader is for training, see also ``drop_last``.
        dataset_wrapper: class to use instead of DatasetWrapper.
        seed: seed of the loader's own generators, one that orders the items and one that seeds the workers; None: a
            seed drawn from torch's default generator. Other random draws of the program change neither.
        drop_last: drop the last, smaller batch of a pass in training, provided there is a full one.
    """
    if batch_size < 1:
        raise InputError(f"Expected the batch size to be at least 1 but got {batch_size}")
    if not data_source:
        raise InputError("Expected data for a loader but got none")
    generator = torch.Generator()
    generator.manual_seed(int(torch.randint(2**62, (1,))) if seed is None else seed)
    sampler = build_sampler(sampler_type, cfg, data_source, batch_size, n_domain, n_ins, generator)
    wrapper = DatasetWrapper if dataset_wrapper is None else dataset_wrapper
    dataset = wrapper(cfg, data_source, transform=tfm, is_train=is_train)
    drop_last = drop_last and is_train and len(data_source) >= batch_size
    shared = None
    if is_train:
        shared = SharedBatches(sampler, batch_size, drop_last, generator)
        # The workers have a generator of their own: they are seeded once, whichever epoch a run begins with.
        generator = torch.Generator().manual_seed(generator.initial_seed())
    workers = usable_workers(cfg.DATALOADER.NUM_WORKERS)
    loader = RunLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        shared_batches=shared,
        num_workers=workers,
        pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
        generator=generator,
        worker_init_fn=seed_worker,
        persistent_workers=workers > 0,  # starting a process costs seconds, and would be paid every epoch
    )
    if len(loader) == 0:
        raise InputError(f"Expected at least one batch of {batch_size} from {sampler_type} but got none")
    return loader


def dataset_of(dm: Any) -> DatasetBase | None:
    """Return a data manager's dataset; None: the manager is not ours and has no dataset."""
    return getattr(dm, "dataset", None)


def data_digest(dm: Any) -> str:
    """Return the digest of the images and labels of a data manager, ours or another's; "": not known."""
    dataset = dataset_of(dm)
    return "" if dataset is None else dataset.data_digest


class DataManager:
    """Dataset, transforms and loaders of a run.

    Args:
        cfg: the run's config.
        custom_tfm_train: transform to use in training instead of the config's.
        custom_tfm_test: the same for validation and test.
        dataset_wrapper: class to use instead of DatasetWrapper.
        drop_last: see ``build_data_loader``.
        dataset: the dataset; None: the one that the config names.
    """

    def __init__(
        self,
        cfg: CfgNode,
        custom_tfm_train: Transform | Sequence[Transform] | None = None,
        custom_tfm_test: Transform | None = None,
        dataset_wrapper: Callable[..., Dataset[Any]] | None = None,
        drop_last: bool = True,
        dataset: DatasetBase | None = None,
    ) -> None:
        read_noise(cfg)  # what is wrong with these keys is said before the dataset is read
        # One seed per loader, or labeled and unlabeled batches would come in the same order.
        self._seed = cfg.SEED if cfg.SEED >= 0 else int(torch.randint(2**31, (1,)))
        dataset = build_dataset(cfg) if dataset is None else dataset
        # the skipped images: path -> reason
        self.bad_images = skip_bad_images(dataset) if cfg.DATALOADER.SKIP_BAD_IMAGES else {}
        self.noise = add_noise(cfg, dataset, self._seed)  # training images made wrong on purpose; None: none
        tfm_train = build_transform(cfg, is_train=True) if custom_tfm_train is None else custom_tfm_train
        tfm_test = build_transform(cfg, is_train=False) if custom_tfm_test is None else custom_tfm_test
        requested, workers = cfg.DATALOADER.NUM_WORKERS, usable_workers(cfg.DATALOADER.NUM_WORKERS)
        if workers < requested:
            logger.info("DATALOADER.NUM_WORKERS: %d asked for, %d used (the number of CPUs)", requested, workers)

        def loader(items: list[Datum], node: CfgNode, is_train: bool, which: int) -> RunLoader:
            return build_data_loader(
                cfg,
                sampler_type=node.SAMPLER,
                data_source=items,
                batch_size=node.BATCH_SIZE,
                n_domain=node.get("N_DOMAIN", 0),
                n_ins=node.get("N_INS", 0),
                tfm=tfm_train if is_train else tfm_test,
                is_train=is_train,
                dataset_wrapper=dataset_wrapper,
                seed=self._loader_seed(which, 0),
                drop_last=drop_last,
            )

        loaders = cfg.DATALOADER
        self._loader_x = lambda items: loader(items, loaders.TRAIN_X, True, 0)
        node_u = loaders.TRAIN_X if loaders.TRAIN_U.SAME_AS_X else loaders.TRAIN_U
        if not dataset.test:
            raise InputError(f"Expected the dataset {cfg.DATASET.NAME} to have test items but got none")
        self._dataset = dataset
        self.train_loader_x = self._loader_x(dataset.train_x)
        self.train_loader_u = loader(dataset.train_u, node_u, True, 1) if dataset.train_u else None
        self.val_loader = loader(dataset.val, loaders.TEST, False, 2) if dataset.val else None
        self.test_loader = loader(dataset.test, loaders.TEST, False, 3)
        self._num_classes = dataset.num_classes
        self._num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self._lab2cname = dataset.lab2cname
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    @property
    def dataset(self) -> DatasetBase:
        """The dataset."""
        return self._dataset

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return self._num_classes

    @property
    def num_source_domains(self) -> int:
        """Number of source domains in the config."""
        return self._num_source_domains

    @property
    def lab2cname(self) -> dict[int, str]:
        """Label to class name."""
        return self._lab2cname

    def keep_training(self, kept: Sequence[tuple[int, int]]) -> None:
        """Keep these training items only, with these labels, and make their loader anew; all processes follow rank 0.

        Args:
            kept: the position of each item in `train_x`, and the label that it has from now on.
        """
        items, names = self._dataset.train_x, self._lab2cname
        chosen = distributed.broadcast_object(list(kept))
        self._dataset.replace_training(
            [Datum(items[row].impath, label, items[row].domain, names[label]) for row, label in chosen]
        )
        self.train_loader_x = self._loader_x(self._dataset.train_x)

    def _loader_seed(self, which: int, epoch: int) -> int:
        return (self._seed * 4 + which) * 1_000_003 + epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the order of the training items a function of the seed and ``epoch`` (0-based).

        Called before each epoch, it lets a resumed run see the batches that the uninterrupted one would have seen.
        """
        for which, loader in enumerate((self.train_loader_x, self.train_loader_u)):
            batches: Any = None if loader is None else loader.shared_batches
            if batches is None:
                continue
            batches.generator.manual_seed(self._loader_seed(which, epoch))
            sampler = batches.sampler
            if isinstance(sampler, PlannedSampler):
                sampler.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the seed (drawn, in an unseeded run) and the digest of the data, for a run that resumes this one."""
        return {"seed": self._seed, "digest": data_digest(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the seed in ``state``; the digest in it has been compared before (``check_data``)."""
        self._seed = state["seed"]

    def show_dataset_summary(self, cfg: CfgNode) -> None:
        """Log the dataset's sizes, as a line and as upstream's table."""
        dataset = self._dataset
        rows = [["Dataset", cfg.DATASET.NAME]]
        parts = (("training", "train_x"), ("unlabeled", "train_u"), ("validation", "val"), ("test", "test"))
        counts = [f"{len(items):,} {word}" for word, name in parts if (items := getattr(dataset, name))]
        logger.info(
            "%s: %s classes; images: %s",
            dataset.shown_name or cfg.DATASET.NAME,
            f"{self.num_classes:,}",
            ", ".join(counts),
        )
        if cfg.DATASET.SOURCE_DOMAINS:
            rows.append(["Source", str(cfg.DATASET.SOURCE_DOMAINS)])
        if cfg.DATASET.TARGET_DOMAINS:
            rows.append(["Target", str(cfg.DATASET.TARGET_DOMAINS)])
        rows.append(["# classes", f"{self.num_classes:,}"])
        for name in ("train_x", "train_u", "val", "test"):
            items = getattr(dataset, name)
            if items:
                rows.append([f"# {name}", f"{len(items):,}"])
        # Numbers stay as written: tabulate would otherwise parse the thousands separators away.
        logger.info("%s", tabulate(rows, disable_numparse=True), extra=DETAIL)


class DatasetWrapper(Dataset[dict[str, Any]]):
    """Items as dicts: ``label``, ``domain`` (int), ``impath`` (str), ``index`` (int), ``img``.

    ``img`` is the transformed image (a list of K versions when K_TRANSFORMS = K > 1, in training only), or the PIL
    image when there is no transform; a list of transforms gives img, img2, img3, ...; RETURN_IMG0 adds ``img0``, the
    image resized and not augmented.

    Args:
        cfg: the run's config.
        data_source: the items.
        transform: a transform or a list of them.
        is_train: whether K_TRANSFORMS and CACHE_IMAGES count, and what INPUT.DECODE leaves of a JPEG file.
    """

    def __init__(
        self,
        cfg: CfgNode,
        data_source: Sequence[Datum],
        transform: Transform | Sequence[Transform] | None = None,
        is_train: bool = False,
    ) -> None:
        self.cfg = cfg
        self.data_source = data_source
        self.transform = transform
        self.is_train = is_train
        self.k_tfm = cfg.DATALOADER.K_TRANSFORMS if is_train else 1
        self.return_img0 = cfg.DATALOADER.RETURN_IMG0
        megabytes = cfg.DATALOADER.CACHE_IMAGES
        if megabytes < 0:
            raise InputError(f"Expected DATALOADER.CACHE_IMAGES to be 0 or more but got {megabytes}")
        self.least = least_side(cfg, is_train)
        kept = DecodedImages(megabytes * 2**20, self.least) if is_train and megabytes else None
        plain = functools.partial(read_image, least=self.least) if self.least else read_image
        self._read = plain if kept is None else kept.read
        if self.k_tfm > 1 and transform is None:
            raise InputError(f"Expected a transform to make {self.k_tfm} versions of each image but got none")
        steps: list[Any] = [
            v2.Resize(tuple(cfg.INPUT.SIZE), interpolation=INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION]),
            *to_float_tensor(),
        ]
        if "normalize" in cfg.INPUT.TRANSFORMS:
            steps.append(v2.Normalize(mean=list(cfg.INPUT.PIXEL_MEAN), std=list(cfg.INPUT.PIXEL_STD)))
        self.to_tensor = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        item = self.data_source[idx]
        image = self._read(item.impath)
        output: dict[str, Any] = {
            "label": item.label,
            "domain": item.domain,
            "impath": item.impath,
            "index": idx,
        }
        if self.transform is None:
            output["img"] = image
        elif isinstance(self.transform, (list, tuple)):
            for number, transform in enumerate(self.transform, start=1):
                output["img" if number == 1 else f"img{number}"] = self._apply(transform, image)
        else:
            output["img"] = self._apply(self.transform, image)  # type: ignore[arg-type]
        if self.return_img0:
            output["img0"] = self.to_tensor(image)
        return output

    def _apply(self, transform: Transform, image: Any) -> Any:
        versions = [transform(image) for _ in range(self.k_tfm)]
        return versions[0] if len(versions) == 1 else versions


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)
