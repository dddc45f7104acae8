"""Whatever is in a file from outside, its reader ends in what it returns or in an error that it documents.

Few examples in ordinary runs; FUZZ_EXAMPLES=1000 in the environment for long ones.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from torch import nn

from dassl.config import get_cfg_default
from dassl.data.datasets import Datum
from dassl.evaluation.predictions import PREDICTIONS, Predictions, load_predictions, save_predictions
from dassl.utils import InputError, load_checkpoint, one_line, read_image, read_json, save_checkpoint
from dassl.utils.checkpoints import checkpoint_entry, load_into, load_pretrained_weights, pointed_file
from datasets.files import read_lines, read_mat, read_table
from datasets.image_folder import class_names, read_csv
from datasets.open_images import read_labels
from datasets.picks import Picks, find_picks, read_coop_pickle
from datasets.splits import read_split
from scripts.lib.runs import find_runs, read_records, run_records
from scripts.lib.tables import Record, collect, comma_separated, latex, markdown
from trainers.base.learner import Learner
from trainers.clip.checkpoint import read_checkpoint
from trainers.clip.templates import fill_template
from trainers.clip.tiny import read_record
from trainers.features.cache import FeatureCache
from trainers.features.corrected import read_recipe
from trainers.jclip_adapter import mapped_prompt, parse_prompt_map

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 100,  # ordinary runs are the same every time
    suppress_health_check=list(HealthCheck),
)

# ------------------------------------------------------------------------------------------------ what is in files

nasty = st.sampled_from(
    ["", " ", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "a\nb", "a\rb", "\x00", "\x1b[31m", "\ud800", "\u202eabc",
     "=1+1", "@SUM(A1)", "<script>alert(1)</script>", "a|b", "$x_1$ & \\b {}", "%s", "{}", "{0}", "\u00e9" * 300, "NaN",
     "1e999", "null", "true", "-1", "99999999999999999999"]
)  # fmt: skip
text = st.one_of(nasty, st.text(max_size=20))
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), text, st.sampled_from([2**63, -(2**70), 1e308, float("nan")])
)
anything = st.recursive(
    scalar,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=8,
)


def places(value, here=()):
    yield here
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*here, key))


@st.composite
def spoilt(draw, valid):
    """A document with one or two of its parts replaced or taken out."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(list(places(document))))
        if not place:
            return draw(anything)
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        if draw(st.booleans()) or isinstance(parent, list):
            parent[place[-1]] = draw(anything)
        else:
            del parent[place[-1]]
    return document


