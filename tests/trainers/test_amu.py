"""AMU-Tuning beside the formulas of its docstring, written out with numpy and loops, and its auxiliary models."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from dassl.engine import TRAINER_REGISTRY
from trainers.amu import AMULearner, kurtosis, uncertainty
from trainers.features.auxiliary import AuxiliaryEncoder, fitting_state, without_last_layer

WIDTH, CLASSES, A = 24, 5, 7
REST = {"alpha": 0.8, "power": 0.4}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def naive_kurtosis(row):
    z = (row - row.mean()) / row.std(ddof=1)
    return np.mean(z**4)


def naive_logits(f, w, a, v, alpha, power, k, scale):
    out = []
    for x, y in zip(f, a, strict=True):
        s = scale * w @ (x / np.linalg.norm(x))
        p = np.exp(s - s.max())
        u = (naive_kurtosis(p / p.sum()) / k) ** -power
        z = v @ (y / np.linalg.norm(y))
        out.append(s + alpha * u * (z - z.mean()) / z.std(ddof=1))
    return np.array(out)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_kurtosis(classes):
    one_hot = F.one_hot(torch.tensor([1]), classes).double()
    known = ((classes - 1) / classes) ** 2 * (classes - 2 + 1 / (classes - 1))
    assert float(kurtosis(one_hot)) == pytest.approx(known)
    rows = normal(6, classes, seed=1).double()
    want = [naive_kurtosis(row) for row in rows.numpy()]
    np.testing.assert_allclose(kurtosis(rows).squeeze(1), want)
    least = ((classes - 1) / classes) ** 2
    constant = kurtosis(torch.full((1, classes), 1 / classes))
    assert float(constant) == pytest.approx(least) and float(kurtosis(rows).min()) >= least - 1e-9


def test_uncertainty_is_finite_falls_with_certainty_and_may_be_off():
    logits = torch.tensor([[100.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0], [2.0, 1.9, 0, 0, 0], [0.0, 0, 0, 0, 0]])
    u = uncertainty(logits, 0.4).squeeze(1)
    assert torch.isfinite(u).all() and u[0] == pytest.approx(4**-0.4) and u[2] > u[0] and u[3] > u[2]
    assert float(uncertainty(logits[:1], 0.4, 250.0)) == pytest.approx(float((kurtosis(logits[:1]) / 250) ** -0.4))
    assert uncertainty(logits, 0.0).tolist() == [[1.0]] * 4 == uncertainty(logits[:, :1], 0.4).tolist()


def parted(make_clip, names, w, auxiliary="model", **settings):
    return AMULearner(make_clip(), names, w, width=A, auxiliary=auxiliary, **{**REST, **settings})


@pytest.mark.parametrize("reference", [0.0, 250.0])
def test_logits_and_class_means(make_clip, names, reference):
    """Features keep their lengths; a class may have more images than another, or none."""
    f, w, a = 3 * normal(6, WIDTH), unit(CLASSES, WIDTH, seed=1), 2 * normal(6, A, seed=2)
    labels = torch.tensor([0, 0, 0, 1, 4, 4])
    learner = parted(make_clip, names, w, reference=reference)
    learner.fill(torch.cat([f, a], dim=1), labels)
    rows = F.normalize(a, dim=1)
    want = torch.stack(
        [rows[labels == c].mean(dim=0) if (labels == c).any() else torch.zeros(A) for c in range(CLASSES)]
    )
    torch.testing.assert_close(learner.weight.detach(), want)
    x, y = 5 * normal(4, WIDTH, seed=3), normal(4, A, seed=4)
    k = reference or 0.25 * (4 / 5) ** 2 * (3 + 1 / 4)
    known = [tensor.double().numpy() for tensor in (x, w, y, want)]
    logits = naive_logits(*known, 0.8, 0.4, k, learner.scale)
    got = learner(torch.cat([x, y], dim=1))
    np.testing.assert_allclose(got.detach(), logits, rtol=1e-4, atol=1e-3)


def test_features_before_the_projection_are_auxiliary_and_give_clip_s(make_clip, names, images):
    clip = make_clip("resnet")
    pooled, w = clip.pool_image(images).float(), unit(CLASSES, clip.embed_dim, seed=1)
    learner = AMULearner(clip, names, w, width=pooled.shape[1], auxiliary="", **REST)
    torch.testing.assert_close(learner.original(pooled), F.normalize(clip.encode_image(images).float(), dim=1))
    torch.testing.assert_close(learner.auxiliary(pooled), F.normalize(pooled, dim=1))


def test_a_part_of_the_classes(make_clip, names):
    w, x = unit(CLASSES, WIDTH, seed=1), normal(4, WIDTH + A, seed=3)
    whole = parted(make_clip, names, w)
    whole.fill(normal(6, WIDTH + A), torch.tensor([0, 1, 2, 3, 4, 0]))
    part = parted(make_clip, [names[3], names[1], names[0]], w[[3, 1, 0]])
    part.take(whole.state_dict())
    assert torch.equal(part.weight, whole.weight[[3, 1, 0]])
    other = parted(make_clip, [names[3], names[1], names[0]], w[[3, 1, 0]])
    other.weight.data.copy_(whole.weight[[3, 1, 0]])
    assert torch.equal(part(x), other(x))  # what is standardized goes over the present classes
    with pytest.raises(ValueError, match="Expected a checkpoint for auxiliary features 'other' but got 'model'"):
        parted(make_clip, names, w, auxiliary="other").take(whole.state_dict())
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        parted(make_clip, ["lamp"], w[:1]).take(whole.state_dict())


@pytest.fixture
def make_cfg(small_run):
    return small_run("amu", "TRAINER.AMUTUNING.VIEWS", 2, "OPTIM.MAX_EPOCH", 2)


@pytest.fixture
def resnet(tmp_path):
    """A file as MoCo v3 leaves it: two networks, with words before their names, and without the last layer."""
    torch.manual_seed(3)
    first, second = models.resnet18(weights=None).state_dict(), models.resnet18(weights=None).state_dict()
    state = {f"module.base_encoder.{name}": value for name, value in first.items() if not name.startswith("fc.")}
    state |= {f"module.momentum_encoder.{name}": value for name, value in second.items() if not name.startswith("fc.")}
    torch.save({"epoch": 3, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    return tmp_path / "moco.pth.tar", first


def test_a_run_with_a_model_of_torchvision(make, resnet, tmp_path):
    path, state = resnet
    aux = ("TRAINER.AMUTUNING.AUX", "resnet18", "TRAINER.AMUTUNING.AUX_WEIGHTS", str(path))
    aux += ("FEATURE_CACHE.USE", True, "FEATURE_CACHE.DIR", str(tmp_path / "features"))
    trainer = make("AMUTuning", *aux)
    trainer.train()
    encoder, learner = trainer.network.encode, trainer.network.learner
    batch = next(iter(trainer.val_loader.loader))["img"][:4]
    model = models.resnet18(weights=None)
    model.load_state_dict(state)
    model.fc = nn.Identity()
    pixels = batch * torch.tensor(trainer.cfg.INPUT.PIXEL_STD)[:, None, None]
    pixels = pixels + torch.tensor(trainer.cfg.INPUT.PIXEL_MEAN)[:, None, None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        want = model.eval()((pixels - mean[:, None, None]) / std[:, None, None])
    got = encoder(batch)
    assert got.shape == (4, encoder.width) and learner.weight.shape == (10, 512)
    torch.testing.assert_close(got[:, -512:], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, :-512], encoder.clip.encode_image(batch))
    again = make("AMUTuning", *aux, out="other")
    again.load_model(str(tmp_path / "run"))
    assert torch.equal(again.network.learner.weight, learner.weight)
    again.network.encode.model = None  # features are on disk
    assert torch.equal(again.train_features.all().values, trainer.train_features.all().values)
    plain = make("AMUTuning", out="plain")
    with pytest.raises(ValueError, match="auxiliary features '' but got 'resnet18:"):
        plain.load_model(str(tmp_path / "run"))


def test_a_run_starts_from_class_means_and_names_its_losses(make, tmp_path):
    trainer = make("AMUTuning", "OPTIM.LR", 0.0)
    trainer.train()
    known, learner = trainer.train_features.all(), trainer.network.learner
    rows = F.normalize(known.values.mean(dim=0), dim=1)
    want = torch.stack([rows[known.labels == c].mean(dim=0) for c in range(10)])
    torch.testing.assert_close(learner.weight.detach(), want)
    assert trainer.selected == {}
    assert {"loss_sum", "loss_aux"} <= json.loads((tmp_path / "run" / "metrics.json").read_text())["train"].keys()
    inputs, labels = known.values[0], known.labels
    with torch.no_grad():
        logits, z = trainer.run(inputs, labels)
    terms = trainer.loss((logits, z), labels)
    assert float(terms["loss_sum"]) == pytest.approx(0.35 * float(F.cross_entropy(logits, labels)))
    assert float(terms["loss_aux"]) == pytest.approx(0.65 * float(F.cross_entropy(z, labels)))


def test_corrected_features_are_auxiliary(make, random_adapters):
    trainer = make("AMUTuning", "MODEL.IMO_WEIGHTS", str(random_adapters))
    trainer.train()
    learner, width = trainer.network.learner, trainer.network.clip.embed_dim
    assert learner.weight.shape == (10, width) and not learner.pooled
    known = trainer.train_features.all().values
    assert known.shape[-1] == 2 * width
    torch.testing.assert_close(learner.auxiliary(known[0]), F.normalize(known[0][:, width:], dim=1))


def test_building_a_model_draws_no_numbers_and_takes_its_last_layer_out():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for name, width in (("resnet18", 512), ("mobilenet_v3_small", 1024)):
        model, got = without_last_layer(name)
        assert got == width and not model.training and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="Expected an auxiliary model with a linear layer .* squeezenet1_0 has none"):
        without_last_layer("squeezenet1_0")


def test_places_of_weights_in_a_file():
    wanted = {"a.weight": torch.zeros(2, 3), "a.num_batches_tracked": torch.tensor(0)}
    full = {"x.a.weight": torch.ones(2, 3), "y.a.weight": 2 * torch.ones(2, 3), "x.b": torch.ones(1)}
    for content in (full, {"epoch": 1, "model": full}, {"args": {"a.weight": 3}, "teacher": full}):
        assert torch.equal(fitting_state(content, wanted, "it")["a.weight"], torch.ones(2, 3))
    for content in ([], {}, {"a.weight": torch.ones(3, 3)}, {"a.weight": "text"}):
        with pytest.raises(ValueError, match=r"Expected it but . of 2 tensors .* such as a.weight \(2, 3\)"):
            fitting_state(content, wanted, "it")


def test_bad_input(make, make_cfg, tmp_path, random_adapters):
    key = "TRAINER.AMUTUNING."
    check = TRAINER_REGISTRY.get("AMUTuning").check_settings
    wrong = tmp_path / "wrong.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, wrong)
    for pairs, error, words in (
        ((f"{key}AUX", "resnet18"), ValueError, "AUX and .AUX_WEIGHTS to be given together"),
        ((f"{key}AUX_WEIGHTS", "x"), ValueError, "AUX and .AUX_WEIGHTS to be given together"),
        ((f"{key}AUX", "resnet19", f"{key}AUX_WEIGHTS", str(wrong)), ValueError, "such as resnet50 .* got 'resnet19'"),
        ((f"{key}AUX", "resnet18", f"{key}AUX_WEIGHTS", "none.pth"), FileNotFoundError, "there is no none.pth"),
        (
            (f"{key}AUX", "resnet18", f"{key}AUX_WEIGHTS", str(wrong), "MODEL.IMO_WEIGHTS", str(random_adapters)),
            ValueError,
            "AUX or MODEL.IMO_WEIGHTS to be ''",
        ),
        ((f"{key}LAMBDA", 1.5), ValueError, "LAMBDA to be a number"),
    ):
        with pytest.raises(error, match=words):
            check(make_cfg("AMUTuning", *pairs))
    with pytest.raises(ValueError, match="hold the weights of resnet18 but .* such as conv1.weight"):
        make("AMUTuning", f"{key}AUX", "resnet18", f"{key}AUX_WEIGHTS", str(wrong))


def test_a_model_that_takes_no_images_of_this_size(make_clip, tmp_path, monkeypatch):
    path, clip = tmp_path / "weights.pth", make_clip()
    torch.save(models.resnet18(weights=None).state_dict(), path)
    arguments = (clip, "fp32", torch.no_grad, "resnet18", path, (0.5,) * 3, (0.5,) * 3)
    whole = AuxiliaryEncoder(*arguments)
    assert whole.weights_digest.startswith(f"{clip.weights_digest}+resnet18:") and whole.raw().width == whole.width

    def refuse(model, images):
        raise AssertionError("Wrong image height")

    monkeypatch.setattr(models.ResNet, "forward", refuse)
    with pytest.raises(ValueError, match="takes images of 32 pixels, as random-vit does, but resnet18 says: Wrong"):
        AuxiliaryEncoder(*arguments)
    monkeypatch.setattr(models.ResNet, "forward", lambda model, images: torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"of 512 inputs, but resnet18 gives features of shape \(3,\)"):
        AuxiliaryEncoder(*arguments)
