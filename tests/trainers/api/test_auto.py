"""The choice of a method: folds, the rule of two standard errors, learning curves, calibration, unknown images."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from color_photos import COLORS, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dassl.utils import InputError
from trainers import FewShotClassifier
from trainers.api.auto import (
    ADAPTED,
    CANDIDATES,
    DEFAULT,
    FIRST_CHOICE,
    Score,
    balanced,
    choose,
    gain_of_doubling,
    interval,
    score,
)
from trainers.api.calibration import calibrated_apart, calibration_error, fit_temperature, unknown_rule
from trainers.api.folds import draw_folds, first_of_each
from trainers.api.report import Report
from trainers.api.runs import Choice
from trainers.app.train import main as train


@pytest.fixture(scope="module")
def make(tiny_weights):
    def make(**options):
        return FewShotClassifier("auto", "tiny", weights=tiny_weights or None, **options)

    return make


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99))
def test_folds_hold_each_image_out_once_and_leave_one_of_its_class(counts, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    folds = draw_folds(labels, seed)
    used = set(folds.tolist()) - {-1}
    assert len(used) <= 5 and folds.tolist() == draw_folds(labels, seed).tolist()
    for label, count in enumerate(counts):
        mine = folds[torch.tensor(labels) == label].tolist()
        if count == 1:
            assert mine == [-1]
            continue
        sizes = Counter(mine)
        assert -1 not in sizes and max(sizes.values()) < count
        assert max(sizes.values()) - min(sizes.values()) <= 1


def logits_with(right, n=100, classes=4):
    """Logits that are right for the first `right` of n images."""
    labels = torch.arange(n) % classes
    guesses = torch.where(torch.arange(n) < right, labels, (labels + 1) % classes)
    return F.one_hot(guesses, classes).float(), labels


def scores_with(rights, held, shift=0):
    """Scores by name and number of right images; the default's are right from image `shift` on."""
    found = []
    for choice, right in rights:
        logits, labels = logits_with(right)
        if choice is DEFAULT:
            logits[:shift] = logits[:shift].roll(1, dims=1)
        found.append(score(choice, logits, labels, held))
    return found, labels


def test_the_default_is_taken_unless_another_is_ahead_by_two_standard_errors():
    held = torch.ones(100, dtype=torch.bool)
    # wrong on 5 images more than b: mean 0.05, deviation 0.22, standard error 0.022
    scores, labels = scores_with([(Choice("a"), 60), (Choice("b"), 95), (DEFAULT, 90)], held)
    chosen, why = choose(scores, labels, held)
    assert chosen is scores[1] and why == f"b was certainly better on held-out images than {DEFAULT.shown}"
    # right on 6 images where b is wrong, and wrong on 9 where b is right: mean 0.03, standard error 0.039
    scores, labels = scores_with([(Choice("a"), 60), (Choice("b"), 90), (DEFAULT, 96)], held, shift=9)
    assert scores[1].accuracy == pytest.approx(90) and scores[2].accuracy == pytest.approx(87)
    chosen, why = choose(scores, labels, held)
    assert chosen is scores[2] and "no method was certainly better" in why and "b reached 90.0 %" in why
    scores, labels = scores_with([(Choice("a"), 60), (DEFAULT, 91), (Choice("b"), 90)], held)
    chosen, why = choose(scores, labels, held)
    assert chosen is scores[1] and why == f"{DEFAULT.shown} was best on held-out images"


def test_few_images_say_little_but_not_nothing():
    held = torch.arange(100) % 5 == 0  # 20 images
    scores, labels = scores_with([(Choice("a"), 95), (DEFAULT, 85)], held)
    assert scores[0].accuracy == 95 and choose(scores, labels, held)[0] is scores[1]
    scores, labels = scores_with([(Choice("a"), 95), (DEFAULT, 50)], held)
    assert choose(scores, labels, held)[0] is scores[0]
    one = torch.arange(100) == 97  # a single image has no standard error
    scores, labels = scores_with([(Choice("a"), 100), (DEFAULT, 50)], one)
    assert choose(scores, labels, one)[0] is scores[1]


def test_of_equally_accurate_methods_the_surer_one_counts():
    held = torch.ones(100, dtype=torch.bool)
    scores, labels = scores_with([(Choice("a"), 90), (DEFAULT, 50)], held)
    surer = score(Choice("b"), 3 * scores[0].logits, labels, held)
    assert surer.accuracy == scores[0].accuracy and surer.loss < scores[0].loss
    assert choose([*scores, surer], labels, held)[0] is surer


def test_images_that_were_never_held_out_do_not_count():
    logits, labels = logits_with(50)
    held = torch.arange(100) < 50
    assert score(Choice("a"), logits, labels, held).accuracy == 100
    assert math.isnan(score(Choice("a"), logits, labels, ~torch.ones(100, dtype=torch.bool)).accuracy)


def test_gain_of_doubling():
    assert gain_of_doubling({4.0: 80.0}) is None
    assert gain_of_doubling({2.0: 60.0, 4.0: 80.0, 8.0: 90.0}) == pytest.approx(5)  # 20, 10, so 5
    assert gain_of_doubling({2.0: 60.0, 4.0: 70.0, 8.0: 98.0}) == pytest.approx(1)  # half of the errors at most
    assert gain_of_doubling({2.0: 60.0, 4.0: 59.0}) == 0


def test_interval():
    low, high = interval(80.0, 100)
    assert low == pytest.approx(71.1, abs=0.1) and high == pytest.approx(86.7, abs=0.1)  # Wilson's, by hand