@st.composite
def damaged(draw, valid: bytes):
    """A file's bytes with some changed, cut off, or put in."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "head"]))
        if kind == "flip" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif content:
            content[min(at, 40) % len(content)] = draw(st.integers(0, 255))
    return bytes(content)


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def json_bytes(valid) -> st.SearchStrategy[bytes]:
    deep = st.sampled_from([b"[" * 20_000, b'{"a":' * 20_000, b"\xff\xfe{}", b"", b"NaN"])
    return st.one_of(spoilt(valid).map(as_json), damaged(as_json(valid)), deep, st.binary(max_size=30))


def csv_bytes(*rows: str) -> st.SearchStrategy[bytes]:
    cells = st.lists(st.lists(text, max_size=5).map(",".join), max_size=4)
    lines = cells.map(lambda more: "\n".join([*rows, *more]).encode("utf-8", "replace"))
    return st.one_of(lines, damaged("\n".join(rows).encode()), st.just(rows[0].encode() + b'\n"' + b"x" * 200_000))


@pytest.fixture
def write(tmp_path):
    """(file name, content) -> the file, in one folder for all examples."""

    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def outcome(errors, call, *args):
    """What a reader returns; None where it ends in an error that it may end in, whose text is fit for a line."""
    try:
        return call(*args)
    except errors as error:
        assert type(error) is not RecursionError
        message = one_line(str(error))
        assert message
        return None


# -------------------------------------------------------------------------------------------------- configuration

VALID_CFG = {
    "SEED": 1,
    "OPTIM": {"LR": 0.1, "STEPSIZE": [-1]},
    "INPUT": {"SIZE": [64, 64], "TRANSFORMS": ["normalize"]},
}


@fuzz
@given(
    content=st.one_of(
        spoilt(VALID_CFG).map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")),
        damaged(yaml.safe_dump(VALID_CFG).encode()),
        st.sampled_from([b"_BASE_: a.yaml\n", b"SEED: !!python/object/apply:os.system ['touch x']", b"a: &a [*a]"]),
        st.just(b"INPUT: {SIZE: &a [*a]}"),
        st.just(b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 40))
                .replace(b"a0", b"x").replace(b"*x", b"x")),
        st.just(b"[" * 500),
    )
)  # fmt: skip
def test_config_files(write, content):
    cfg = get_cfg_default()
    outcome(InputError, cfg.merge_from_file, write("a.yaml", content))


@fuzz
@given(key=st.one_of(text, st.sampled_from(["OPTIM.LR", "INPUT.SIZE", "OPTIM", "TRAINER.NAME"])), value=text)
def test_config_pairs(key, value):
    outcome(InputError, get_cfg_default().merge_from_list, [key, value])


@fuzz
@given(content=json_bytes({"a": [1]}))
def test_json_files(write, content):
    outcome(InputError, read_json, write("a.json", content))


# ------------------------------------------------------------------------------------------------ data and classes

VALID_SPLIT: dict[str, list[list[Any]]] = {
    "train": [["cat/1.jpg", 0, "cat"], ["dog/1.jpg", 1, "dog"]],
    "val": [["cat/2.jpg", 0, "cat"]],
    "test": [["dog/2.jpg", 1, "dog"]],
}


@fuzz
@given(content=json_bytes(VALID_SPLIT))
def test_split_files(write, content):
    split = outcome(InputError, read_split, write("split.json", content), "/images")
    for item in [] if split is None else [*split.train, *split.val, *split.test]:
        assert os.path.normpath(item.impath).startswith("/images/")


@fuzz
@given(content=csv_bytes("path,label,split", "a.jpg,cat,train", "b.jpg,dog,test"))
def test_csv_of_images(write, content):
    path = write("list.csv", content)
    for photo in outcome(InputError, read_csv, path) or ():
        assert os.path.normpath(path.parent / photo.path).startswith(f"{path.parent}{os.sep}")


@fuzz
@given(content=csv_bytes("ImageID,LabelName", "1,cat"))
def test_csv_of_open_images(write, content):
    outcome(InputError, read_labels, write("labels.csv", content))


@fuzz
@given(kind=st.sampled_from(["json", "txt"]), data=st.data())
def test_class_names(tmp_path, kind, data):
    strategy = json_bytes({"n01": "cat", "n02": "dog"}) if kind == "json" else csv_bytes("n01 cat", "n02 dog")
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / f"classes.{kind}").write_bytes(data.draw(strategy))
    names = outcome(InputError, class_names, tmp_path, ["n01", "n02"])
    assert names is None or (set(names) == {"n01", "n02"} and all(name.strip() for name in names.values()))


@fuzz
@given(content=st.one_of(csv_bytes("1 a.jpg", "2 b.jpg"), st.binary(max_size=40)))
def test_annotation_files(write, content):
    path = write("list.txt", content)
    outcome(InputError, read_lines, path)
    outcome(InputError, read_table, path, int, str)
    outcome(InputError, read_mat, path, "labels")


WANTED = Picks("Toy", 1, 1, "digest")
INDEX = {path: Datum(f"/images/{path}", label, classname=name) for path, label, name in VALID_SPLIT["train"]}
VALID_PICKS = {**WANTED._asdict(), "train": [list(x) for x in VALID_SPLIT["train"]], "val": []}


@fuzz
@given(content=json_bytes(VALID_PICKS))
def test_few_shot_picks(write, tmp_path, content):
    write("shot_1-seed_1.json", content)
    found = outcome(InputError, find_picks, tmp_path, WANTED, INDEX)
    assert found is None or set(found.train) <= set(INDEX.values())


class Touch:
    """Pickled, a call that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@fuzz
