"""The evaluator's console block is read by other programs: it is compared letter by letter."""

from __future__ import annotations

import pytest
import torch

from dassl.config import get_cfg_default
from dassl.evaluation import EVALUATOR_REGISTRY, Classification, EvaluatorBase, build_evaluator
from dassl.utils import InputError


def make_cfg(tmp_path, *pairs):
    cfg = get_cfg_default()
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), *pairs])
    return cfg


def logits_for(predicted: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


def test_block_and_results(tmp_path, caplog):
    caplog.set_level("INFO")
    evaluator = build_evaluator(make_cfg(tmp_path), lab2cname={0: "cat", 1: "dog", 2: "cow"})
    assert isinstance(evaluator, Classification)
    evaluator.process(logits_for([0] * 900 + [1] * 100, 3), torch.zeros(1000, dtype=torch.long))
    evaluator.process(logits_for([1] * 224 + [0], 3), torch.ones(225, dtype=torch.long))
    results = evaluator.evaluate()
    assert list(results) == ["accuracy", "error_rate", "macro_f1"]
    assert results["accuracy"] == 100 * 1124 / 1225
    assert results["error_rate"] == 100 - results["accuracy"]
    f1 = [2 * 900 / (1000 + 901), 2 * 224 / (225 + 324)]
    assert results["macro_f1"] == pytest.approx(50 * sum(f1))
    assert caplog.messages[-1] == (
        "=> result\n* total: 1,225\n* correct: 1,124\n* accuracy: 91.8%\n* error: 8.2%\n* macro_f1: 88.1%"
    )
    evaluator.reset()
    evaluator.process(logits_for([2, 2], 3), torch.tensor([2, 1]))
    assert evaluator.evaluate()["accuracy"] == 50.0


def test_per_class_results(tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = make_cfg(tmp_path, "TEST.PER_CLASS_RESULT", True)
    evaluator = Classification(cfg, lab2cname={0: "cat", 1: "dog", 2: "cow"})
    evaluator.process(logits_for([2, 0, 1, 0], 3), torch.tensor([2, 2, 2, 0]))
    results = evaluator.evaluate()
    assert list(results)[-1] == "perclass_accuracy"
    assert results["perclass_accuracy"] == pytest.approx((100 + 100 / 3) / 2)
    assert caplog.messages[-4:] == [
        "=> per-class result",
        "* class: 0 (cat)\ttotal: 1\tcorrect: 1\tacc: 100.0%",
        "* class: 2 (cow)\ttotal: 3\tcorrect: 1\tacc: 33.3%",
        "* average: 66.7%",
    ]
    with pytest.raises(InputError, match="lab2cname"):
        Classification(cfg)


def test_confusion_matrix_is_a_tensor_that_the_safe_loader_reads(tmp_path, caplog):
    caplog.set_level("INFO")
    evaluator = Classification(make_cfg(tmp_path, "TEST.COMPUTE_CMAT", True))
    evaluator.process(logits_for([0, 1, 1, 1], 3), torch.tensor([0, 0, 1, 1]))
    evaluator.evaluate()
    matrix = torch.load(tmp_path / "cmat.pt", weights_only=True)
    assert matrix.dtype is torch.float64
    assert matrix.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert caplog.messages[-1] == f"Confusion matrix is saved to {tmp_path / 'cmat.pt'}"


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(InputError, match="at least one batch"):
        Classification(make_cfg(tmp_path)).evaluate()


def test_evaluators_of_others(tmp_path, monkeypatch):
    class Mine(EvaluatorBase):
        def __init__(self, cfg, lab2cname=None):
            super().__init__(cfg)

    monkeypatch.setitem(EVALUATOR_REGISTRY._obj_map, "Mine", Mine)
    evaluator = build_evaluator(make_cfg(tmp_path, "TEST.EVALUATOR", "Mine"), lab2cname={})
    assert isinstance(evaluator, Mine)
    with pytest.raises(InputError, match='got "Clasification"'):
        build_evaluator(make_cfg(tmp_path, "TEST.EVALUATOR", "Clasification"))
