"""Wrong labels made on purpose: how many, among which classes, and what stays as it was."""

import csv
import json
import random
from collections import Counter

import pytest
from PIL import Image

from dassl.config import get_cfg_default
from dassl.data import DataManager
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.data.label_noise import FOREIGN, Noise, make_noise, spread
from dassl.engine import build_trainer
from dassl.utils import InputError, set_random_seed
from datasets import extend_cfg
from trainers.app.configuration import default_cfg


def make_cfg(*pairs, shots=16, seed=101, name="Digits"):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.NUM_SHOTS", shots, "SEED", seed, "VERBOSE", False])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, *pairs])
    return cfg


def manage(*pairs, **given):
    return DataManager(make_cfg(*pairs, **given))


def items(*sizes):
    return [Datum(f"/{c}/{i}.png", c, c % 2, f"class {c}") for c, size in enumerate(sizes) for i in range(size)]


GUESTS = [Datum(f"/guest/{i}.png", 0, 0, "guest") for i in range(500)]


@pytest.mark.parametrize("sizes", [(10, 10, 10, 10), (1, 2, 3, 50), (16,) * 10, (7, 7, 7)])
@pytest.mark.parametrize("flipped, foreign", [(0.2, 0.0), (0.0, 0.4), (0.35, 0.15), (0.29, 0.29), (0.01, 0.3)])
def test_so_many_are_wrong_as_the_share_of_all_says_and_they_are_spread_evenly(sizes, flipped, foreign):
    before = items(*sizes)
    found, true = make_noise(before, Noise(flipped, foreign, "Guests"), GUESTS, random.Random(1))
    # Shares in hundredths, so that a plain integer division rounds exactly, halves up.
    hundredths = [round(100 * share) for share in (flipped, foreign)]
    wanted = [(share * len(before) + 50) // 100 for share in hundredths]
    guests = [place for place, label in enumerate(true) if label == FOREIGN]
    flips = [place for place, label in enumerate(true) if label not in (FOREIGN, found[place].label)]
    assert [len(flips), len(guests)] == wanted
    for place, (old, new) in enumerate(zip(before, found, strict=True)):
        assert new.domain == old.domain and new.classname == f"class {new.label}"
        assert (new.impath != old.impath) == (place in guests) and (new.label != old.label) == (place in flips)
        assert true[place] == (FOREIGN if place in guests else old.label)
    assert len({item.impath for item in found}) == len(found)
    for places, share in ((flips, hundredths[0]), (guests, hundredths[1])):
        counts = Counter(before[place].label for place in places)
        for label, size in enumerate(sizes):  # rounded down, or one more; guests fill up where there is room
            least = share * size // 100
            assert counts[label] >= least and (counts[label] <= least + 1 or (places is guests and min(sizes) < 3))


def test_how_a_share_is_rounded():
    rng = random.Random(1)
    room = dict.fromkeys(range(10), 16)
    given = spread(0.2, room, room, rng)  # 3.2 of each class, 32 of all
    assert sum(given.values()) == 32 and Counter(given.values()) == {3: 8, 4: 2}
    assert sum(spread(0.25, {0: 1, 1: 1}, {0: 1, 1: 1}, rng).values()) == 1  # half an image is one
    assert sum(spread(0.2, {0: 1, 1: 1}, {0: 1, 1: 1}, rng).values()) == 0
    assert spread(0.29, {0: 100}, {0: 100}, rng) == {0: 29}  # not 28, as 0.29 * 100 is in floating point
    assert spread(0.5, {0: 5, 1: 8}, {0: 2, 1: 8}, rng) == {0: 2, 1: 5}  # 2.5 of class 0, where there is no room
    assert spread(0.5, {0: 3, 1: 8, 2: 2}, {0: 3, 1: 8, 2: 2}, rng) == {0: 2, 1: 4, 2: 1}  # what lost most comes first


def test_other_classes_are_equally_likely():
    found, _ = make_noise(items(3000, 3000, 3000, 3000), Noise(0.5), [], random.Random(1))
    counts = Counter(item.label for item in found[:3000])  # those of class 0
    assert counts[0] == 1500 and all(abs(counts[label] - 500) < 70 for label in (1, 2, 3))


def test_picks_validation_and_test_stay_and_the_seed_decides():
    clean, noisy, again = (manage("DATASET.LABEL_NOISE", share) for share in (0.0, 0.4, 0.4))
    one, two = clean.dataset, noisy.dataset
    assert [i.impath for i in one.train_x] == [i.impath for i in two.train_x]
    assert one.val == two.val and one.test == two.test and two.train_x == again.dataset.train_x
    assert [item.label for item in one.train_x] == noisy.noise.true_labels
    assert sum(a.label != b.label for a, b in zip(one.train_x, two.train_x, strict=True)) == 64
    assert two.classnames == one.classnames and two.data_digest == one.data_digest and clean.noise is None
    other = manage("DATASET.LABEL_NOISE", 0.4, seed=102).noise
    assert other.notes() == {
        "share": 0.4, "flipped": 64, "foreign_share": 0.0, "foreign_from": "", "foreign": 0, "images": 160, "seed": 102,
    }  # fmt: skip
    assert len(other.table()) == 65 and other.table()[1:] != noisy.noise.table()[1:]
    batch = next(iter(noisy.train_loader_x))
    assert batch["label"].tolist() == [two.train_x[row].label for row in batch["index"].tolist()]


def test_noise_stays_within_the_classes_that_take_part():
    names = {"five", "six", "seven", "eight", "nine"}
    rows = manage("DATASET.LABEL_NOISE", 0.6, "DATASET.SUBSAMPLE_CLASSES", "new").noise.table()[1:]
    assert len(rows) == 48 and {row[1] for row in rows} == {row[2] for row in rows} == names


def test_without_a_seed_it_draws_freely_and_notes_the_seed():
    set_random_seed(5)
    one, two = (manage("DATASET.LABEL_NOISE", 0.4, shots=-1, seed=-1) for _ in range(2))
    assert one.noise.seed != two.noise.seed and one.dataset.train_x != two.dataset.train_x
    seeded = manage("DATASET.LABEL_NOISE", 0.4, shots=-1, seed=one.noise.seed)
    assert seeded.dataset.train_x == one.dataset.train_x


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """Readers as people write them, of 20 images in two classes each, of which the first two are broken."""

    def reader(name):
        found = []
        for number in range(20):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            if number < 2:
                path.write_text("no image")
            else:
                Image.new("RGB", (8, 8)).save(path)
            found.append(Datum(str(path), number % 2, 0, ["cat", "dog"][number % 2]))

        class Mine(DatasetBase):
            test_only = name == "Tests"

            def __init__(self, cfg):
                super().__init__(train_x=list(found), test=found[4:])

        return Mine

    known = {name: reader(name) for name in ("One", "Two", "Tests")}
    for name, one in {**known, "Again": known["One"]}.items():
        monkeypatch.setitem(DATASET_REGISTRY._obj_map, name, one)


def test_foreign_images_of_another_dataset(own_files):
    pairs = ("DATASET.FOREIGN", 0.1, "DATASET.FOREIGN_FROM", "Two", "DATASET.LABEL_NOISE", 0.25)
    dm = manage(*pairs)
    notes = dm.noise.notes()
    assert (notes["foreign"], notes["flipped"], len(dm.dataset.train_x)) == (16, 40, 160)
    rows = dm.noise.table()[1:]
    assert Counter(row[2] == "foreign" for row in rows) == {True: 16, False: 40}
    assert all(("/Two/" in row[0]) == (row[2] == "foreign") for row in rows)
    with pytest.raises(InputError, match="to have other images than One but Again shares some"):
        manage("DATASET.FOREIGN", 0.25, "DATASET.FOREIGN_FROM", "Again", name="One")


def test_any_reader_can_have_noise_and_bad_images_do_not_count(own_files):
    assert manage("DATASET.LABEL_NOISE", 0.25, name="One").noise.notes()["flipped"] == 5
    pairs = ("DATASET.LABEL_NOISE", 0.25, "DATASET.FOREIGN", 0.5, "DATASET.FOREIGN_FROM", "Two")
    dm = manage(*pairs, "DATALOADER.SKIP_BAD_IMAGES", True, name="One")
    notes = dm.noise.notes()
    assert (notes["images"], notes["flipped"], notes["foreign"]) == (18, 5, 9) and len(dm.bad_images) == 2
    assert not any(item.impath.endswith(("/0.png", "/1.png")) for item in dm.dataset.train_x)


def test_a_dataset_to_test_on_only_stays_as_it_is_and_lends_nothing(own_files):
    assert manage("DATASET.LABEL_NOISE", 0.5, name="Tests").noise is None
    with pytest.raises(InputError, match="Tests has test images only"):
        manage("DATASET.FOREIGN", 0.5, "DATASET.FOREIGN_FROM", "Tests", name="One")


def test_a_run_records_what_is_wrong(tmp_path):
    cfg = default_cfg()
    cfg.merge_from_file("configs/trainers/gda/tiny.yaml")
    cfg.merge_from_list(["DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 2, "SEED", 101, "OUTPUT_DIR", str(tmp_path)])
    cfg.merge_from_list(["USE_CUDA", False, "TEST.SPLIT", "val", "DATASET.LABEL_NOISE", 0.3])
    cfg.freeze()
    trainer = build_trainer(cfg)
    trainer.train()
    assert json.loads((tmp_path / "metrics.json").read_text())["label_noise"] == trainer.dm.noise.notes()
    with open(tmp_path / "label_noise.csv", newline="") as stream:
        assert [tuple(row) for row in csv.reader(stream)] == trainer.dm.noise.table()


@pytest.mark.parametrize(
    "pairs, message",
    [
        (("DATASET.LABEL_NOISE", 1.0), "LABEL_NOISE to be a share, at least 0 and below 1, but got 1.0"),
        (("DATASET.LABEL_NOISE", -0.1), "LABEL_NOISE"),
        (("DATASET.FOREIGN", 0.5), "FOREIGN_FROM to be another dataset than Digits"),
        (("DATASET.FOREIGN", 0.5, "DATASET.FOREIGN_FROM", "Digits"), "FOREIGN_FROM to be another dataset"),
        (("DATASET.FOREIGN", 0.5, "DATASET.FOREIGN_FROM", "Digit"), "FOREIGN_FROM to be another dataset"),
        (("DATASET.FOREIGN_FROM", "Shapes"), "FOREIGN above 0 with DATASET.FOREIGN_FROM Shapes but got 0"),
        (("DATASET.FOREIGN", 0.5, "DATASET.LABEL_NOISE", 0.5, "DATASET.FOREIGN_FROM", "Shapes"), "below 1 together"),
        (("DATASET.LABEL_NOISE", 0.6, "DATASET.NUM_SHOTS", 1), "leave each class a training image"),
    ],
)
def test_bad_input(pairs, message):
    with pytest.raises(InputError, match=message):
        manage(*pairs)


def test_too_few_foreign_images_and_too_few_classes():
    with pytest.raises(InputError, match="Guests to have 20 training images for DATASET.FOREIGN but got 0"):
        make_noise(items(10, 10, 10, 10), Noise(0.0, 0.5, "Guests"), [], random.Random(1))
    with pytest.raises(InputError, match="two classes or more for DATASET.LABEL_NOISE but got one"):
        make_noise(items(10), Noise(0.5), [], random.Random(1))
