"""Statistics over seeds and the tables made of them."""

from __future__ import annotations

import csv
import io
import math

import pytest
from scipy import stats

from scripts.lib.tables import (
    Record,
    bold_cells,
    collect,
    comma_separated,
    latex,
    markdown,
    paired_p,
    significantly_best,
    summarize,
)

CLOSE = {1: 80.0, 2: 82.0, 3: 84.0}  # the seeds differ much, the methods little
BETTER = {1: 81.0, 2: 83.1, 3: 84.9}


def records(**methods):
    return [Record("Digits", m, 16, seed, v) for m, values in methods.items() for seed, v in values.items()]


def test_interval_is_students():
    values = [80.0, 82.0, 87.0]
    mean, sd, half, n = summarize(values)
    low, high = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(values))
    assert (mean, n) == (83.0, 3)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert sd == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert math.isnan(summarize([5.0]).half)
    assert summarize([60.0, 65.4]) == (62.7, pytest.approx(5.4 / 2**0.5), pytest.approx(2.7), 2)  # t would say ±34.3
    with pytest.raises(ValueError, match="at least one value"):
        summarize([])


def test_pairing_finds_what_the_spread_over_seeds_hides():
    unpaired = stats.ttest_ind(list(BETTER.values()), list(CLOSE.values())).pvalue
    assert unpaired > 0.4
    assert paired_p(BETTER, CLOSE) == pytest.approx(stats.ttest_rel(list(BETTER.values()), list(CLOSE.values())).pvalue)
    assert paired_p(BETTER, CLOSE) < 0.05
    assert significantly_best({"a": CLOSE, "b": BETTER}) == "b"
    assert significantly_best({"a": CLOSE, "b": BETTER}, higher=False) == "a"


@pytest.mark.parametrize(
    "other",
    [{1: 81.0, 2: 83.0, 3: 85.0}, {1: 90.0}, {7: 1.0, 8: 2.0}, {1: 70.0, 2: 99.0, 3: 80.0}],
    ids=["no spread", "one seed in common", "no seed in common", "noise"],
)
def test_nothing_is_claimed_where_nothing_is_known(other):
    assert significantly_best({"a": CLOSE, "b": other}) is None


def test_the_best_must_beat_each_of_the_others():
    level = {seed: value + 0.3 * (-1) ** seed for seed, value in BETTER.items()}
    assert significantly_best({"a": CLOSE, "b": BETTER, "c": level}) is None
    assert significantly_best({"a": CLOSE}) is None


def test_average_over_datasets_is_taken_seed_by_seed():
    cells = collect(
        [Record("A", "x", 1, s, v) for s, v in ((1, 10.0), (2, 20.0), (3, 1.0))]
        + [Record("B", "x", 1, s, v) for s, v in ((2, 40.0), (1, 30.0))]
        + [Record("A", "y", 1, 1, 50.0)]
    )
    assert cells["average", "x", 1] == {1: 20.0, 2: 30.0}
    assert ("average", "y", 1) not in cells
    with pytest.raises(ValueError, match="one value"):
        collect([Record("A", "x", 1, 1, 1.0), Record("A", "x", 1, 1, 1.0)])


def test_two_seeds_have_a_range_and_no_interval():
    cells = collect(records(a={1: 60.0, 2: 65.4}))
    assert "62.7 (3.8) ±2.7" in markdown(cells)
    (row,) = csv.DictReader(io.StringIO(comma_separated(cells)))
    assert row["ci95_low"] == row["ci95_high"] == "" and float(row["sd"]) == pytest.approx(5.4 / 2**0.5)


def test_tables_show_the_same_numbers():
    cells = collect(records(a=CLOSE, b=BETTER))
    assert bold_cells(cells) == {("Digits", "b", 16)}
    rows = list(csv.DictReader(io.StringIO(comma_separated(cells))))
    assert [(r["method"], r["best"]) for r in rows] == [("a", "0"), ("b", "1")]
    assert float(rows[1]["mean"]) == summarize(BETTER.values()).mean
    assert float(rows[1]["ci95_high"]) - float(rows[1]["mean"]) == pytest.approx(summarize(BETTER.values()).half)
    assert "**83.0** (2.0) ±4.8" in markdown(cells) and "82.0 (2.0) ±5.0" in markdown(cells)
    assert "$\\mathbf{83.0}_{\\pm 2.0}$" in latex(cells)


def test_names_cannot_break_a_table():
    cells = collect([Record("D", "a|b\nc_{x}%", 1, 1, 5.0)])
    assert len([line for line in markdown(cells).splitlines() if line.startswith("|")]) == 3
    assert "a|b c\\_\\{x\\}\\%" in latex(cells)
    assert next(csv.DictReader(io.StringIO(comma_separated(cells))))["method"] == "a|b c_{x}%"
