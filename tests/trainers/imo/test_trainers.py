"""IMO and IMODINO through configuration, engine, checkpoints and their files."""

import json
import math

import pytest
import torch
from PIL import Image

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.utils import InputError, load_checkpoint
from trainers.base.learner import pack_record, unpack_record
from trainers.features.corrected import load_adapters, read_recipe
from trainers.imo import measure

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
                color = [60 + 9 * i] * 3
                color[label] = 220 - 9 * i
                Image.new("RGB", (70, 64), tuple(color)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def make_cfg(tmp_path, random_tiny, images):
    def make(name, *pairs, out="run", file="tiny"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(f"configs/trainers/{CONFIG[name]}/{file}.yaml")
        if file != "tiny":  # the published settings, on a CLIP of toy size
            cfg.merge_from_list(["MODEL.BACKBONE.NAME", "tiny", "INPUT.SIZE", (64, 64), "DATALOADER.NUM_WORKERS", 0])
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


AUTHORS = {  # what of their code a resumed run could lose
    "IMO": ("TRAINER.IMO.FORM", "beside", "TRAINER.IMO.DROPOUT", 0.3),
    "IMODINO": ("TRAINER.IMODINO.SCHEDULE", "dino", "OPTIM.WARMUP_EPOCH", 1, "TRAINER.IMODINO.WEIGHT_DECAY_END", 0.4),
}


@pytest.mark.parametrize(("name", "pairs"), [("IMO", ()), ("IMODINO", ()), *AUTHORS.items()])
def test_resuming_gives_the_uninterrupted_run(name, pairs, make, tmp_path):
    whole = make(name, *pairs, out="whole")
    whole.train()
    half = make(name, *pairs, "TRAIN.CHECKPOINT_FREQ", 1, out="half")
    half.train()
    (tmp_path / "half" / half.model_name / "checkpoint").write_text("model.pth.tar-1\n")
    torch.manual_seed(5)
    again = make(name, *pairs, out="half")
    again.train()
    assert again.get_current_lr() == whole.get_current_lr()
    for key, value in whole.network.learner.state_dict().items():
        assert torch.equal(again.network.learner.state_dict()[key], value), key


def test_labels_train_as_in_the_authors_code(make):
    """Center crops with values from 0 to 1, cross-entropy on a linear layer over raw features, a constant rate."""
    trainer = make("IMO", file="vit_b16")
    network, learner = trainer.network, trainer.network.learner
    assert learner.adapters.made_as == {"form": "beside", "scale": 0.03} and learner.adapters.dropout.share == 0.1
    batches = list(trainer.train_loader_x)
    image = torch.cat([batch["img"] for batch in batches])[torch.cat([batch["index"] for batch in batches]).argmin()]
    item = trainer.dm.dataset.train_x[0]
    picture = Image.open(item.impath).convert("RGB")  # 70 x 64: the short side has CLIP's size
    want = torch.tensor(list(picture.crop((3, 0, 67, 64)).getdata())).view(64, 64, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, want)
    features = learner.adapters.eval().encode(network.clip, batches[0]["img"], unit=False).detach()
    weight, bias = (p.detach() for p in learner.classifier.parameters())
    logits = features @ weight.t() + bias
    labels = batches[0]["label"]
    loss = torch.stack([-torch.log_softmax(row, 0)[y] for row, y in zip(logits, labels, strict=True)]).mean()
    trainer.num_batches = 3
    assert trainer.step(batches[0])["loss"] == pytest.approx(loss.item(), rel=1e-4)
    rates, step = [], trainer.step
    trainer.step = lambda batch: rates.append(trainer.get_current_lr()) or step(batch)
    trainer.train()
    assert rates == [0.008] * 6
    assert [type(optim).__name__ for optim in trainer._optims.values()] == ["AdamW"]
    assert trainer._optims["imo"].param_groups[0]["weight_decay"] == 0.01


def test_dino_trains_as_in_the_authors_code(make):
    """A head that stays as drawn, on raw features; rate, weight decay and temperature by step; short gradients."""
    small = [x for key in ("HIDDEN_DIM", "BOTTLENECK_DIM") for x in (f"TRAINER.IMODINO.{key}", 8)]
    trainer = make(
        "IMODINO", *small, "OPTIM.MAX_EPOCH", 4, "TRAINER.IMODINO.LOCAL_CROPS", 1, "TRAINER.IMODINO.MEASURE_FREQ", 0,
        file="vit_b16",
    )  # fmt: skip
    learner, network = trainer.network.learner, trainer.network
    assert learner.adapters.made_as == learner.teacher["adapters"].made_as == {"form": "beside", "scale": 0.1}
    assert learner.adapters.dropout.share == 0
    head = {name: value.clone() for name, value in learner.head.state_dict().items()}
    crops = next(iter(trainer.train_loader_x))["img"][0][:2, 0]
    raw = learner.adapters.encode(network.clip, crops, unit=False)
    torch.testing.assert_close(network.student(crops), learner.head(raw))
    torch.testing.assert_close(network.teacher(crops), learner.head(raw).detach())
    seen = []
    step, update = trainer.step, trainer.model_update

    def watch(batch):
        group = trainer._optims["imodino"].param_groups
        rate, shown = group[0]["lr"], step(batch)
        seen.append((rate, group[0]["weight_decay"], group[1]["weight_decay"], shown["teacher_temp"]))
        return shown

    def short_gradients():
        norms = [float(p.grad.norm()) for p in learner.parameters() if p.grad is not None]
        assert norms and max(norms) <= 0.3 + 1e-4
        update()

    trainer.step, trainer.model_update = watch, short_gradients
    trainer.train()
    full, steps, warmup = 0.0008 * 8 / 256, 12, 6  # 4 epochs of 3 steps, 2 of warm-up
    for i, (rate, decay, of_biases, temperature) in enumerate(seen):
        cosine = 2e-6 + 0.5 * (full - 2e-6) * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        assert rate == pytest.approx(full * i / 5 if i < warmup else cosine)
        assert decay == pytest.approx(0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / steps)))
        assert of_biases == 0 and temperature == pytest.approx([0.04, 0.055, 0.07, 0.07][i // 3])
    assert len(seen) == steps
    for part in (learner.head, learner.teacher["head"]):
        assert all(torch.equal(value, head[name]) for name, value in part.state_dict().items())


def test_published_settings_are_the_authors_code_s(make_cfg):
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    cfg.merge_from_file("configs/trainers/imodino/vit_b16.yaml")
    node = cfg.TRAINER.IMODINO
    assert (node.LOCAL_CROPS, node.LOCAL_SCALE, node.GLOBAL_SCALE) == (10, (0.05, 0.25), (0.25, 1.0))
    assert (node.CROP_MEAN, node.CROP_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (node.FREEZE_LAST_LAYER, node.TRAIN_HEAD, node.CLIP_GRAD, node.LR_MIN) == (0, False, 0.3, 2e-6)
    assert (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.OPTIM.MAX_EPOCH, cfg.OPTIM.WARMUP_EPOCH) == (120, 10, 2)
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    cfg.merge_from_file("configs/trainers/imo/vit_b16.yaml")
    assert (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.OPTIM.LR, cfg.OPTIM.MAX_EPOCH) == (128, 0.008, 1)
    assert cfg.TRAINER.IMO.VIEW == "center_crop_unnormalized" and cfg.TRAINER.IMO.INIT_IMAGES == 0


@every
def test_checkpoints_compute_in_the_form_they_were_made_with(name, make, tmp_path):
    """An earlier version's checkpoint does not say its form: it had adapters after the block."""
    made = make(name)
    made.train()
    path = tmp_path / "run" / made.model_name / "model.pth.tar-2"
    checkpoint = load_checkpoint(path)
    packed = checkpoint["state_dict"]["_extra_state"]
    record = unpack_record(packed)
    assert record.pop("adapters") == {"form": "after", "scale": 1.0}
    checkpoint["state_dict"]["_extra_state"] = pack_record(record)
    other = make(name, f"TRAINER.{name}.FORM", "beside", out="other")
    other.network.learner.take(checkpoint["state_dict"])
    picture = next(iter(other.test_loader))["img"]
    assert torch.equal(other.network.corrected(picture), made.network.corrected(picture))
    beside = make(name, f"TRAINER.{name}.FORM", "beside", f"TRAINER.{name}.SCALE", 0.7, out="beside")
    made.network.learner.take(beside.network.learner.state_dict())
    assert made.network.learner.result.made_as == {"form": "beside", "scale": 0.7}


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


def test_classifier_may_start_as_centered_class_means(make):
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
        ("IMO", "FORM", "within", "FORM to be one of beside, after"),
        ("IMO", "VIEW", "whole", "VIEW to be one of augmented"),
        ("IMO", "DROPOUT", 1.0, "DROPOUT to be a number"),
        ("IMODINO", "FEATURES", "cooked", "FEATURES to be one of raw, normalized"),
        ("IMODINO", "CROP_STD", (0.0, 1.0, 1.0), "CROP_STD to be .* three numbers above 0"),
        ("IMODINO", "SCHEDULE", "steps", "SCHEDULE to be one of dino, optim"),
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
