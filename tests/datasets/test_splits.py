import hashlib
import json
import logging
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from dassl.config import get_cfg_default
from dassl.data.datasets import Datum, base_dataset
from dassl.utils import InputError
from datasets import extend_cfg
from datasets.split_dataset import SplitDataset
from datasets.splits import (
    Split,
    read_split,
    relative_items,
    split_by_folder,
    split_digest,
    split_trainval,
    subsample_classes,
    write_split,
)

# First-appearance order differs from label order, as in the published splits of Flowers and Cars.
ORDER = (2, 0, 4, 1, 3)


class Mini(SplitDataset):
    folder = "mini"
    split_name = "split_mini.json"


def mini_content() -> dict[str, list]:
    """Five classes with 7 to 11 images for train, 5 to 9 for val, 1 to 5 for test."""
    names = ["c a", "c b", "c c", "c d", "c e"]

    def items(part: str, base: int) -> list:
        return [
            [f"{names[label][-1]}/{part}_{i:02d}.jpg", label, names[label]]
            for label in ORDER
            for i in range(base + label)
        ]

    return {"train": items("train", 7), "val": items("val", 5), "test": items("test", 1)}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A dataset root holding `mini` with its split file and (empty) images."""
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))
    make_mini(tmp_path / "data")
    return tmp_path / "data"


def make_mini(root: Path) -> None:
    content = mini_content()
    for path, _, _ in sum(content.values(), []):
        file = root / "mini" / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (root / "mini" / "split_mini.json").write_text(json.dumps(content))


def make_cfg(root: Path, shots: int = -1, seed: int = 1, classes: str = "all"):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(
        ["DATASET.ROOT", str(root), "DATASET.NUM_SHOTS", shots, "SEED", seed, "DATASET.SUBSAMPLE_CLASSES", classes]
    )
    return cfg


def paths(data, dataset) -> list[str]:
    return [item[0] for item in relative_items(data, dataset.image_dir)]


def vector(data, dataset) -> str:
    """The published notation for picks: SHA-1 of the relative paths joined by newlines, first 12 digits."""
    return hashlib.sha1("\n".join(paths(data, dataset)).encode()).hexdigest()[:12]


def coop_picks(content: dict[str, list], shots: int, seed: int) -> tuple[list[str], list[str]]:
    """CoOp's sampling written naively: the global generator, train first, then val with at most four."""
    random.seed(seed)
    picked = []
    for part, k in (("train", shots), ("val", min(shots, 4))):
        by_label: dict[int, list[str]] = {}
        for path, label, _ in content[part]:
            by_label.setdefault(label, []).append(path)
        picked.append(
            [p for items in by_label.values() for p in (random.sample(items, k) if len(items) >= k else items)]
        )
    return picked[0], picked[1]


# ------------------------------------------------------------------------------------------------ split files


def test_split_round_trip_keeps_order_names_and_layout(tmp_path):
    content = mini_content()
    (tmp_path / "a.json").write_text(json.dumps(content, indent=4, separators=(",", ": ")))
    split = read_split(tmp_path / "a.json", tmp_path / "images")
    assert split.train[0].impath == f"{tmp_path}/images/c/train_00.jpg"
    assert (split.train[0].label, split.train[0].classname) == (2, "c c")
    write_split(tmp_path / "new" / "b.json", tmp_path / "images", split)
    assert (tmp_path / "new" / "b.json").read_text() == (tmp_path / "a.json").read_text()


