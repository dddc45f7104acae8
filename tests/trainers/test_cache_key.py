"""Features from the cache on disk are those that a run would compute; where anything differs, there are none."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.data import DatasetWrapper, data_manager
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.data.transforms import build_transform
from trainers.features.cache import FeatureCache
from trainers.features.cache_key import feature_slot, images_digest


@pytest.fixture
def files(tmp_path):
    """Eight small images of two classes."""
    items = []
    for number in range(8):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        noise = torch.randint(256, (40, 48, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
        items.append(Datum(str(path), number % 2, 0, ["cat", "dog"][number % 2]))
    return items


@pytest.fixture
def make_cfg(files, tmp_path, random_tiny, monkeypatch):
    class Files(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=files[:4], val=files[4:6], test=files[5:])

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Files", Files)

    def make(name, *pairs):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_list(["TRAINER.NAME", name, "OUTPUT_DIR", str(tmp_path / "run"), "DATASET.NAME", "Files"])
        cfg.merge_from_list(["MODEL.BACKBONE.NAME", "tiny", "MODEL.BACKBONE.WEIGHTS", str(random_tiny), "SEED", 1])
        cfg.merge_from_list(["INPUT.SIZE", (64, 64), "INPUT.TRANSFORMS", ("random_resized_crop", "normalize")])
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "DATALOADER.TEST.BATCH_SIZE", 2, "USE_CUDA", False])
        cfg.merge_from_list(["FEATURE_CACHE.DIR", str(tmp_path / "features"), "VERBOSE", False])
        if "VIEWS" in cfg.TRAINER[name.upper()]:
            cfg.TRAINER[name.upper()].VIEWS = 2
        cfg.merge_from_list(["DATASET.TEMPLATE", "a photo of a {}.", *pairs])
        return cfg

    return make


@pytest.fixture
def entries(tmp_path):
    return lambda: FeatureCache(tmp_path / "features", 0).entries()


def encodings(trainer):
    """Numbers of images in the batches that the trainer's CLIP encodes from now on."""
    seen, encode = [], trainer.network.clip.encode_image
    trainer.network.clip.encode_image = lambda images: seen.append(len(images)) or encode(images)
    return seen


def everything(trainer):
    """Features of all images, twice over as batches."""
    passes = [[batch["feature"] for batch in trainer.test_loader] for _ in range(2)]
    sets = [trainer.train_features.all(), trainer.val_loader.all(), trainer.test_loader.all()]
    return sets, passes