def test_first_of_each():
    from dassl.data.datasets import Datum

    items = [Datum(f"{n}", n % 2) for n in range(6)]
    assert [item.impath for item in first_of_each(items, 2)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("truth", [0.3, 1.0, 4.0])
def test_temperature_is_found(truth):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial((logits / truth).softmax(dim=1), 1, generator=generator).squeeze(1)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(truth, rel=0.1)
    grid = torch.logspace(-1.5, 1.5, 301)
    naive = grid[torch.tensor([float(F.cross_entropy(logits / t, labels)) for t in grid]).argmin()]
    assert found == pytest.approx(float(naive), rel=0.05)
    assert fit_temperature(logits[:0], labels[:0]) == 1
    before = calibration_error(logits.softmax(dim=1), labels)
    after = calibration_error(calibrated_apart(logits, labels, torch.arange(4000) % 5), labels)
    assert after <= before + 0.5 and after < 3


def test_few_images_make_no_certainty():
    logits, labels = logits_with(10, 10)
    assert fit_temperature(logits, labels) > 0.2  # the likelihood alone would have the smallest there is


def test_unknown_rule_by_counting():
    known, unknown = torch.linspace(0.5, 1, 101), torch.linspace(0, 0.75, 151)
    rule = unknown_rule(known, unknown)
    assert float((known >= rule.threshold).float().mean()) >= 0.95
    assert rule.fpr95 == pytest.approx(100 * float((unknown >= rule.threshold).float().mean()))
    pairs = (known[:, None] > unknown).float() + 0.5 * (known[:, None] == unknown).float()
    assert rule.auroc == pytest.approx(100 * float(pairs.mean()), abs=1e-3)


# -------------------------------------------------------------------------------------------------- whole runs


def test_a_method_is_chosen_and_reported(make, photos, more_photos):
    clf = make(unknown="auto").fit(*photos)
    report = clf.report()
    assert clf.method_ in {choice.method for choice in CANDIDATES} and clf.score(*more_photos) > 0.8
    assert clf.config_.startswith("tiny")
    assert [row[0] for row in report.methods] == [choice.shown for choice in CANDIDATES]
    assert report.low <= report.accuracy <= report.high and report.images == 18 and report.classes == 3
    text, page = str(report), report._repr_html_()
    for word in ("expected accuracy", "calibration error", "AUROC"):
        assert word in text and word in page
    assert 0 < clf.threshold_ < 1
    noise = np.random.default_rng(0).integers(0, 255, (5, 40, 40, 3), dtype=np.uint8)
    answers = clf.set_params(unknown="auto").predict(noise)
    assert answers.dtype == object
    clf.threshold_ = 1.1
    assert clf.predict(more_photos[0]).tolist() == [None] * 12 and clf.score(*more_photos) == 0
    assert Report.from_dict(report.to_dict()) == report


def test_one_image_of_each_class_is_enough(make, tmp_path, more_photos):
    clf = make(unknown="auto").fit(*draw(tmp_path, dict.fromkeys(COLORS, 1)))
    assert clf.method_ == FIRST_CHOICE.method and clf.temperature_ == 1 and clf.threshold_ is None
    assert "none can be held out" in str(clf.report()) and clf.report().accuracy is None
    assert clf.score(*more_photos) > 0.6


def test_unequal_classes_count_the_same_in_losses():
    probe, gaussian = (next(one for one in CANDIDATES if one.method == name) for name in ("LinearProbe", "GDA"))
    unequal, equal = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    assert ("OPTIM.CLASS_WEIGHTS", "balanced") in balanced(probe, unequal).settings
    assert balanced(probe, equal) == probe and balanced(gaussian, unequal) == gaussian


def test_classes_may_have_different_numbers_of_images(make, tmp_path, more_photos):
    clf = make().fit(*draw(tmp_path, {"red": 1, "green": 2, "blue": 9}))
    assert "red had one image, which was never held out" in str(clf.report())
    assert clf.n_images_ == {"blue": 9, "green": 2, "red": 1} and clf.score(*more_photos) > 0.6


def test_methods_within_the_encoders_are_tried_where_there_is_time(make, photos):
    clf = make(time_limit=0.0).fit(*photos)
    (row,) = [row for row in clf.report().methods if row[0] == ADAPTED[0].shown]
    assert "needs about" in row[3] and row[1] == ""
    settings = {"OPTIM.MAX_EPOCH": 1}
    clf = make(time_limit=1e6, settings=settings).fit(*photos)
    (row,) = [row for row in clf.report().methods if row[0] == ADAPTED[0].shown]
    assert row[3] == "" and row[1].endswith("%")


def test_the_choice_is_the_same_twice(make, photos):
    rows = [make().fit(*photos).decision_function(photos[0]) for _ in range(2)]
    np.testing.assert_array_equal(*rows)


def test_on_the_command_line(tmp_path, tiny_weights, capsys):
    root = tmp_path / "photos"
    draw(root, dict.fromkeys(COLORS, 8))
    weights = ["MODEL.BACKBONE.WEIGHTS", tiny_weights] if tiny_weights else []
    argv = ["--trainer", "auto", "--backbone", "tiny", "--root", str(root), "--output-dir", str(tmp_path / "run")]
    assert train([*argv, *weights]) == 0
    out = capsys.readouterr().out
    assert "--trainer auto:" in out and "held-out accuracy" in out
    assert (tmp_path / "run" / "DONE").exists()
    for wrong, message in (
        (["--trainer", "auto", "--root", str(root)], "Expected --backbone"),
        ([*argv, "--config", "tiny"], "Expected no --config with --trainer auto"),
    ):
        assert train(wrong) == 2
        assert message in capsys.readouterr().err


def test_the_estimate_of_a_score_without_images_is_none():
    assert math.isnan(Score(FIRST_CHOICE).accuracy)
    with pytest.raises(InputError):
        FewShotClassifier("auto", config="tiny").fit([], [])