def test_digest_depends_on_content_and_order_but_not_on_place(tmp_path):
    content = mini_content()
    (tmp_path / "a.json").write_text(json.dumps(content))
    here, there = (read_split(tmp_path / "a.json", folder) for folder in ("/x/y", "/elsewhere"))
    assert split_digest(here, "/x/y") == split_digest(there, "/elsewhere")
    swapped = Split(here.train[::-1], here.val, here.test)
    assert split_digest(swapped, "/x/y") != split_digest(here, "/x/y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("val"), "val is absent"),
        (lambda c: c.update(val={}), "val to be a list but got dict"),
        (lambda c: c["train"].__setitem__(3, ["a.jpg", 1]), r"train\[3\] to be \[path, label, class name\]"),
        (lambda c: c["train"].__setitem__(3, ["a.jpg", "cat", "c b"]), r"train\[3\] .*integer label.*'cat'"),
        (lambda c: c["train"].__setitem__(3, ["a.jpg", 1.5, "c b"]), r"train\[3\] .*integer label.*1.5"),
        (lambda c: c["train"].__setitem__(3, ["a.jpg", True, "c b"]), r"train\[3\] .*integer label.*True"),
        (lambda c: c["train"].__setitem__(3, ["a.jpg", -1, "c b"]), r"train\[3\] .*integer label.*-1"),
        (lambda c: c["test"].__setitem__(0, ["/etc/passwd", 1, "c b"]), r"test\[0\] .*inside"),
        (lambda c: c["test"].__setitem__(0, ["a/../../b.jpg", 1, "c b"]), r"test\[0\] .*inside"),
        (lambda c: c["test"].__setitem__(0, ["a.jpg", 1, "other"]), "label 1 one class name but got 'c b' and 'other'"),
        (lambda c: c.update(train=[i for i in c["train"] if i[1] != 3]), "label 3 has none"),
        (lambda c: c["test"].append(["a.jpg", 9, "c z"]), "from 0 to 9 but label 5 has none"),
        (lambda c: c.update(test=[]), "images in test but it is empty"),
    ],
)
def test_malformed_split_is_named(tmp_path, change, message):
    content = mini_content()
    change(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"bad.json.*{message}"):
        read_split(tmp_path / "bad.json", tmp_path)


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff\xfe{}", b"[]"])
def test_file_that_is_no_split_is_named(tmp_path, raw):
    (tmp_path / "bad.json").write_bytes(raw)
    with pytest.raises(InputError, match="bad.json"):
        read_split(tmp_path / "bad.json", tmp_path)


def test_decimal_label_strings_are_cast(tmp_path):
    content = mini_content()
    content["train"] = [[p, str(label), n] for p, label, n in content["train"]]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_split(tmp_path / "a.json", tmp_path).train[0].label == 2


# -------------------------------------------------------------------------------------------------- splitters


def test_split_by_folder_labels_rounding_ignores_and_renames(tmp_path):
    counts = {"Zebra": 5, "apple": 13, "junk": 4, "bee": 30}
    for name, count in counts.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number:02d}.jpg").touch()
    (tmp_path / "apple" / ".hidden").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.txt").touch()
    split = split_by_folder(tmp_path, ignored=["junk"], renamed={"Zebra": "zebra"})
    # Capitals first, and the name it is shown under changes nothing.
    assert {d.label: d.classname for d in split.train} == {0: "zebra", 1: "apple", 2: "bee"}
    sizes = [[sum(d.label == label for d in part) for part in split] for label in range(3)]
    assert sizes == [[2, 1, 2], [6, 3, 4], [15, 6, 9]]  # halves to even: 2.5 -> 2 and 6.5 -> 6
    everything = [d.impath for part in split for d in part]
    assert len(everything) == len(set(everything)) == 48
    assert split == split_by_folder(tmp_path, ignored=["junk"], renamed={"Zebra": "zebra"})
    assert [d.impath for d in split.train] != [
        d.impath for d in split_by_folder(tmp_path, ignored=["junk"], renamed={"Zebra": "zebra"}, seed=1).train
    ]