@given(data=st.data())
def test_pickles(write, data, tmp_path):
    trap = tmp_path / "trap"
    valid = pickle.dumps({"train": [{"_impath": "x"}], "val": []}, protocol=data.draw(st.integers(0, 5)))
    hostile = pickle.dumps({"train": [Touch(trap)], "val": Touch(trap)})
    content = data.draw(
        st.one_of(damaged(valid), damaged(hostile), st.just(hostile), spoilt({"train": []}).map(pickle.dumps))
    )
    path = write("shot_1-seed_1.pkl", content)
    outcome(InputError, read_coop_pickle, path)
    outcome((InputError, FileNotFoundError), load_checkpoint, path)
    outcome((ValueError, FileNotFoundError), read_checkpoint, path)
    assert not trap.exists()


# ------------------------------------------------------------------------------------------------- prompts and tables


@fuzz
@given(template=text, name=text, entries=st.lists(st.one_of(text, st.just("Animal=a {}.")), max_size=3))
def test_prompts(template, name, entries):
    prompt = outcome(ValueError, fill_template, template, name)
    assert prompt is None or name.replace("_", " ") in prompt
    prompts = outcome(ValueError, parse_prompt_map, entries)
    if prompts is not None:
        assert isinstance(mapped_prompt(name, prompts, "{}"), str)


@fuzz
@given(content=csv_bytes("dataset,method,shots,accuracy,seed", "Digits,CoOp,1,50.0,1"))
def test_published_numbers(write, content):
    for record in outcome(ValueError, read_records, write("published.csv", content)) or ():
        assert np.isfinite(record["accuracy"])


VALID_METRICS = {
    "trainer": "CoOp", "dataset": "Digits", "shots": 1, "seed": 1, "accuracy": 50.0, "split": "test",
    "test": {"main": "coop", "heads": {"coop": {"accuracy": 50.0}}}, "params": {"total": 1}, "selected": {},
}  # fmt: skip


@fuzz
@given(
    content=json_bytes(VALID_METRICS), config=st.one_of(st.just(b"DATASET: {}"), spoilt({"DATASET": {}}).map(as_json))
)
def test_folders_of_runs(write, tmp_path, content, config):
    write("metrics.json", content), write("DONE", b"{}"), write("config.yaml", config)

    def read():
        runs, _ = find_runs([tmp_path])
        return [*run_records(runs), *(run_records(runs, list(runs[0].heads())) if runs else [])]

    outcome(ValueError, read)


@fuzz
@given(names=st.lists(st.tuples(text, text), min_size=1, max_size=4, unique=True))
def test_names_break_no_table(names):
    cells = collect(Record(dataset, method, 1, seed, 50.0 + seed) for dataset, method in names for seed in (1, 2))
    for line in markdown(cells).splitlines():
        assert not line.startswith("|") or line.count("|") - line.count("\\|") == 3, line
    assert "<script" not in markdown(cells)
    for line in latex(cells).splitlines():
        plain = line
        for escaped in ("\\\\", "\\&", "\\%", "\\$", "\\#", "\\_", "\\{", "\\}"):
            plain = plain.replace(escaped, "")
        if "50" in line or "51" in line:
            assert plain.count("&") == 1 and not set("#%~^") & set(plain), line
    rows = comma_separated(cells)
    assert not any(line.lstrip('"')[:1] in ("=", "+", "-", "@") for line in rows.splitlines())


# ------------------------------------------------------------------------------------------- checkpoints and weights


