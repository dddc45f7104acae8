"""The benchmark of the input pipeline at toy size: real files, real loading processes."""

import json

import torch

from benchmarks import input_pipeline


def test_every_way_reads_every_photo(tmp_path, monkeypatch):
    monkeypatch.setattr(input_pipeline, "SIZES", ((300, 240), (1000, 920)))
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{input_pipeline.BEGIN}\nold\n{input_pipeline.END}\nafter\n")
    threads = torch.get_num_threads()
    flags = ["--files", "4", "--rounds", "1", "--workers", "1", "--output", str(tmp_path / "o.json")]
    assert input_pipeline.main([*flags, "--document", str(document)]) == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "o.json").read_text())
    assert [(row["size"], row["way"]) for row in found["rows"]] == [
        (size, way) for size in ("300 x 240", "1000 x 920") for way in input_pipeline.WAYS
    ]
    assert all(row["cpu_ms"] > 0 and row["images_per_second"]["1"] > 0 for row in found["rows"])
    # Photos whose shorter side has less than twice 448 pixels are whole anyway.
    changed = {row["size"]: row["changed"] for row in found["rows"] if row["way"] == "reduced"}
    assert changed["300 x 240"] == 0 < changed["1000 x 920"] < 1
    text = document.read_text()
    assert (
        text.startswith("before") and text.endswith("after\n") and "INPUT.DECODE reduced" in text and "old" not in text
    )
