import numpy as np
import pytest
import torch

from trainers.imo import draw_histograms, measure
from trainers.imo import measures as module


def blobs(n, spread, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return torch.eye(8)[labels] + offset + spread * torch.randn(n, 8, generator=generator), labels


def naive(features, labels, bins):
    """Pair by pair."""
    unit = [np.asarray(x, dtype=float) / np.linalg.norm(x) for x in features]
    found = {True: np.zeros(bins), False: np.zeros(bins)}
    for i in range(len(unit)):
        for j in range(i + 1, len(unit)):
            place = int(np.clip((unit[i] @ unit[j] + 1) / 2 * bins, 0, bins - 1))
            found[bool(labels[i] == labels[j])][place] += 1
    p, q = (found[kind] / found[kind].sum() for kind in (True, False))
    return np.minimum(p, q).sum(), np.stack(unit).var(axis=0).mean(), p, q


@pytest.mark.parametrize("chunk", [7, 1024])
def test_against_pairs_one_by_one(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    features, labels = blobs(30, 0.6)
    overlap, variance, same, different = naive(features.numpy(), labels.numpy(), 40)
    found = measure(features, labels, bins=40)
    assert found.overlap == pytest.approx(overlap) and found.variance == pytest.approx(variance, rel=1e-4)
    np.testing.assert_allclose(found.same, same, atol=1e-9)
    np.testing.assert_allclose(found.different, different, atol=1e-9)


def test_extremes():
    assert measure(*blobs(60, 0.01)).overlap == 0
    features, _ = blobs(200, 3.0)
    assert measure(features, torch.arange(200) % 2).overlap > 0.9
    assert measure(*blobs(60, 0.3, offset=2.0)).variance < measure(*blobs(60, 0.3)).variance


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_one_kind_of_pairs_is_not_enough(labels):
    with pytest.raises(ValueError, match="Expected pairs of images of one class and of two"):
        measure(torch.randn(3, 4), torch.tensor(labels))


def test_figure_shows_both_histograms(tmp_path):
    before, after = measure(*blobs(60, 0.8)), measure(*blobs(60, 0.2))
    figure = draw_histograms(before, after, "blobs")
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    for ax, found in zip(figure.axes, (before, after), strict=True):
        assert f"overlap {found.overlap:.3f}" in ax.get_title()
        assert len(ax.collections) == 2
