"""Fixtures for all tests: a cache folder of their own, Digits in it, and a small CLIP with the bundled one's format."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_clip import write_small_clip

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores: one thread each, or they spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A script that starts these tests in the background has Ctrl-C ignored in them, and in all runs that tests start. Then
# no run could be told to stop by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")  # scripts/dev/mark_slow.py writes it


def dotted(path: str, *names: str) -> str:
    """Return the name of a test function or fixture as JUnit reports and `slow_tests.txt` have it."""
    return "::".join([".".join([path.removesuffix(".py").replace("/", "."), *names[:-1]]), names[-1]])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `pytest -m "not slow"` leaves out: those listed, and those with a listed fixture."""
    slow = set(SLOW_TESTS.read_text(encoding="utf-8").split())
    for item in items:
        path, *names = item.nodeid.partition("[")[0].split("::")
        needed = {dotted(path, name) for name in getattr(item, "fixturenames", ())}
        if not slow.isdisjoint({dotted(path, *names), *needed}):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: Any) -> Generator[None, Any, Any]:
    """Note in the JUnit report how long the fixtures of whole files take: that time is counted to their first test."""
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        if fixturedef.scope == "module" and fixturedef.baseid.endswith(".py"):
            name = f"fixture {dotted(fixturedef.baseid, fixturedef.argname)}"
            request._pyfuncitem.user_properties.append((name, time.perf_counter() - start))


# Six blocks like the bundled CLIP, so that its configs fit; everything else as small as it goes.
RANDOM_TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"layers": 6, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 6},
}


@pytest.fixture(scope="session", autouse=True)
def digits_cache(tmp_path_factory) -> Iterator[Path]:
    """The cache folder of this test run: nothing is read from or written to the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLR_CLIP_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """What outlasts a power cut cannot be seen here, and costs much of a small run's time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """What a program under test does to the root logger (a handler on a borrowed console, say) ends with the test."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers).difference(handlers):
        if not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def random_tiny(tmp_path_factory) -> Path:
    """A folder with a small CLIP with random weights, for MODEL.BACKBONE.WEIGHTS with the backbone "tiny"."""
    words = "a photo of the number digit zero one two three four five six seven eight nine red square circle ."
    return write_small_clip(tmp_path_factory.mktemp("tiny"), RANDOM_TINY, words, {"weights": "random"})


@pytest.fixture(scope="session")
def random_adapters(random_tiny, tmp_path_factory) -> Path:
    """A file of random adapters for that CLIP, for MODEL.IMO_WEIGHTS."""
    import torch

    from trainers.clip import load_clip
    from trainers.features.corrected import save_adapters
    from trainers.modules.overlap_adapters import IMOAdapters

    clip = load_clip("tiny", random_tiny)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapters = IMOAdapters(clip.visual.widths, 4)
        for p in adapters.parameters():
            torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("adapters") / "imo_adapters.safetensors"
    save_adapters(path, adapters, clip, {"trainer": "random"})
    return path


@pytest.fixture(scope="session")
def tiny_weights(random_tiny) -> str:
    """MODEL.BACKBONE.WEIGHTS for tests that want the bundled CLIP: "" where it is there, else the random one."""
    from trainers.clip.tiny import tiny_files

    try:
        tiny_files(None)
    except FileNotFoundError:
        return str(random_tiny)
    return ""
