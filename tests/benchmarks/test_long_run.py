"""The long run's script, on a short one: files stay open no longer than needed, and logs grow by what a step says."""

from __future__ import annotations

from benchmarks import long_run


def test_a_short_run_opens_no_more_files_and_logs_little(random_tiny, monkeypatch):
    monkeypatch.setattr("dassl.engine.hooks.tensorboard.TensorBoard._pictures", lambda *arguments: None)
    pairs = ("MODEL.BACKBONE.WEIGHTS", str(random_tiny), "TRAINER.COOP.PREC", "fp32")
    samples = long_run.measure("CoOp", 30, 6, pairs)
    assert [sample.step for sample in samples] == [5, 10, 15, 20, 25, 30]
    warm = samples[2:]
    # One comes and goes: TensorBoard's thread opens its file to write. One left open by each evaluation would show.
    assert max(sample.open_files for sample in warm) <= warm[0].open_files + 1
    assert max(sample.threads for sample in warm) <= warm[0].threads + 1
    assert max(sample.rss for sample in warm) / warm[0].rss < 1.02
    steps = samples[-1].step - samples[0].step
    assert 0 < (samples[-1].log - samples[0].log) / steps < 200  # bytes
    events = [sample.events for sample in samples]
    assert events == sorted(set(events)) and (events[-1] - events[0]) / steps < 1000
    assert long_run.growth(samples) < 0.02


def test_what_cannot_be_shared_out_is_refused(capsys):
    assert long_run.main(["--steps", "7", "--evaluations", "2"]) == 2
    assert "Expected --steps to be a multiple of 10 but got 7" in capsys.readouterr().err
