"""Files, JSON, seeds, names, images, meters."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import stat

import numpy as np
import pytest
import torch
from PIL import Image

import dassl.utils as utils
from dassl.utils import AverageMeter, InputError, MetricMeter, UnknownNameError, atomic_write


def test_all_names_are_there():
    for name in utils.__all__:
        assert hasattr(utils, name), name
    assert set(utils.__all__) == set(utils._HOME) <= set(dir(utils))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        utils.no_such_name  # noqa: B018
    assert utils.tools.read_image is utils.read_image  # a module of the package, as an attribute


# errors


def test_input_error_is_one_line_even_from_a_worker():
    told = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise InputError\ndassl.utils.errors.InputError: Expected a but got b\n'
    )
    error = InputError(told)
    assert str(error) == "Expected a but got b"
    assert error.worker_traceback == told
    assert str(InputError("plain: InputError: text")) == "plain: InputError: text"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_unknown_name_error_prints_without_quotes():
    assert str(UnknownNameError("no x")) == "no x"
    assert issubclass(UnknownNameError, KeyError) and issubclass(UnknownNameError, ValueError)


# atomic_write


def test_atomic_write_text_and_bytes(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as stream:
        stream.write("é")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "é"
    with atomic_write(str(path), "wb") as stream:
        stream.write(b"\x00")
    assert path.read_bytes() == b"\x00"
    assert os.listdir(path.parent) == ["a.txt"]


def test_atomic_write_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_write_has_ordinary_permissions_and_draws_nothing(tmp_path):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with atomic_write(tmp_path / "a"):
        pass
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_atomic_write_modes(tmp_path):
    with pytest.raises(ValueError, match='"w" or "wb"'), atomic_write(tmp_path / "a", "a"):
        pass


# tools


def test_json(tmp_path):
    path = tmp_path / "new" / "a.json"
    utils.write_json({"train": [["a.jpg", 0, "cat"]]}, path)
    assert path.read_text().startswith('{\n    "train": [\n        [\n            "a.jpg",\n            0,')
    assert utils.read_json(str(path)) == {"train": [["a.jpg", 0, "cat"]]}
    path.write_text("{")
    with pytest.raises(InputError, match=r"a\.json.*to hold JSON"):
        utils.read_json(path)
    with pytest.raises(InputError, match="found none"):
        utils.read_json(tmp_path / "b.json")


def test_listing_and_folders(tmp_path):
    utils.mkdir_if_missing(str(tmp_path / "b" / "c"))
    utils.mkdir_if_missing(str(tmp_path / "b" / "c"))
    (tmp_path / ".hidden").touch()
    (tmp_path / "A.txt").touch()
    (tmp_path / "a.txt").touch()
    assert utils.listdir_nohidden(str(tmp_path), sort=True) == ["A.txt", "a.txt", "b"]
    assert set(utils.listdir_nohidden(str(tmp_path))) == {"A.txt", "a.txt", "b"}


def test_check_isfile(tmp_path):
    (tmp_path / "a").touch()
    assert utils.check_isfile(str(tmp_path / "a"))
    with pytest.warns(UserWarning, match="No file found"):
        assert not utils.check_isfile(str(tmp_path / "b"))


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seed_zero_is_a_seed():
    utils.set_random_seed(0)
    first = draws()
    utils.set_random_seed(0)
    assert first == draws()
    utils.set_random_seed(1)
    assert first != draws()
    with pytest.raises(InputError, match="-1"):
        utils.set_random_seed(-1)


def test_collect_env_info_leaves_the_seeds_alone():
    utils.set_random_seed(3)
    first = draws()
    utils.set_random_seed(3)
    text = utils.collect_env_info()
    assert first == draws()
    assert "PyTorch version" in text and "Pillow" in text


def test_names():
    assert utils.get_most_similar_str_to_a_from_b("oxfordpet", ["ImageNet", "OxfordPets"]) == "OxfordPets"
    assert utils.get_most_similar_str_to_a_from_b("x", []) is None
    utils.check_availability("a", ["a"])
    with pytest.raises(ValueError, match='did you mean "OxfordPets"'):
        utils.check_availability("oxford_pets", ["ImageNet", "OxfordPets"])
    assert utils.did_you_mean("zzz", ["abc"]) == ""


def test_tolist_if_not():
    assert utils.tolist_if_not("a") == ["a"]
    assert utils.tolist_if_not(["a"]) == ["a"]
    assert utils.tolist_if_not(("a", "b")) == ["a", "b"]


def test_download_url(tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"abc")
    utils.download_url(source.as_uri(), target, sha256=hashlib.sha256(b"abc").hexdigest())
    assert target.read_bytes() == b"abc"
    with pytest.raises(InputError, match="SHA-256"):
        utils.download_url(source.as_uri(), tmp_path / "other", sha256="00")
    with pytest.raises(InputError, match="by hand"):
        utils.download_url((tmp_path / "nosuch").as_uri(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# images


def test_read_image_turns_by_exif(tmp_path):
    image = Image.new("L", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    read = utils.read_image(str(tmp_path / "a.jpg"))
    assert read.size == (2, 4) and read.mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "CMYK", "I;16"])
def test_read_image_gives_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (3, 2)).save(path)
    assert utils.read_image(path).mode == "RGB"


def test_read_image_names_what_it_cannot_read(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    wrong = {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "head": whole[:20]}
    for name, content in wrong.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.png") as caught:
            utils.read_image(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="found no file"):
        utils.read_image(tmp_path / "nosuch.png")
    with pytest.raises(InputError):
        utils.read_image(tmp_path)


# meters


def test_average_meter():
    meter = AverageMeter()
    meter.update(1.0)
    meter.update(torch.tensor([4.0], requires_grad=True), n=2)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (4.0, 9.0, 3, 3.0)
    meter.reset()
    assert meter.count == 0 and meter.avg == 0.0
    ema = AverageMeter(ema=True)
    ema.update(1.0)
    ema.update(2.0)
    assert ema.avg == pytest.approx(1.1)


def test_metric_meter_text():
    meter = MetricMeter()
    meter.update({"loss": 1.0, "acc": torch.tensor(50.0)})
    meter.update({"loss": 2.0})
    meter.update(None)
    assert str(meter) == "loss 2.0000 (1.5000) acc 50.0000 (50.0000)"
    with pytest.raises(TypeError, match="dict"):
        meter.update(3)
