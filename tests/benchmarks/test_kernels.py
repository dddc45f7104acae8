"""Counting the kernels of a step: a case by hand, and the command at toy size."""

import json

import torch

from benchmarks import kernels
from trainers.clip.text import SHARING_COST


def test_a_case_by_hand():
    x, w, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    with kernels.KernelCount() as found:
        y = torch.nn.functional.linear(x, w, b)  # one product with its bias
        z = y.view(8)[:4].unsqueeze(0).detach()  # views
        z = (z + 1).exp_().sum()  # three
        torch.empty(3)
        float(z)
    assert found.count == 4


def test_the_command_writes_a_file_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setitem(SHARING_COST, "cuda", 60)  # 20 prompts share 5 tokens: 95 are saved; 10 prompts: 45
    document, output = tmp_path / "doc.md", tmp_path / "kernels.json"
    document.write_text(f"before\n{kernels.BEGIN}\nold\n{kernels.END}\nafter\n")
    flags = ["--classes", "10", "20", "--output", str(output), "--document", str(document)]
    assert kernels.main(flags) == 0
    assert "cpu" not in SHARING_COST
    rows = json.loads(output.read_text())["rows"]
    assert [row["classes"] for row in rows] == [10] * 4 + [20] * 4
    count = {(row["classes"], row["step"]): row["forward"] + row["backward"] for row in rows}
    few, many = ({step: n for (classes, step), n in count.items() if classes == c} for c in (10, 20))
    assert few["as published"] == many["as published"]  # the number of classes is no matter of kernels
    assert few["accelerated, kept views"] < few["accelerated"] < few["as published"] < few[kernels.ALWAYS]
    assert many["accelerated"] == many[kernels.ALWAYS] == few[kernels.ALWAYS]
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "| accelerated" in text and "old" not in text