def test_split_by_folder_does_not_depend_on_listing_order(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(10):
            (tmp_path / name / f"{number}.jpg").touch()
    first = [d.impath for part in split_by_folder(tmp_path) for d in part]
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    assert [d.impath for part in split_by_folder(tmp_path) for d in part] == first


def test_class_with_too_few_images_is_named(tmp_path):
    (tmp_path / "lonely").mkdir()
    (tmp_path / "lonely" / "a.jpg").touch()
    with pytest.raises(InputError, match="lonely.*got 1"):
        split_by_folder(tmp_path)
    with pytest.raises(InputError, match="'lonely'.*got 1"):
        split_trainval([Datum("a.jpg", 0, classname="lonely")])


def test_folder_without_classes_is_named(tmp_path):
    with pytest.raises(InputError, match="one folder per class"):
        split_by_folder(tmp_path)
    with pytest.raises(InputError, match="nowhere.*No such file"):
        split_by_folder(tmp_path / "nowhere")


def test_split_trainval_takes_the_first_fifth_after_the_shuffle():
    data = [Datum(f"{label}-{i}", label, classname=str(label)) for label in (3, 1) for i in range(13)]
    train, val = split_trainval(data, seed=5)
    rng = random.Random(5)
    expected_train, expected_val = [], []
    for label in (3, 1):
        names = [f"{label}-{i}" for i in range(13)]
        rng.shuffle(names)
        expected_val += names[:3]  # round(2.6)
        expected_train += names[3:]
    assert [d.impath for d in train] == expected_train
    assert [d.impath for d in val] == expected_val


# --------------------------------------------------------------------------------------------------- base/new


def test_base_is_the_first_half_rounded_up_and_new_is_renumbered():
    data = [Datum(f"{label}", label, classname=f"name {label}") for label in (4, 2, 0, 1, 3)]
    base, base_test = subsample_classes(data, data[:2], subsample="base")
    new, new_test = subsample_classes(data, data[:2], subsample="new")
    assert [(d.impath, d.label) for d in base] == [("2", 2), ("0", 0), ("1", 1)]
    assert [(d.impath, d.label) for d in base_test] == [("2", 2)]
    assert [(d.impath, d.label, d.classname) for d in new] == [("4", 1, "name 4"), ("3", 0, "name 3")]
    assert [(d.impath, d.label) for d in new_test] == [("4", 1)]
    assert subsample_classes(data, subsample="all") == [data]


def test_classes_that_share_a_name_stay_apart():
    data = [Datum(str(label), label, classname="missile") for label in range(4)]
    assert [d.label for d in subsample_classes(data, subsample="new")[0]] == [0, 1]


def test_unknown_half_is_named():
    with pytest.raises(InputError, match="all, base or new but got 'bass'"):
        subsample_classes([], subsample="bass")


# --------------------------------------------------------------------------------------------- few-shot picks


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_picks_are_coops_whatever_random_calls_came_before(root, shots, seed):
    random.seed(99)
    before = random.getstate()
    dataset = Mini(make_cfg(root, shots, seed))
    assert random.getstate() == before  # and reading leaves the program's own generator alone
    train, val = coop_picks(mini_content(), shots, seed)
    assert paths(dataset.train_x, dataset) == train
    assert paths(dataset.val, dataset) == val
    assert len(dataset.test) == len(mini_content()["test"])


def test_picks_do_not_move_between_versions(root):
    got = [
        (vector(dataset.train_x, dataset), vector(dataset.val, dataset))
        for dataset in (Mini(make_cfg(root, shots, seed)) for shots in (1, 4) for seed in (1, 2))
    ]
    assert got == GOLDEN


# (train, val) for 1 shot with seeds 1 and 2, then 4 shots; they agree with `coop_picks`.
GOLDEN = [
    ("6fe3355df67b", "5c7e5878172e"),
    ("e1c6a460e73a", "65919bfc8a98"),
    ("d481391686f4", "674ce88c3c2f"),
    ("a70b705bc584", "3a7b784ca04b"),
]


def test_without_shots_everything_is_kept(root):
    dataset = Mini(make_cfg(root))
    assert paths(dataset.train_x, dataset) == [item[0] for item in mini_content()["train"]]
    assert len(dataset.val) == len(mini_content()["val"])
    assert not (root / "mini" / "split_fewshot").exists()


def test_base_and_new_share_one_draw(root):
    both = Mini(make_cfg(root, 2))
    base, new = (Mini(make_cfg(root, 2, classes=half)) for half in ("base", "new"))
    assert sorted(paths(both.train_x, both)) == sorted(paths(base.train_x, base) + paths(new.train_x, new))
    assert base.classnames == ["c a", "c b", "c c"]
    assert new.classnames == ["c d", "c e"]
    assert {item.label for item in new.test} == {0, 1}


def test_saved_picks_are_used(root, caplog):
    first = Mini(make_cfg(root, 2))
    file = root / "mini" / "split_fewshot" / "shot_2-seed_1.json"
    content = json.loads(file.read_text())
    assert content["shots"] == 2 and content["seed"] == 1 and content["split"] == first.split_digest
    assert content["train"][0] == [paths(first.train_x, first)[0], 2, "c c"]
    content["train"][0], content["train"][1] = content["train"][1], content["train"][0]
    file.write_text(json.dumps(content))
    second = Mini(make_cfg(root, 2))
    assert paths(second.train_x, second)[:2] == paths(first.train_x, first)[1::-1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(split="0" * 64),
        lambda c: c.update(seed=7),
        lambda c: c.update(train="x"),
        lambda c: c["train"].__setitem__(0, ["nowhere.jpg", 0, "c a"]),
        lambda c: c["val"].__setitem__(0, [c["val"][0][0], 4, "c e"]),
        lambda c: c["val"].__setitem__(0, None),
        lambda c: c["val"].__setitem__(0, [["list"], 4, "c e"]),
    ],
)
def test_stale_or_foreign_picks_are_noticed_and_drawn_again(root, caplog, spoil):
    Mini(make_cfg(root, 2))
    file = root / "mini" / "split_fewshot" / "shot_2-seed_1.json"
    good = file.read_text()
    content = json.loads(good)
    spoil(content)
    file.write_text(json.dumps(content))
    dataset = Mini(make_cfg(root, 2))
    assert "shot_2-seed_1.json does not fit" in caplog.text
    assert paths(dataset.train_x, dataset) == coop_picks(mini_content(), 2, 1)[0]
    assert file.read_text() == good


