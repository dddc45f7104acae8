"""The words nearest to learnt context vectors."""

import pytest
import torch

from dassl.engine import build_trainer
from scripts import interpret_prompts
from scripts.interpret_prompts import nearest_tokens, spelled


@pytest.fixture
def run(tmp_path, random_tiny):
    """run(trainer, folder of its configs, KEY, VALUE, ...) -> the folder of a short run."""
    import datasets
    import trainers
    from dassl.config import get_cfg_default

    def train(name, folder, *pairs):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(f"configs/trainers/{folder}/tiny.yaml")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / name), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1])
        cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, "TEST.NO_TEST", True])
        cfg.merge_from_list(["OPTIM.MAX_EPOCH", 1, "OPTIM.WARMUP_EPOCH", 1, *pairs])  # the rate is 1e-5: nothing moves
        cfg.freeze()
        build_trainer(cfg).train()
        return tmp_path / name

    return train


def test_nearest_tokens_are_the_naive_ones():
    generator = torch.Generator().manual_seed(0)
    context, embeddings = torch.randn(3, 5, generator=generator), torch.randn(20, 5, generator=generator)
    for known in (None, {3, 4, 11, 15}):
        got = nearest_tokens(context, embeddings, 3, known)
        for vector, row in zip(context, got, strict=True):
            ids = range(20) if known is None else known
            want = sorted((float((vector - embeddings[i]).norm()), i) for i in ids)[:3]
            assert [i for i, _ in row] == [i for _, i in want]
            assert [d for _, d in row] == pytest.approx([d for d, _ in want], abs=1e-5)
    assert len(nearest_tokens(context, embeddings, 9, {1, 2})[0]) == 2


def test_spelling():
    assert spelled(320) == "a"  # id of "a</w>"
    assert spelled(64).endswith("-")


def test_a_context_that_has_not_moved_is_its_words(run, capsys):
    folder = run("KgCoOp", "kgcoop")
    assert interpret_prompts.main([str(folder), "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["vector", "1", "2"]
    assert [row[0] for row in cells[2:]] == ["1", "2", "3", "4"]
    assert [row[1].split()[0] for row in cells[2:]] == ["a", "photo", "of", "a"]
    assert all(float(row[1].split()[1]) < 0.01 < float(row[2].split()[1]) for row in cells[2:])


def test_a_context_of_each_class(run, capsys):
    folder = run("CoOp", "coop", "TRAINER.COOP.CSC", True, "TRAINER.COOP.CTX_INIT", "", "TRAINER.COOP.N_CTX", 3)
    assert interpret_prompts.main([str(folder), "--classes", "two,one"]) == 0
    out = capsys.readouterr().out
    assert out.index("\ntwo\n") < out.index("\none\n") and "\nthree\n" not in out


def test_what_is_no_run_of_prompts(run, capsys, tmp_path):
    folder = run("MMA", "mma")
    assert interpret_prompts.main([str(folder)]) == 2
    assert "Expected a run of a prompt method but got one of MMA" in capsys.readouterr().err
    assert interpret_prompts.main([str(tmp_path / "nowhere")]) == 2
    assert interpret_prompts.main([str(folder), "--top-k", "0"]) == 2
