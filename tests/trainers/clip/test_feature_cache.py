"""The cache of features on disk: what is kept comes back bit for bit, and nothing else does."""

import json
import multiprocessing
import os
import time

import pytest
import torch
from safetensors.torch import load_file

from trainers.features.cache import FeatureCache, default_folder

ABOUT = {"dataset": "Digits", "split": "test", "model": "tiny"}


def make_values(seed=0, n=7):
    return torch.randn(2, n, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "features", 2**20)


def test_what_is_kept_comes_back_and_nothing_else_does(cache):
    facts, values = {"weights": "a", "seed": 1, "shape": [2, 7, 4]}, make_values()
    assert cache.load(facts) is None and not cache.folder.exists()  # looking leaves no trace
    assert cache.save(facts, values, ABOUT)
    assert torch.equal(FeatureCache(cache.folder, 0).load(dict(reversed(facts.items()))), values)
    for poisoned in ({**facts, "weights": "b"}, {**facts, "seed": 2}, {**facts, "more": 0}, {"weights": "a"}):
        assert cache.load(poisoned) is None


def test_a_file_holds_features_only_and_the_index_says_what_they_are(cache):
    cache.save({"weights": "a"}, make_values(), ABOUT)
    (entry,) = cache.entries()
    assert load_file(entry.path).keys() == {"features"}
    assert (entry.about, entry.facts, entry.size) == (ABOUT, {"weights": "a"}, entry.path.stat().st_size)
    index = json.loads((cache.folder / "index.json").read_text())
    assert index.keys() == {entry.path.name}
    assert index[entry.path.name].items() >= {**ABOUT, "weights": "a", "bytes": entry.size}.items()


def damage(path, how):
    content = path.read_bytes()
    if how == "flipped bit":
        content = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    elif how == "another entry":
        other = FeatureCache(path.parent, 2**20)
        other.save({"weights": "b"}, make_values(1), ABOUT)
        content = other.path({"weights": "b"}).read_bytes()
    elif how == "no header":
        content = b"\xff" * len(content)
    else:
        content = content[: int(how)]
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["0", "5", "100", "-1", "flipped bit", "another entry", "no header"])
def test_damage_is_noticed_removed_and_repaired(cache, how, caplog):
    facts, values = {"weights": "a"}, make_values()
    cache.save(facts, values, ABOUT)
    path = cache.path(facts)
    damage(path, how)
    assert path in {entry.path for entry in cache.entries()}  # the table of entries can do with it
    assert cache.load(facts) is None
    assert "Removed damaged features" in caplog.text and path.name in caplog.text
    assert not path.exists()
    cache.save(facts, values, ABOUT)
    assert torch.equal(cache.load(facts), values)


def test_least_recently_used_entries_go_first(cache):
    values = make_values(n=1000)  # 32,000 bytes
    cache.limit = 3 * 33_000
    for number in range(3):
        cache.save({"number": number}, values, ABOUT)
        os.utime(cache.path({"number": number}), (1e9 + number, 1e9 + number))
    assert cache.load({"number": 0}) is not None  # used last now
    cache.save({"number": 3}, values, ABOUT)
    assert {entry.facts["number"] for entry in cache.entries()} == {0, 2, 3}
    assert sum(entry.size for entry in cache.entries()) <= cache.limit
    assert len(json.loads((cache.folder / "index.json").read_text())) == 3


def test_what_is_larger_than_the_limit_is_not_kept_and_costs_no_other_entry(cache):
    cache.save({"number": 0}, make_values(), ABOUT)
    cache.limit = 1000
    assert not cache.save({"number": 1}, make_values(n=1000), ABOUT)
    assert [entry.facts["number"] for entry in cache.entries()] == [0]


def test_clear(cache):
    assert cache.clear() == [] and not cache.folder.exists()
    for number in range(2):
        cache.save({"number": number}, make_values(), ABOUT)
    (cache.folder / ".x.safetensors.1.tmp").write_bytes(b"half")
    assert len(cache.clear()) == 2
    assert {path.name for path in cache.folder.iterdir()} == {"index.json", ".lock"}
    assert json.loads((cache.folder / "index.json").read_text()) == {}


def test_what_a_killed_process_left_goes_after_a_while(cache):
    cache.folder.mkdir(parents=True)
    old, new = cache.folder / ".a.safetensors.1.tmp", cache.folder / ".b.safetensors.2.tmp"
    for path, age in ((old, 7200), (new, 10)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache.save({"number": 0}, make_values(), ABOUT)
    assert not old.exists() and new.exists()
    assert len(cache.entries()) == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file" / "features", 2**20)
    assert cache.load({"number": 0}) is None
    assert not cache.save({"number": 0}, make_values(), ABOUT)
    assert "not kept" in caplog.text


def hammer(folder, barrier, failures):
    """One of several processes that look for, compute and keep the same entries, while a limit throws some out."""
    torch.set_num_threads(1)
    cache = FeatureCache(folder, 4 * 33_000)
    barrier.wait()
    for _ in range(4):
        for number in range(6):
            values = make_values(number, n=1000)
            found = cache.load({"number": number})
            if found is None and not cache.save({"number": number}, values, ABOUT):
                failures.put(f"{number} not saved")
            if found is not None and not torch.equal(found, values):
                failures.put(f"{number} is wrong")


def test_processes_that_write_the_same_entries_at_once(cache, caplog):
    context = multiprocessing.get_context("fork")
    barrier, failures = context.Barrier(3), context.SimpleQueue()
    workers = [context.Process(target=hammer, args=(cache.folder, barrier, failures)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0] and failures.empty()
    entries = cache.entries()
    assert len(entries) == 4
    for entry in entries:
        assert torch.equal(cache.load(entry.facts), make_values(entry.facts["number"], n=1000))
    assert not list(cache.folder.glob("*.tmp")) and not list(cache.folder.glob(".*.tmp"))
    assert set(json.loads((cache.folder / "index.json").read_text())) == {entry.path.name for entry in entries}


def test_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "features"
    monkeypatch.delenv("DLR_CLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dlr_clip" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "dlr_clip" / "features"