def test_damaged_pick_file_is_drawn_again(root, caplog):
    (root / "mini" / "split_fewshot").mkdir()
    (root / "mini" / "split_fewshot" / "shot_2-seed_1.json").write_text("{")
    dataset = Mini(make_cfg(root, 2))
    assert "unreadable" in caplog.text
    assert paths(dataset.train_x, dataset) == coop_picks(mini_content(), 2, 1)[0]


def test_unseeded_picks_are_never_saved(root):
    Mini(make_cfg(root, 2, seed=-1))
    assert not (root / "mini" / "split_fewshot").exists()
    assert not (root.parent / "cache").exists()


def test_moved_data_keeps_its_picks(root, tmp_path, caplog):
    first = Mini(make_cfg(root, 2))
    os.rename(root, tmp_path / "moved")
    caplog.set_level(logging.INFO)
    second = Mini(make_cfg(tmp_path / "moved", 2))
    assert "Loading few-shot images" in caplog.text
    assert paths(second.train_x, second) == paths(first.train_x, first)
    assert second.train_x[0].impath.startswith(str(tmp_path / "moved"))


def test_read_only_dataset_folder_uses_the_users_cache(root, tmp_path, monkeypatch, caplog):
    # A file where the folder should be stops writing even for root, who may write into read-only folders.
    (root / "mini" / "split_fewshot").write_text("")
    first = Mini(make_cfg(root, 2))
    saved = list((tmp_path / "cache" / "splits").glob("mini-*/split_fewshot/shot_2-seed_1.json"))
    assert len(saved) == 1
    caplog.set_level(logging.INFO)
    second = Mini(make_cfg(root, 2))
    assert f"Loading few-shot images from {saved[0]}" in caplog.text
    assert paths(second.train_x, second) == paths(first.train_x, first)


def test_nothing_writable_is_said_and_goes_on(root, tmp_path, caplog):
    (root / "mini" / "split_fewshot").write_text("")
    (tmp_path / "cache").write_text("")
    dataset = Mini(make_cfg(root, 2))
    assert "Could not save" in caplog.text
    assert len(dataset.train_x) == 10


def test_small_classes_give_what_they_have_and_are_named(root, caplog):
    dataset = Mini(make_cfg(root, 9))
    assert paths(dataset.train_x, dataset) == coop_picks(mini_content(), 9, 1)[0]
    assert "2 classes have fewer than 9 training images: c a (7), c b (8)" in caplog.text


@pytest.mark.parametrize("shots", [0, -2, 12])
def test_impossible_shots_are_refused(root, shots):
    with pytest.raises(InputError, match=f"NUM_SHOTS to be .*but got {shots}"):
        Mini(make_cfg(root, shots))


