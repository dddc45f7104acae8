import itertools
import math

import pytest

from dassl.utils import InputError
from scripts.lib.lead import lead_table, wins_ties_losses
from scripts.lib.tables import Record, collect

NAMES = ("dataset", "shots", "ours", "best", "its", "difference", "p", "wins", "better")


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [dict(zip(NAMES, [cell.strip() for cell in line.strip("|").split("|")], strict=True)) for line in lines]


def records(**methods):
    return [
        Record("digits", name, 4, seed, value)
        for name, values in methods.items()
        for seed, value in enumerate(values, 1)
    ]


def test_wins_ties_and_losses():
    ours, other = {1: 3.0, 2: 2.0, 3: 1.0, 4: 9.0}, {1: 2.0, 2: 2.0, 3: 2.0, 5: 0.0}
    assert wins_ties_losses(ours, other) == (1, 1, 1)
    assert wins_ties_losses({1: 3.0}, {1: 2.0}, higher=False) == (0, 0, 1)


def test_the_best_other_method_and_the_number_of_those_that_are_beaten():
    cells = collect(records(A=[80, 81, 85], B=[79, 79, 84], C=[60, 61, 64], D=[81, 70, 83]))
    (row,) = rows(lead_table(cells, "A"))
    differences = [1, 2, 1]
    mean = sum(differences) / 3
    t = mean / (math.sqrt(sum((d - mean) ** 2 for d in differences) / 2) / math.sqrt(3))
    p = 1 - t / math.sqrt(2 + t * t)  # two-sided p of Student's t with two degrees of freedom
    assert row["ours"] == "82.0" and row["best"] == "B" and row["its"] == "80.7" and row["difference"] == "+1.3"
    assert float(row["p"]) == pytest.approx(p, abs=6e-4) and row["wins"] == "3/0/0"
    assert row["better"] == "1/0 of 3"  # C; B and D differ less than their spread


def test_lower_is_better_where_it_is():
    cells = collect(records(A=[5, 6, 7], B=[3, 3, 5]))
    (row,) = rows(lead_table(cells, "A", higher=False))
    assert row["wins"] == "0/0/3" and row["better"] == "0/1 of 1"


def test_each_dataset_shots_and_the_average_have_a_row():
    found = [
        Record(dataset, method, shots, seed, 50.0 + seed * len(method))
        for dataset, method, shots, seed in itertools.product(("a", "b"), ("x", "xx"), (1, 4), (1, 2, 3))
    ]
    table = rows(lead_table(collect(found), "xx"))
    assert [(row["dataset"], row["shots"]) for row in table] == [
        (dataset, shots) for dataset in ("a", "b", "average") for shots in ("1", "4")
    ]


def test_seeds_that_only_one_has_do_not_count():
    cells = collect([Record("d", "A", 1, 1, 9.0), Record("d", "B", 1, 2, 8.0)])
    assert rows(lead_table(cells, "A"))[0]["its"] == "no common seed"


def test_a_method_without_runs_is_an_error():
    with pytest.raises(InputError, match="Expected finished runs of Z"):
        lead_table(collect(records(A=[1.0], B=[2.0])), "Z")
    with pytest.raises(InputError, match="Expected finished runs of A"):
        lead_table(collect(records(A=[1.0])), "A")
