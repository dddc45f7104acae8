"""The oracle's mixture of finished runs: what it adds up, and what it refuses."""

import json

import pytest
import torch

from dassl.evaluation.predictions import Recorder, save_predictions
from scripts.dev import mixture_ceiling

HEADS = ("clip", "cma", "glr", "proto", "proto_cma")


def write_run(folder, heads, labels, seed, limit=10**6):
    recorder = Recorder(len(labels), limit)
    recorder.add(heads, labels)
    folder.mkdir(parents=True)
    kept = recorder.finish("test", next(reversed(heads)), "clip", {0: "a", 1: "b", 2: "c"})
    save_predictions(folder / "predictions.safetensors", kept)
    metrics = {"trainer": "DLRCLIP", "dataset": "Digits", "shots": 4, "seed": seed}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "DONE").write_text("{}")


def test_the_table_has_each_share(tmp_path, capsys):
    """One branch is right on the first half of the images, one on the other, each unsure elsewhere."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=generator)
    right = 4.0 * torch.nn.functional.one_hot(labels, 3)
    unsure = 0.5 * torch.randn(40, 3, generator=generator)
    first = torch.arange(40)[:, None] < 20
    heads = {name: torch.randn(40, 3, generator=generator) for name in HEADS[1:4]}
    heads = {"clip": torch.where(first, right, unsure), **heads, "proto_cma": torch.where(first, unsure, right)}
    for seed in (1, 2):
        write_run(tmp_path / f"seed{seed}", {**heads, "mixed": heads["clip"]}, labels, seed)
    assert mixture_ceiling.main([str(tmp_path)]) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    own = 100 * float((heads["clip"].argmax(1) == labels).float().mean())
    some = torch.stack([head.argmax(1) == labels for head in heads.values()]).any(0)
    assert row[:4] == ["Digits", "4", "2", f"{own:.1f}"] and row[5] == f"{100 * float(some.float().mean()):.1f}"
    assert own < 80 and float(row[4]) > 95


@pytest.mark.parametrize("heads, limit", [({"clip": 1}, 10**6), ({"clip": 1, "mixed": 1}, 1500)])
def test_runs_without_what_is_needed_are_named(heads, limit, tmp_path, capsys):
    labels = torch.arange(30) % 3
    write_run(tmp_path / "run", {name: torch.randn(30, 3) for name in heads}, labels, 1, limit)
    assert mixture_ceiling.main([str(tmp_path)]) == 2
    assert "error: Expected" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert mixture_ceiling.main([str(tmp_path / "empty")]) == 2