def assert_same(first, second):
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(a.labels, b.labels) and list(a.paths) == list(b.paths)
    for a, b in zip(first[1], second[1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_second_run_encodes_nothing_and_has_the_same_bits(make, entries):
    trainer = make("TipAdapter", "FEATURE_CACHE.USE", False)
    seen = encodings(trainer)
    plain = everything(trainer)
    assert seen == [2, 1, 2, 2, 2, 2, 2] and entries() == []
    first = make("TipAdapter")
    seen = encodings(first)
    assert_same(everything(first), plain)
    assert sum(seen) == 13
    assert sorted(entry.about["split"] for entry in entries()) == ["test", "train", "val"]
    second = make("TipAdapter")
    seen = encodings(second)
    assert_same(everything(second), plain)
    assert seen == []


def run_at_once(make, barrier, path):
    """A whole process of its own: features of all images, as it computes or finds them."""
    torch.set_num_threads(1)
    trainer = make("TipAdapter")
    seen = encodings(trainer)
    barrier.wait()
    sets, _ = everything(trainer)
    torch.save(([known.values for known in sets], sum(seen)), path)


def test_two_runs_at_once(make, entries, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    runs = [context.Process(target=run_at_once, args=(make, barrier, path)) for path in paths]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    (first, some), (second, others) = (torch.load(path) for path in paths)
    assert some + others >= 13  # 26 where neither was ahead
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    cache = FeatureCache(tmp_path / "features", 0)
    kept = {entry.about["split"]: cache.load(entry.facts) for entry in entries()}
    kept["train"] = torch.nn.functional.normalize(kept["train"], dim=-1)  # views of training images keep their lengths
    assert all(torch.equal(kept[split], a) for split, a in zip(("train", "val", "test"), first, strict=True))


def test_trainers_share_features(make, entries):
    everything(make("TipAdapter"))
    other = make("CLIPAdapter", "DATALOADER.TRAIN_X.BATCH_SIZE", 3)
    seen = encodings(other)
    everything(other)
    assert seen == [] and len(entries()) == 3
    transductive = make("EMDirichlet")
    seen = encodings(transductive)
    (batch,) = transductive.test_loader
    assert seen == [] and len(batch["feature"]) == 3


def test_labels_are_the_present_dataset_s(make, files):
    make("TipAdapter").test_loader.all()
    trainer = make("TipAdapter")
    seen = encodings(trainer)
    for item in files:
        item._label = 1 - item.label
    (known, labels) = trainer.test_loader.all(), [item.label for item in files[5:]]
    assert seen == [] and known.labels.tolist() == labels == [0, 1, 0]


@pytest.mark.parametrize(
    "pairs",
    [
        ("DATALOADER.TEST.BATCH_SIZE", 3),
        ("TRAINER.TIPADAPTER.PREC", "bf16"),
        ("TRAINER.TIPADAPTER.PREC", "amp"),
        ("INPUT.PIXEL_MEAN", [0.5, 0.5, 0.5]),
        ("INPUT.INTERPOLATION", "bicubic"),
        ("INPUT.DECODE", "reduced"),
    ],
    ids=str,
)
def test_other_settings_miss(make, entries, pairs):
    everything(make("TipAdapter"))
    trainer = make("TipAdapter", *pairs)
    seen = encodings(trainer)
    everything(trainer)
    assert sum(seen) == 13 and len(entries()) == 6


@pytest.mark.parametrize("pairs", [("SEED", 2), ("TRAINER.TIPADAPTER.VIEWS", 3), ("INPUT.RRCROP_SCALE", (0.5, 1.0))])
def test_other_views_miss_and_the_rest_is_found(make, entries, pairs):
    everything(make("TipAdapter"))
    trainer = make("TipAdapter", *pairs)
    seen = encodings(trainer)
    everything(trainer)
    assert sum(seen) == 4 * trainer.views and len(entries()) == 4


def test_other_weights_miss(make, tmp_path, random_tiny):
    everything(make("TipAdapter"))
    folder = tmp_path / "other"
    shutil.copytree(random_tiny, folder)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    state["visual.proj"][0, 0] += 1e-3
    save_file(state, file)
    trainer = make("TipAdapter", "MODEL.BACKBONE.WEIGHTS", str(folder))
    seen = encodings(trainer)
    everything(trainer)
    assert sum(seen) == 13


def test_features_before_the_projection_are_other_features(make, entries):
    """Even where they are as wide, features are never taken for those of another kind."""
    first, other = make("RLA"), make("ProLIP")
    everything(first)
    for trainer in (first, other):
        trainer.network.clip.visual.pooled_dim = 32
        assert trainer.network.encode.width == 32
    a, b = (trainer.test_loader.slot.facts for trainer in (first, other))
    assert {name for name in {*a, *b} if a.get(name) != b.get(name)} == {"raw", "before_projection"}
    assert other.test_loader.slot.load() is None
    trainer, seen = make("ProLIP"), []
    pool = trainer.network.clip.pool_image
    trainer.network.clip.pool_image = lambda images: seen.append(len(images)) or pool(images)
    plain = everything(trainer)
    assert sum(seen) == 13 and len(entries()) == 6
    again = make("ProLIP")
    again.network.clip.pool_image = None  # nothing is encoded
    assert_same(everything(again), plain)
    assert first.test_loader.all().values.shape[-1] == 32 and again.test_loader.all().values.shape[-1] == 64


def test_an_image_that_changed_behind_the_same_size_and_date_misses(make, files):
    path = files[7].impath
    Image.open(path).save(path, format="BMP")  # the size of a bitmap depends on its shape only
    everything(make("TipAdapter"))
    before = os.stat(path)
    ImageOps.invert(Image.open(path)).save(path, format="BMP")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    trainer = make("TipAdapter")
    seen = encodings(trainer)
    known = trainer.test_loader.all()
    assert seen == [2, 1]
    batch = next(iter(DataLoader(trainer.test_loader.dataset, batch_size=2, sampler=[1, 2])))
    torch.testing.assert_close(known.values[0, 1:], trainer.network.encode(batch["img"]))


def test_digest_of_images(files, tmp_path):
    paths = [item.impath for item in files]
    first = images_digest(paths)
    assert images_digest(paths) == first
    assert first not in {images_digest(paths[::-1]), images_digest(paths[:-1]), images_digest([])}
    assert images_digest([*paths, str(tmp_path / "missing.png")]) is None


def test_other_code_or_number_of_threads_is_another_entry(make, monkeypatch, tmp_path):
    def facts():
        return make("TipAdapter").test_loader.slot.facts

    first = facts()
    assert facts() == first
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert facts()["device"] != first["device"]
    copy = tmp_path / "data_manager.py"
    copy.write_text(Path(data_manager.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(data_manager, "__file__", str(copy))
    assert facts()["code"] != first["code"]


class Odd:
    """A transform that says nothing about itself."""

    def __call__(self, image):
        return torch.zeros(3, 64, 64)


def test_what_cannot_be_told_apart_is_not_cached(make, make_cfg, entries):
    trainer = make("TipAdapter")
    cfg, items, encode = trainer.cfg, trainer.dm.dataset.test, trainer.network.encode

    def slot(wrapper=DatasetWrapper, transform=None, **arguments):
        images = wrapper(cfg, items, transform=transform or build_transform(cfg, is_train=False))
        return feature_slot(cfg, encode, DataLoader(images, **arguments), "test")

    assert slot(batch_size=2).facts is not None
    odd = slot(transform=Odd(), batch_size=2)
    assert odd.facts is None and odd.load() is None
    odd.save(torch.zeros(1, 3, 32))
    assert entries() == []
    assert slot(batch_size=2, shuffle=True) is None
    assert slot(batch_size=2, drop_last=True) is None
    assert slot(type("Own", (DatasetWrapper,), {}), batch_size=2) is None
    assert feature_slot(cfg, encode, (None,), "test") is None


def test_views_of_an_unseeded_run_are_not_kept(make, entries):
    everything(make("TipAdapter", "SEED", -1))
    assert sorted(entry.about["split"] for entry in entries()) == ["test", "val"]


def test_a_damaged_entry_is_computed_again(make, entries, caplog):
    plain = everything(make("TipAdapter"))
    for entry in entries():
        entry.path.write_bytes(entry.path.read_bytes()[:-1])
    trainer = make("TipAdapter")
    seen = encodings(trainer)
    assert_same(everything(trainer), plain)
    assert sum(seen) == 13 and caplog.text.count("Removed damaged features") == 3 and len(entries()) == 3


def test_a_wrong_limit_is_named(make):
    with pytest.raises(ValueError, match="FEATURE_CACHE.LIMIT"):
        make("TipAdapter", "FEATURE_CACHE.LIMIT", -1.0)
