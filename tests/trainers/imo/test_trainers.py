"""IMO and IMODINO through configuration, engine, checkpoints and their files."""

import json

import pytest
import torch
from PIL import Image

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.utils import InputError
from trainers.imo import load_adapters, measure, read_recipe

CONFIG = {"IMO": "imo", "IMODINO": "imodino"}
every = pytest.mark.parametrize("name", ["IMO", "IMODINO"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of pictures: 24 to train on, 12 for validation, 6 to test on."""
    folder = tmp_path_factory.mktemp("images")
    for part, count in (("train", 8), ("val", 4), ("test", 2)):
        for label, name in enumerate(("red", "green", "blue")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                colour = [60 + 9 * i] * 3
                colour[label] = 220 - 9 * i
                Image.new("RGB", (70, 64), tuple(colour)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def make_cfg(tmp_path, random_tiny, images):
    def make(name, *pairs, out="run"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(f"configs/trainers/{CONFIG[name]}/tiny.yaml")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), "DATASET.NAME", "ImageFolder", "SEED", 1])
        cfg.merge_from_list(["DATASET.ROOT", str(images), "MODEL.BACKBONE.WEIGHTS", str(random_tiny)])
        cfg.merge_from_list(["DATALOADER.TRAIN_X.BATCH_SIZE", 8, "OPTIM.MAX_EPOCH", 2, "USE_CUDA", False])
        cfg.merge_from_list(["TEST.NO_TEST", True, f"TRAINER.{name}.MEASURE_FREQ", 2, f"TRAINER.{name}.DIM", 4])
        if name == "IMODINO":
            cfg.merge_from_list(["TRAINER.IMODINO.OUT_DIM", 16, "TRAINER.IMODINO.FREEZE_LAST_LAYER", 1])
        cfg.merge_from_list(list(pairs))
        cfg.freeze()
        return cfg

    return make


def bits(clip):
    return {name: value.clone() for name, value in clip.state_dict().items()}


@every
def test_a_run_leaves_the_backbone_bit_by_bit_and_writes_its_files(name, make, tmp_path):
    trainer = make(name)
    clip = trainer.network.clip
    before, digest = bits(clip), clip._compute_digest()
    trainer.train()
    assert clip._compute_digest() == digest
    assert all(torch.equal(value, before[key]) for key, value in bits(clip).items())
    assert not any(p.requires_grad or p.grad is not None for p in clip.parameters())
    adapters = load_adapters(tmp_path / "run", clip)
    assert adapters.digest() == trainer.network.learner.result.digest()
    assert adapters.blocks["1"].up.weight.abs().sum() > 0
    recipe = read_recipe(tmp_path / "run")
    assert (recipe["trainer"], recipe["epochs"], recipe["steps"], recipe["data"]) == (name, 2, 6, "ImageFolder")
    assert recipe["data_digest"] == trainer.dm.dataset.split_digest and f"NAME: {name}" in recipe["config"]
    found = json.loads((tmp_path / "run" / "overlap.json").read_text())
    assert found["images"] == 12 and (tmp_path / "run" / "overlap.png").stat().st_size > 1000
    held_out = trainer._held_out()
    for when, encode in (("before", clip.encode_image), ("after", trainer.network.corrected)):
        with torch.no_grad():
            again = measure(*trainer._encode(held_out, encode))
        assert found[when]["overlap"] == pytest.approx(again.overlap)
        assert found[when]["variance"] == pytest.approx(again.variance)


@every
def test_measures_are_in_tensorboard(name, make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make(name).train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for tag in ("held_out/overlap", "held_out/variance"):
        assert [event.step for event in events.Scalars(tag)] == [0, 2, 3, 4, 6]
    assert "held_out/histograms" in events.Tags()["images"]


@every
def test_resuming_gives_the_uninterrupted_run(name, make, tmp_path):
    whole = make(name, out="whole")
    whole.train()
    half = make(name, "TRAIN.CHECKPOINT_FREQ", 1, out="half")
    half.train()
    (tmp_path / "half" / half.model_name / "checkpoint").write_text("model.pth.tar-1\n")
    torch.manual_seed(5)
    again = make(name, out="half")
    again.train()
    for key, value in whole.network.learner.state_dict().items():
        assert torch.equal(again.network.learner.state_dict()[key], value), key


@pytest.mark.parametrize("own", [0.0, 7.5])
def test_a_step_of_the_classifier_is_cross_entropy_on_corrected_features(make, own):
    trainer = make("IMO", "TRAINER.IMO.LOGIT_SCALE", own)
    network = trainer.network
    batch = next(iter(trainer.train_loader_x))
    features = network.learner.adapters.encode(network.clip, batch["img"]).detach()
    weight, bias = (p.detach() for p in network.learner.classifier.parameters())
    logits = (own or network.clip.logit_scale) * features @ weight.t() + bias
    want = torch.stack([-torch.log_softmax(row, 0)[y] for row, y in zip(logits, batch["label"], strict=True)]).mean()
    trainer.set_model_mode("train")
    trainer.num_batches = 3
    assert trainer.step(batch)["loss"] == pytest.approx(want.item(), rel=1e-4)


def test_classifier_may_start_as_centred_class_means(make):
    trainer = make("IMO", "TRAINER.IMO.INIT_IMAGES", 3)
    items = trainer.dm.dataset.train_x
    picked = [[item for item in items if item.label == label][:3] for label in range(3)]
    with torch.no_grad():
        features, _ = trainer._encode(sum(picked, []), trainer.network.clip.encode_image)
    rows = torch.stack([(x / x.norm(dim=1, keepdim=True)).mean(0) for x in features.split(3)])
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows = rows - rows.mean(0)
    want = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(trainer.network.learner.classifier.weight.detach(), want, rtol=1e-3, atol=1e-4)


def test_dino_s_last_layer_rests_in_its_frozen_epochs_and_the_teacher_follows(make):
    trainer = make("IMODINO", "TRAINER.IMODINO.MOMENTUM", 0.5)
    learner = trainer.network.learner
    trainer.set_model_mode("train")
    trainer.num_batches, trainer.epoch = 3, 0
    batch = next(iter(trainer.train_loader_x))
    last, student, teacher = (
        [p.detach().clone() for p in part]
        for part in ([learner.head.last], learner.adapters.parameters(), learner.teacher["adapters"].parameters())
    )
    trainer.step(batch)
    assert torch.equal(learner.head.last, last[0])
    for old, now, follower in zip(
        teacher, learner.adapters.parameters(), learner.teacher["adapters"].parameters(), strict=True
    ):
        torch.testing.assert_close(follower, 0.5 * old + 0.5 * now)
    assert any(not torch.equal(a, b) for a, b in zip(student, learner.adapters.parameters(), strict=True))
    assert learner.centre.abs().sum() > 0 and not learner.teacher["head"].last.requires_grad
    trainer.epoch = 1
    trainer.step(batch)
    assert not torch.equal(learner.head.last, last[0])


def test_dino_s_rate_follows_the_batch(make):
    trainer = make("IMODINO", "OPTIM.LR", 0.0008, "DATALOADER.TRAIN_X.BATCH_SIZE", 12)
    assert {group["initial_lr"] for group in trainer._optims["imodino"].param_groups} == {0.0008 * 12 / 256}


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("IMO", "DIM", 0, "DIM to be a whole number"),
        ("IMO", "LOGIT_SCALE", -1.0, "LOGIT_SCALE to be a number"),
        ("IMO", "INIT_IMAGES", -1, "INIT_IMAGES to be a whole number"),
        ("IMODINO", "SAVE", "nobody", "SAVE to be one of teacher, student"),
        ("IMODINO", "LOCAL_SCALE", (0.5, 0.2), "LOCAL_SCALE to be two rising numbers"),
        ("IMODINO", "AUGMENT", ("cutout",), "AUGMENT to hold some of"),
        ("IMODINO", "MOMENTUM", 1.5, "MOMENTUM to be a number"),
        ("IMODINO", "TEACHER_TEMP", 0.0, "TEACHER_TEMP to be a number"),
    ],
)
def test_wrong_settings(name, key, value, message, make):
    with pytest.raises((ValueError, InputError), match=message):
        make(name, f"TRAINER.{name}.{key}", value)


def test_adapters_for_trainers_that_do_not_use_them_are_refused(make, random_adapters):
    with pytest.raises(ValueError, match="Expected MODEL.IMO_WEIGHTS to be '' for IMO, which uses no corrected"):
        make("IMO", "MODEL.IMO_WEIGHTS", str(random_adapters))
