"""FewShotClassifier: scikit-learn's conventions, the numbers of train.py, one file, clear errors."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from color_photos import COLORS, draw
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils import estimator_checks

from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from trainers import FewShotClassifier
from trainers.app.train import main as train
from trainers.configs import find_config

QUICK = {"OPTIM.MAX_EPOCH": 2}


@pytest.fixture(scope="module")
def make(tiny_weights):
    """Make a classifier on the tiny CLIP; keyword arguments as for FewShotClassifier."""

    def make(method="GDA", **options):
        settings = {"OPTIM.MAX_EPOCH": 2, **options.pop("settings", {})}
        return FewShotClassifier(method, "tiny", weights=tiny_weights or None, settings=settings, **options)

    return make


@pytest.fixture(scope="module")
def fitted(make, photos):
    return make().fit(*photos)


# ---------------------------------------------------------------------------------------------- conventions


def test_predictions_are_labels_and_probabilities(fitted, more_photos):
    paths, labels = more_photos
    probabilities = fitted.predict_proba(paths)
    assert fitted.classes_.tolist() == ["blue", "green", "red"] and probabilities.shape == (12, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    answers = fitted.predict(paths)
    assert (answers == fitted.classes_[probabilities.argmax(axis=1)]).all()
    assert fitted.score(paths, labels) == np.mean(answers == np.array(labels)) > 0.8
    best = fitted.top_k(paths, 2)
    assert [guess[0][0] for guess in best] == answers.tolist() and all(a >= b for (_, a), (_, b) in best)
    assert fitted.decision_function(paths).argmax(axis=1).tolist() == probabilities.argmax(axis=1).tolist()
    features = fitted.embed(paths)
    assert features.shape[0] == 12
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_images_may_have_any_form(fitted, photos):
    path = photos[0][0]
    image = Image.open(path)
    values = np.asarray(image)
    floats = torch.from_numpy(values / 255.0).permute(2, 0, 1)
    mixture = [path, Path(path), image, values, values.astype(np.int64), values / 255, floats, floats.mul(255).byte()]

    def same(X, rows):
        np.testing.assert_allclose(fitted.decision_function(X), rows, rtol=1e-4)

    rows = fitted.decision_function([path])
    same(mixture, np.repeat(rows, len(mixture), axis=0))
    same(np.stack([values, values]), np.repeat(rows, 2, axis=0))
    same(path, rows)
    same(image, rows)
    gray = np.asarray(image.convert("L"))
    same([gray], fitted.decision_function([Image.fromarray(gray)]))
    same(np.stack([gray]), fitted.decision_function([gray]))
    folder = Path(path).parent
    same(folder, fitted.decision_function(sorted(map(str, folder.iterdir()))))


def test_images_that_are_no_files_are_learnt_from_like_files(make, photos):
    paths, labels = photos
    images = [Image.open(path).copy() for path in paths]
    expected = make().fit(paths, labels).decision_function(paths)
    np.testing.assert_allclose(make().fit(images, labels).decision_function(paths), expected, atol=1e-4)


def test_labels_may_be_numbers_with_names(make, photos):
    paths, labels = photos
    numbers = [{"red": 7, "green": 3, "blue": 5}[label] for label in labels]
    clf = make(class_names={7: "red", 3: "green", 5: "blue"}).fit(paths, numbers)
    assert clf.classes_.tolist() == [3, 5, 7] and clf.class_names_ == ["green", "blue", "red"]
    assert clf.predict(paths).dtype.kind == "i" and clf.score(paths, numbers) > 0.9
    assert clf.n_images_ == {3: 6, 5: 6, 7: 6}


CHECKS = (
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
)


@pytest.mark.parametrize("name", CHECKS)
def test_scikit_learn_s_checks_that_need_no_table_of_numbers(name):
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip(f"this scikit-learn has no {name}")
    check("FewShotClassifier", FewShotClassifier())


def test_it_works_in_cross_val_score(make, photos):
    paths, labels = photos
    scores = cross_val_score(make(calibration=None), np.array(paths), labels, cv=3)
    assert len(scores) == 3 and scores.mean() > 0.7


def test_clone_and_set_params(make):
    clf = make(seed=4)
    other = clone(clf).set_params(seed=5, settings={"A.B": 1})
    assert clf.seed == 4 and other.seed == 5 and other.method == "GDA"


def test_nothing_of_the_caller_changes(make, photos, capsys):
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    clf = make().fit(*photos)
    clf.predict(photos[0])
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    out, err = capsys.readouterr()
    assert "Setting" not in out and "%|" not in err


def test_the_same_seed_gives_the_same_numbers(make, photos):
    rows = [make("LinearProbe", seed=2).fit(*photos).decision_function(photos[0]) for _ in range(2)]
    np.testing.assert_array_equal(*rows)


# ------------------------------------------------------------------------------------------ the same as train.py


@pytest.mark.parametrize("method", ["GDA", "DLRCLIP"])
def test_a_folder_gives_the_numbers_of_train_py(method, make, tiny_weights, tmp_path, photos):
    root = tmp_path / "folder"
    draw(root, dict.fromkeys(COLORS, 10))
    run = tmp_path / "run"
    weights = ["MODEL.BACKBONE.WEIGHTS", tiny_weights] if tiny_weights else []
    argv = ["--trainer", method, "--config", "tiny", "--root", str(root), "--output-dir", str(run), "--seed", "3"]
    assert train([*argv, "OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "-1", *weights]) == 0
    clf = make(method, seed=3).fit(root)
    metrics = json.loads((run / "metrics.json").read_text())
    assert clf.report().test_accuracy == pytest.approx(metrics["accuracy"])
    theirs = FewShotClassifier.from_run(run)
    np.testing.assert_array_equal(clf.decision_function(photos[0]), theirs.decision_function(photos[0]))
    assert theirs.classes_.tolist() == clf.classes_.tolist() == sorted(COLORS)
    assert "metrics.json" in str(theirs.report())


def test_a_folder_for_output_has_the_files_of_a_run(make, photos, tmp_path):
    make(output_dir=str(tmp_path / "run")).fit(*photos)
    assert {"config.yaml", "metrics.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


# ------------------------------------------------------------------------------------------------------ one file

NEEDS_ADAPTERS = {
    name for name in TRAINER_REGISTRY.registered_names()
    if getattr(TRAINER_REGISTRY.get(name), "adapters", "none") == "needed"
}  # fmt: skip


@pytest.mark.parametrize("method", sorted(set(TRAINER_REGISTRY.registered_names()) - NEEDS_ADAPTERS))
def test_every_method_is_fitted_saved_and_loaded(method, make, photos, tmp_path):
    node = TRAINER_REGISTRY.get(method).config_node()
    few = {"RLA": {"VIEWS": 2}, "ProLIP": {"VIEWS": 2}, "EMDirichlet": {"ITER_MM": 20}}.get(method, {})
    clf = make(
        method,
        settings={"OPTIM.MAX_EPOCH": 1, **{f"TRAINER.{node}.{key}": n for key, n in few.items()}},
        calibration=None,
    ).fit(*photos)
    expected = clf.predict_proba(photos[0])
    clf.save(tmp_path / "model.safetensors")
    again = FewShotClassifier.load(tmp_path / "model.safetensors", weights=clf.weights)
    np.testing.assert_array_equal(again.predict_proba(photos[0]), expected)
    assert again.method_ == method and again.classes_.tolist() == clf.classes_.tolist()


def test_the_file_says_what_is_needed_and_names_no_folder(fitted, tmp_path, photos):
    file = tmp_path / "model.safetensors"
    fitted.save(file)
    with safe_open(file, framework="pt") as stream:
        record = json.loads(stream.metadata()["dlr_clip"])
    assert record["classes"] == ["blue", "green", "red"] and record["backbone"] == "tiny"
    assert record["preprocessing"]["size"] == [64, 64] and len(record["weights_digest"]) == 64
    text = json.dumps(record)
    assert str(Path(photos[0][0]).parent.parent) not in text and "/tmp" not in text
    assert str(FewShotClassifier.load(file, weights=fitted.weights).report()) == str(fitted.report())


def test_a_configuration_of_one_s_own_leaves_no_path_in_the_file(make, photos, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"_BASE_: {find_config('GDA', 'tiny')}\nTRAINER:\n  GDA:\n    VIEWS: 0\n")
    clf = make("GDA", config=str(own), calibration=None).fit(*photos)
    assert clf.config_ == str(own)
    clf.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stream:
        record = json.loads(stream.metadata()["dlr_clip"])
    assert record["config_name"] == "" and "VIEWS: 0" in record["config"] and str(tmp_path) not in json.dumps(record)


def test_other_weights_are_refused(fitted, tmp_path, random_tiny, tiny_weights):
    if tiny_weights:
        pytest.skip("the bundled CLIP is not there, so that there are no two")
    fitted.save(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"Expected the weights of tiny .* but got others"):
        FewShotClassifier.load(tmp_path / "model.safetensors", weights=str(random_tiny))


def test_damaged_and_other_files_are_refused(fitted, tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="but there is none"):
        FewShotClassifier.load(file)
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"a file that FewShotClassifier.save has written"):
        FewShotClassifier.load(file)
    fitted.save(file)
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    with pytest.raises(InputError, match=r"a file that FewShotClassifier.save has written"):
        FewShotClassifier.load(file)
    save_file({"a": torch.zeros(2)}, file, metadata={"dlr_clip": json.dumps({"form": 99})})
    with pytest.raises(InputError, match="form 1 but got 99"):
        FewShotClassifier.load(file)
    save_file({"a": torch.zeros(2)}, file, metadata={"dlr_clip": json.dumps({"form": 1})})
    with pytest.raises(InputError, match="a whole file of this version"):
        FewShotClassifier.load(file)


def test_it_is_never_pickled(fitted):
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(fitted)
    pickle.dumps(FewShotClassifier())


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "DLRCIP"}, r'did you mean "DLRCLIP"'),
        ({"backbone": "ViT-B/31"}, r"ViT-B/31"),
        ({"method": "auto", "config": "tiny"}, "Expected no config"),
        ({"device": "gpu"}, r"Expected device to be one of 'auto', 'cpu', 'cuda' but got 'gpu'"),
        ({"calibration": "yes"}, "Expected calibration"),
        ({"unknown": "yes"}, "Expected unknown"),
        ({"unknown": 1.5}, "Expected unknown"),
        ({"validation_fraction": 1.0}, "Expected validation_fraction"),
        ({"seed": -1}, "Expected seed"),
        ({"class_names": {"pink": "rose"}}, "Expected class_names to name classes of y"),
        ({"class_names": {"red": "blue"}}, "can tell apart"),
        ({"settings": {"OPTIM.LRR": 1}}, "LRR"),
        ({"config": "huge"}, "huge"),
    ],
)
def test_wrong_settings_are_named_before_any_work(options, message, photos):
    clf = FewShotClassifier(**{"method": "GDA", "backbone": "tiny", **options})
    with pytest.raises(InputError, match=message):
        clf.fit(*photos)


def test_wrong_images_and_labels_are_named(make, fitted, photos, tmp_path):
    paths, labels = photos
    for X, y, message in (
        (paths, labels[:-1], "a label for each of 18 images"),
        (paths, ["red"] * 18, "two classes or more"),
        (paths, [0.5] * 18, "Expected y to hold classes"),
        (paths, None, "Expected labels y"),
        (3, labels, "Expected X to be a list of images"),
        ([*paths[:-1], 3], labels, r"Expected X\[17\] to be an image"),
        ([*paths[:-1], np.zeros((4, 4, 7))], labels, r"Expected X\[17\] to be an array"),
        ([*paths[:-1], np.full((4, 4, 3), 7.0)], labels, r"Expected the floats of X\[17\] to be 0 to 1"),
        ([*paths[:-1], np.full((4, 4, 3), 700)], labels, r"Expected the numbers of X\[17\] to be 0 to 255"),
        ([*paths[:-1], str(tmp_path / "none.png")], labels, "none.png"),
    ):
        with pytest.raises(InputError, match=message):
            make().fit(X, y)
    with pytest.raises(InputError, match="but got none"):
        fitted.predict([])
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad.png.*X\[1\]"):
        fitted.predict([paths[0], str(bad)])
    with pytest.raises(InputError, match="put it into a list"):
        fitted.predict(np.zeros((8, 8, 3)))
    with pytest.raises(InputError, match="k to be at least 1"):
        fitted.top_k(paths, 0)
    with pytest.raises(NotFittedError):
        make().predict(paths)
