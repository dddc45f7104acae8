"""How sets of test images are drawn for transductive methods, beside the same rules written out image by image."""

from collections import Counter

import numpy as np
import pytest
import torch

from dassl.engine import build_trainer
from trainers.base.transductive import TransductiveConfig, draw_streams, draw_tasks


def labels_of(counts, seed=0):
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def test_tasks_of_a_number_of_classes_in_a_range():
    labels = labels_of([30, 20, 0, 40, 25, 5])  # class 2 has no image
    tasks = draw_tasks(labels, 12, 2, 400, seed=3, most=4)
    numbers, classes, sizes = Counter(), Counter(), Counter()
    for rows in tasks:
        assert len(set(rows)) == len(rows)
        present = {int(labels[row]) for row in rows}
        numbers[len(present)] += 1
        classes.update(present)
        sizes[len(rows)] += 1
    assert set(numbers) <= {1, 2, 3, 4} and min(numbers[n] for n in (2, 3, 4)) > 50  # a class may be missed by chance
    assert set(classes) == {0, 1, 3, 4, 5} and set(sizes) == {12}
    assert tasks == draw_tasks(labels, 12, 2, 400, seed=3, most=4) != draw_tasks(labels, 12, 2, 400, seed=4, most=4)


def test_tasks_are_cut_to_what_there_is():
    labels = labels_of([3, 4, 50])
    for rows in draw_tasks(labels, 20, 1, 60, seed=0, most=1):  # all images of a class that has fewer
        (label,) = {int(labels[row]) for row in rows}
        assert len(rows) == min(20, [3, 4, 50][label])
    tasks = draw_tasks(labels, 40, 2, 30, seed=0, most=90)
    assert {len({int(labels[row]) for row in rows}) for rows in tasks} <= {2, 3} and len(tasks) == 30
    assert draw_tasks(labels, 57, 3, 30, seed=0, most=5) == [list(range(57))]  # each would be the whole
    assert len(draw_tasks(labels, 56, 3, 30, seed=0, most=5)) == 30


def naive_streams(labels, size, gamma, count, seed):
    rng = np.random.default_rng(seed)
    classes = sorted(set(labels))
    slots = min(len(labels) // size, len(classes))
    tasks = []
    for _ in range(count):
        if gamma < 0:
            order = [classes[i] for i in rng.permutation(len(classes))]
            places = [[i for i, y in enumerate(labels) if y == c] for c in order]
        else:
            places = [[] for _ in range(slots)]
            for c, shares in zip(classes, rng.dirichlet([gamma] * slots, len(classes)), strict=True):
                own = [i for i, y in enumerate(labels) if y == c]
                total, ends = 0.0, []
                for share in shares[:-1]:
                    total += share
                    ends.append(int(total * len(own)))
                for slot, (a, b) in enumerate(zip([0, *ends], [*ends, len(own)], strict=True)):
                    places[slot] += own[a:b]
        stream = [place for part in places for place in (part[i] for i in rng.permutation(len(part)))]
        tasks += [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    return tasks


@pytest.mark.parametrize("gamma", [10.0, 0.1, 0.01, 0.001, -1.0])
@pytest.mark.parametrize("size", [7, 16, 60])
def test_streams_against_naive(gamma, size):
    labels = labels_of([13, 9, 0, 17, 21])
    tasks = draw_streams(labels, size, gamma, 3, seed=5)
    assert tasks == naive_streams(labels.tolist(), size, gamma, 3, 5)
    each = 60 // size
    assert len(tasks) == 3 * each
    for number in range(3):  # no image twice in a stream
        rows = [row for task in tasks[number * each : (number + 1) * each] for row in task]
        assert len(set(rows)) == len(rows) == each * size


def test_the_less_gamma_the_fewer_classes_of_a_set():
    labels = labels_of([40] * 10)
    present = []
    for gamma in (100.0, 0.1, 0.001, -1.0):
        tasks = draw_streams(labels, 40, gamma, 20, seed=1)
        present.append(np.mean([len(set(labels[task].tolist())) for task in tasks]))
    assert present[0] > 9 > present[1] > present[2] > present[3] == 1


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda labels: draw_tasks(labels, 5, 4, 1, 0), "tasks of at most 3 classes but got 4"),
        (lambda labels: draw_tasks(labels, 6, 2, 1, 0), "tasks of at most 5 images from any 2 classes but got 6"),
        (lambda labels: draw_streams(labels, 10, 0.1, 1, 0), "tasks of at most 9 images but got 10"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(labels_of([2, 3, 4]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task_size": 9, "task_classes": 3, "task_classes_most": 2},
            r"_MOST to be 0 or at least TASK_CLASSES \(3\) but",
        ),
        ({"task_size": 9, "stream": -0.5}, "STREAM to be -1, 0 or above 0 but got -0.5"),
        ({"task_size": 9, "stream": 0.1, "task_classes_most": 7}, "_MOST to be 0 with TRAINER.X.STREAM but got 7"),
        ({"stream": 0.1}, "TASK_SIZE to be above 0 where tasks are drawn but got 0"),
        ({"task_classes_most": 7}, "TASK_SIZE to be above 0 where tasks are drawn but got 0"),
    ],
)
def test_keys_that_contradict_each_other_are_named(settings, message):
    with pytest.raises(ValueError, match=f"Expected TRAINER.X.*{message}"):
        TransductiveConfig(**settings).check("TRAINER.X")


def test_keys_say_how_sets_are_drawn():
    labels = labels_of([4, 5, 6])
    given = labels.tolist()
    assert TransductiveConfig().draw(given, 1) == [list(range(15))]
    assert TransductiveConfig(task_size=3, task_classes=2, num_tasks=4).draw(given, 1) == draw_tasks(labels, 3, 2, 4, 1)
    ranged = TransductiveConfig(task_size=3, task_classes=1, task_classes_most=3, num_tasks=4)
    assert ranged.draw(given, 2) == draw_tasks(labels, 3, 1, 4, 2, 3)
    stream = TransductiveConfig(task_size=3, stream=0.1, num_tasks=2)
    assert stream.draw(given, 3) == draw_streams(labels, 3, 0.1, 2, 3)


def test_every_method_has_the_same_sets(small_run):
    given = {}
    for folder, name in (("em_dirichlet", "EMDirichlet"), ("transclip", "TransCLIP"), ("stata", "StatA")):
        node = f"TRAINER.{name.upper()}"
        pairs = (
            f"{node}.TASK_SIZE",
            20,
            f"{node}.TASK_CLASSES",
            2,
            f"{node}.TASK_CLASSES_MOST",
            5,
            f"{node}.NUM_TASKS",
            4,
        )
        trainer = build_trainer(small_run(folder)(name, *pairs, "SEED", 7))
        assert len(trainer.test_loader) == 4
        given[name] = [batch["index"].tolist() for batch in trainer.test_loader]
        (validation,) = trainer.val_loader
        assert validation["index"].tolist() == list(range(20))
    assert given["EMDirichlet"] == given["TransCLIP"] == given["StatA"] and len(given["StatA"][0]) == 20
