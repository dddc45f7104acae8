"""A trainer file written for upstream runs unchanged, and a reader of upstream's logs reads ours."""

import re
from pathlib import Path

import pytest
import torch

from dassl.utils import close_logger, setup_logger


def parse_test_res(log: Path, keyword: str = "accuracy", end_signal: str = "Finish training") -> dict[str, float]:
    """What CoOp's parse_test_res.py does with one log: armed by the end signal, the last match wins."""
    pattern = re.compile(rf"\* {keyword}: ([\.\deE+-]+)%")
    found, armed = {}, False
    for line in log.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if line == end_signal:
            armed = True
        match = pattern.search(line)
        if match and armed:
            found[keyword] = float(match.group(1))
    return found


@pytest.fixture
def logging_to():
    yield setup_logger  # called by the test itself: pytest gives each phase of a test another stdout
    close_logger()


def test_trains_tests_and_leaves_a_readable_log(coop_style, build, logging_to, tmp_path):
    log = logging_to(tmp_path / "run")
    trainer = build("CoOpStyle", "OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_TYPE", "constant")
    trainer.train()
    text = log.read_text(encoding="utf-8")
    lines = text.splitlines()

    assert trainer.evaluation.heads["main"]["accuracy"] > 90
    for keyword, value in (
        ("accuracy", trainer.evaluation.heads["main"]["accuracy"]),
        ("macro_f1", trainer.evaluation.heads["main"]["macro_f1"]),
    ):
        assert parse_test_res(log, keyword) == {keyword: pytest.approx(value, abs=0.051)}
        assert parse_test_res(log, keyword, "=> result") == parse_test_res(log, keyword)
    assert "Building custom model" in lines  # printed, not logged
    assert lines.index("Finish training") < lines.index("Deploy the last-epoch model")
    assert lines.index("Deploy the last-epoch model") < lines.index("Evaluate on the *test* set")
    assert re.search(r"^Elapsed: \d+:\d\d:\d\d$", text, re.MULTILINE)
    number = r"\d+\.\d{4}"
    assert re.search(
        rf"^epoch \[2/3\] batch \[4/4\] time \d\.\d{{3}} \(\d\.\d{{3}}\) data \d\.\d{{3}} \(\d\.\d{{3}}\) "
        rf"loss {number} \({number}\) acc {number} \({number}\) lr 1\.0000e-01 eta \d:\d\d:\d\d$",
        text,
        re.MULTILINE,
    )
    folder = tmp_path / "run" / "prompt_learner"
    names = [p.name for p in folder.iterdir() if not p.name.startswith("model-step")]
    assert sorted(names) == ["checkpoint", "model.pth.tar-3", "model.pth.tar-3.sha256"]
    assert (folder / "checkpoint").read_text() == "model.pth.tar-3\n"


def test_evaluates_only_from_its_checkpoint(coop_style, build, tmp_path):
    trained = build("CoOpStyle")
    trained.train()
    evaluated = build("CoOpStyle", output="evaluated")
    untrained = evaluated.test()
    evaluated.load_model(str(tmp_path / "run"), epoch=3)
    assert evaluated.test() == trained.evaluation.heads["main"]["accuracy"] > untrained


def test_starts_from_weights_of_a_file(coop_style, build, tmp_path):
    torch.save({"module.ctx": torch.ones(3, 3)}, tmp_path / "weights.pth")
    trainer = build("CoOpStyle", "MODEL.INIT_WEIGHTS", str(tmp_path / "weights.pth"))
    assert trainer.model.prompt_learner.ctx.eq(1).all()