# -------------------------------------------------------------------------------------------------- old pickles


# What CoOp pickles: plain attributes under the class path of the toolbox's Datum.
OldDatum = type("Datum", (), {"__module__": "dassl.data.datasets.base_dataset"})


def old_datum(impath: str, label: int, classname: str) -> Any:
    item = OldDatum()
    vars(item).update(_impath=impath, _label=label, _domain=0, _classname=classname)
    return item


def write_pickle(root: Path, content, monkeypatch, protocol: int = 5) -> Path:
    path = root / "mini" / "split_fewshot" / "shot_2-seed_1.pkl"
    path.parent.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(base_dataset, "Datum", OldDatum)
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def old_picks(names: slice) -> dict[str, list[Any]]:
    content = mini_content()
    return {
        part: [old_datum(f"/old/machine/mini/images/{p}", label, name) for p, label, name in content[part][names]]
        for part in ("train", "val")
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_coop_pickle_continues_its_picks(root, monkeypatch, protocol):
    write_pickle(root, old_picks(slice(3, 40, 4)), monkeypatch, protocol)
    dataset = Mini(make_cfg(root, 2))
    assert paths(dataset.train_x, dataset) == [item[0] for item in mini_content()["train"][3:40:4]]
    assert paths(dataset.val, dataset) == [item[0] for item in mini_content()["val"][3:40:4]]
    assert dataset.train_x[0].impath == f"{root}/mini/images/{mini_content()['train'][3][0]}"


def test_coop_pickle_of_another_split_is_noticed(root, monkeypatch, caplog):
    picks = old_picks(slice(0, 4))
    picks["train"][0]._label = 4
    write_pickle(root, picks, monkeypatch)
    dataset = Mini(make_cfg(root, 2))
    assert "shot_2-seed_1.pkl does not fit" in caplog.text
    assert paths(dataset.train_x, dataset) == coop_picks(mini_content(), 2, 1)[0]


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_hostile_pickle_is_refused_and_runs_nothing(root, tmp_path, monkeypatch):
    path = write_pickle(root, {"train": [Hostile(tmp_path / "ran")], "val": []}, monkeypatch)
    with pytest.raises(InputError, match=r"shot_2-seed_1.pkl.*mkdir"):
        Mini(make_cfg(root, 2))
    assert path.exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"train": [1]}, {"train": [{"_impath": "a"}]}, [1, 2], {"train": [print]}])
def test_pickle_of_other_things_is_refused(root, monkeypatch, content):
    write_pickle(root, content, monkeypatch)
    with pytest.raises(InputError, match="shot_2-seed_1.pkl"):
        Mini(make_cfg(root, 2))


def test_truncated_pickle_is_refused(root, monkeypatch):
    path = write_pickle(root, old_picks(slice(0, 4)), monkeypatch)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="shot_2-seed_1.pkl"):
        Mini(make_cfg(root, 2))


# ------------------------------------------------------------------------------------------------------- reader


class Made(SplitDataset):
    folder = "mini"
    split_name = "made.json"

    def make_split(self) -> Split:
        return split_by_folder(self.image_dir)


def test_made_split_is_saved_and_read_back(root):
    first = Made(make_cfg(root))
    assert (root / "mini" / "made.json").is_file()
    second = Made(make_cfg(root))
    assert first.split_digest == second.split_digest
    assert paths(first.test, first) == paths(second.test, second)


def test_root_and_folder_are_asked_for(root, tmp_path):
    with pytest.raises(InputError, match="--root"):
        Mini(make_cfg(""))
    with pytest.raises(InputError, match=f"Mini to be in {tmp_path}/mini"):
        Mini(make_cfg(tmp_path))
    (root / "mini" / "split_mini.json").unlink()
    with pytest.raises(InputError, match="split_mini.json to exist"):
        Mini(make_cfg(root))


def test_missing_images_are_counted_in_one_error(root):
    for path, _, _ in mini_content()["train"][:7]:
        (root / "mini" / "images" / path).unlink()
    with pytest.raises(InputError, match="(?s)7.*train_00.jpg"):
        Mini(make_cfg(root))
