import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dassl.config import get_cfg_default
from dassl.utils import read_image
from datasets import extend_cfg
from datasets.digits import CLASSES, Digits, digit_image


def make_cfg(root="", shots=-1, seed=1, classes="all"):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(
        ["DATASET.ROOT", str(root), "DATASET.NUM_SHOTS", shots, "SEED", seed, "DATASET.SUBSAMPLE_CLASSES", classes]
    )
    return cfg


def test_image_is_the_source_enlarged():
    pixels = load_digits().images[0]
    image = digit_image(pixels)
    assert image.size == (64, 64) and image.mode == "L"
    back = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
    assert np.corrcoef(back.ravel(), pixels.ravel())[0, 1] > 0.97
    assert np.asarray(image)[:, :4].max() < 40  # dark border


def test_all_images_are_there_once_with_their_labels(digits_cache):
    dataset = Digits(make_cfg())
    assert dataset.classnames == list(CLASSES)
    sizes = [len(part) for part in (dataset.train_x, dataset.val, dataset.test)]
    assert sum(sizes) == 1797 and sizes == [898, 359, 540]
    everything = [*dataset.train_x, *dataset.val, *dataset.test]
    assert len({item.impath for item in everything}) == 1797
    target = load_digits().target
    for item in everything:
        assert item.impath.startswith(str(digits_cache))
        assert target[int(item.impath[-8:-4])] == item.label
        assert item.classname == CLASSES[item.label]


def test_few_shots_and_halves(digits_cache):
    dataset = Digits(make_cfg(shots=4, classes="new"))
    assert dataset.classnames == ["five", "six", "seven", "eight", "nine"]
    assert len(dataset.train_x) == len(dataset.val) == 20
    assert read_image(dataset.train_x[0].impath).size == (64, 64)


def test_the_split_is_the_same_everywhere_and_never_below_the_root(digits_cache, tmp_path, monkeypatch, caplog):
    first = Digits(make_cfg(shots=1))
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    second = Digits(make_cfg(tmp_path / "photos", shots=1))
    assert (tmp_path / "cache" / "digits" / "split.json").is_file() and not any((tmp_path / "photos").iterdir())
    assert f"lie in {tmp_path / 'cache'}, not in {tmp_path / 'photos'}" in caplog.text
    assert first.split_digest == second.split_digest
    assert [i.impath[-10:] for i in first.train_x] == [i.impath[-10:] for i in second.train_x]


@pytest.mark.parametrize("shots", [200, 0])
def test_impossible_shots(digits_cache, shots):
    with pytest.raises(ValueError, match="NUM_SHOTS"):
        Digits(make_cfg(shots=shots))
