import math

import pytest
import torch

from trainers.imo.dino import (
    DINOHead,
    clip_gradients,
    cosine_momentum,
    dino_loss,
    learning_rate,
    teacher_targets,
    teacher_temperature,
    update_centre,
    update_teacher,
)


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def test_centring_and_sharpening():
    outputs, centre = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.1, -0.4]]), torch.tensor([0.2, -0.1, 0.4])
    got = teacher_targets(outputs, centre, 0.05)
    for row, want in zip(got, outputs, strict=True):
        expected = softmax([(float(a) - float(c)) / 0.05 for a, c in zip(want, centre, strict=True)])
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    entropy = [-(p * p.log()).sum() for p in (teacher_targets(outputs[0], centre, t) for t in (0.04, 0.07, 1.0))]
    assert entropy[0] < entropy[1] < entropy[2]
    assert not teacher_targets(outputs.requires_grad_(), centre, 0.1).requires_grad


def test_loss_takes_every_pair_but_the_same_crop():
    torch.manual_seed(0)
    student, targets = torch.randn(5, 3, 4), torch.softmax(torch.randn(2, 3, 4), dim=-1)
    total, pairs = 0.0, 0
    for i in range(2):  # the teacher's global crops
        for j in range(5):  # all crops of the student
            if i == j:
                continue
            for b in range(3):
                p = softmax([float(v) / 0.1 for v in student[j, b]])
                total -= sum(float(q) * math.log(x) for q, x in zip(targets[i, b], p, strict=True)) / 3
            pairs += 1
    assert pairs == 8
    assert float(dino_loss(student, targets, 0.1)) == pytest.approx(total / pairs, rel=1e-4)


def test_centre_follows_the_mean_of_all_crops_and_images():
    centre = torch.tensor([1.0, -1.0])
    outputs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])  # [G, B, K]
    update_centre(centre, outputs, 0.9)
    torch.testing.assert_close(centre, torch.tensor([0.9 * 1 + 0.1 * 4.0, 0.9 * -1 + 0.1 * 5.0]))


def test_teacher_is_a_moving_average():
    teacher, student = [torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([3.0]), torch.tensor([6.0])]
    for _ in range(3):
        update_teacher(teacher, student, 0.8)
    assert [float(t) for t in teacher] == pytest.approx([3 - 2 * 0.8**3, 6 - 4 * 0.8**3])


def test_momentum_goes_from_0_9998_to_1_along_a_cosine():
    values = [cosine_momentum(step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.9998) and values[100] == 1.0 and values == sorted(values)
    assert values[50] == pytest.approx(0.9999)
    assert values[25] == pytest.approx(1 - 0.0002 * (1 + math.cos(math.pi / 4)) / 2)


def test_teacher_temperature_reaches_its_end_in_the_last_of_three_epochs():
    found = [teacher_temperature(epoch, 0.04, 0.07, 3) for epoch in range(5)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])
    assert teacher_temperature(0, 0.04, 0.07, 0) == 0.07
    assert [teacher_temperature(epoch, 0.04, 0.07, 1) for epoch in range(2)] == [0.04, 0.07]


def test_learning_rate_warms_up_and_then_follows_a_cosine_over_what_is_left():
    found = [learning_rate(step, 50, 10, 3e-4, 2e-6) for step in range(50)]
    want = [3e-4 * i / 9 for i in range(10)]
    want += [2e-6 + 0.5 * (3e-4 - 2e-6) * (1 + math.cos(math.pi * i / 40)) for i in range(40)]
    assert found == pytest.approx(want)
    assert [learning_rate(step, 4, 0, 1.0, 0.0) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])


def test_gradients_are_shortened_one_by_one():
    long, short, none = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    long.grad, short.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.1, 0.2])
    clip_gradients([long, short, none], 0.3)
    torch.testing.assert_close(long.grad, torch.tensor([0.18, 0.24]))
    assert short.grad.tolist() == pytest.approx([0.1, 0.2]) and none.grad is None


def test_head_against_plain_layers():
    torch.manual_seed(0)
    head = DINOHead(6, hidden=8, bottleneck=5, out=7)
    x = torch.randn(3, 6)
    state = {name: value.double() for name, value in head.state_dict().items()}
    y = x.double()
    for number in range(3):
        if number:
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ state[f"layers.{number}.weight"].t() + state[f"layers.{number}.bias"]
    y = y / y.norm(dim=1, keepdim=True)
    last = state["last"] / state["last"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x), (y @ last.t()).float(), rtol=1e-4, atol=1e-6)


def test_a_frozen_last_layer_gets_no_gradient():
    head = DINOHead(6, hidden=8, bottleneck=5, out=7)
    head.freeze_last = True
    head(torch.randn(3, 6)).sum().backward()
    assert head.last.grad is None and all(p.grad is not None for p in head.layers.parameters())
    head.freeze_last = False
    head(torch.randn(3, 6)).sum().backward()
    assert head.last.grad is not None