class Tiny(Learner):
    def __init__(self) -> None:
        super().__init__(["cat", "dog"], {"backbone": "tiny"})
        self.weight = nn.Parameter(torch.ones(2, 3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint({"state_dict": Tiny().state_dict(), "epoch": 1, "optimizer": None, "scheduler": None}, folder)
    return (folder / "model.pth.tar-1").read_bytes()


@fuzz
@given(data=st.data())
def test_checkpoints(write, checkpoint, data):
    path = write("model.pth.tar-1", data.draw(damaged(checkpoint)))
    content = outcome(InputError, load_checkpoint, path)
    model = Tiny()
    if content is not None:
        state = outcome(InputError, checkpoint_entry, content, "state_dict", path)
        outcome(InputError, load_into, model, state, path, "model")
        outcome(InputError, load_pretrained_weights, model, path)
        if isinstance(state, dict):
            outcome(ValueError, model.take, state)
    outcome((ValueError, FileNotFoundError), read_checkpoint, path)


record = st.one_of(json_bytes({"classnames": ["cat", "dog"], "facts": {"backbone": "tiny"}}))


@fuzz
@given(
    packed=st.one_of(record.map(lambda b: torch.tensor(list(b), dtype=torch.uint8)), st.just(torch.ones(3)), scalar),
    weight=st.sampled_from([torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.int64), None, "x", 1]),
)
def test_learners_state(packed, weight):
    outcome(ValueError, Tiny().take, {"weight": weight, "_extra_state": packed})


@fuzz
@given(content=st.one_of(st.binary(max_size=20), text.map(lambda t: t.encode("utf-8", "replace"))))
def test_pointer_of_a_checkpoint(write, tmp_path, content):
    write("checkpoint", content)
    path = outcome(InputError, pointed_file, tmp_path)
    assert path is None or path.resolve().parent == tmp_path.resolve()


WEIGHTS = safetensors_bytes({"weight": torch.ones(2, 3)}, {"recipe": json.dumps({"backbone": "tiny", "dim": 1})})


@fuzz
@given(content=st.one_of(damaged(WEIGHTS), st.binary(max_size=40)))
def test_weights(write, content):
    path = write("weights.safetensors", content)
    outcome((ValueError, FileNotFoundError), read_checkpoint, path)
    outcome((ValueError, FileNotFoundError), read_recipe, path)


@fuzz
@given(content=json_bytes({"arch": {"embed_dim": 1, "vision_cfg": {}, "text_cfg": {}}, "record": {}}))
def test_record_of_a_tiny_clip(write, content):
    outcome(ValueError, read_record, write("tiny_clip.json", content))


@pytest.fixture(scope="module")
def predictions(tmp_path_factory) -> bytes:
    n = 4
    made = Predictions(
        split="test", main="a", reference="", heads=["a"], classnames=["x", "y"], labels=np.zeros(n, np.int16),
        top=np.zeros((1, n, 2), np.int16), true=np.zeros((1, n), np.float32), rival=np.zeros((1, n), np.float32),
        logsumexp=np.zeros((1, n), np.float32), rows=np.arange(n), values={}, features={}, logits=None,
        paths=["/a/b.png"] * n,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("predictions") / PREDICTIONS
    save_predictions(path, made)
    return path.read_bytes()


@fuzz
@given(data=st.data())
def test_predictions(write, predictions, data):
    found = outcome(InputError, load_predictions, write(PREDICTIONS, data.draw(damaged(predictions))))
    if found is not None:
        outcome(InputError, found.confusion, "a")


@fuzz
@given(data=st.data())
def test_cached_features(tmp_path, data):
    """A damaged entry is a missing one: its features are computed again."""
    cache = FeatureCache(tmp_path / "cache", 2**20)
    facts, values = {"images": "digest"}, torch.arange(6.0).reshape(1, 2, 3)
    assert cache.save(facts, values, {"dataset": "Toy"})
    path = cache.path(facts)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    cache.entries()
    found = cache.load(facts)
    assert found is None or torch.equal(found, values)


# --------------------------------------------------------------------------------------------------------- images


def image_bytes(form: str, mode: str) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (7, 5)).save(stream, form)
    return stream.getvalue()


IMAGES = [
    image_bytes(*kind) for kind in (("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "I;16"), ("BMP", "RGB"))
]


@fuzz
@given(content=st.sampled_from(IMAGES).flatmap(damaged))
def test_images(write, content):
    image = outcome(InputError, read_image, write("image.png", content))
    assert image is None or image.mode == "RGB"


# ------------------------------------------------------------------------------------------------------- one line


@fuzz
@given(name=text, width=st.sampled_from([0, 5, 20]))
def test_names_are_one_line(name, width):
    line = one_line(name, width)
    assert line.isprintable() and len(line.splitlines()) <= 1 and (not width or len(line) <= width)
    line.encode("utf-8")


def test_the_traps_work(tmp_path):
    """The hostile pickle of these tests would make its file if it were unpickled."""
    pickle.loads(pickle.dumps(Touch(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()
