"""Every trainer that trains through CLIP's encoders, through configuration, engine, checkpoints and predict.py."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from view_loops import Uncached, epochs

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY, build_trainer
from trainers.app import predict, prediction
from trainers.base.encoder_trainer import EncoderTrainer
from trainers.clip import text

ROOT = Path(__file__).parents[2]
TRAINERS = [n for n in TRAINER_REGISTRY.registered_names() if issubclass(TRAINER_REGISTRY.get(n), EncoderTrainer)]
CONFIGS = {
    name: file.parent
    for file in (ROOT / "configs" / "trainers").glob("*/tiny.yaml")
    for name in TRAINERS
    if f"--trainer {name} " in file.read_text()
}
SHORT = {
    "CLIPLoRA": ["TRAINER.CLIPLORA.N_ITERS", 0, "TRAINER.CLIPLORA.DROPOUT", 0.0],
    "TwoStageFS": ["TRAINER.TWOSTAGEFS.N_ITERS", 0],
}  # what makes a run short and free of random numbers
every = pytest.mark.parametrize("name", TRAINERS)
KEEPS = [name for name in TRAINERS if not TRAINER_REGISTRY.get(name).no_views]
AUGMENTED = ("INPUT.TRANSFORMS", ("random_resized_crop", "normalize"), "SEED", 3)


@pytest.fixture
def make_cfg(tmp_path, random_tiny):
    def make(name, *pairs, out="run", file="tiny"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(CONFIGS[name] / f"{file}.yaml")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1])
        cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, "SEED", 1])
        cfg.merge_from_list(["DATALOADER.TRAIN_X.BATCH_SIZE", 4, "DATALOADER.TEST.BATCH_SIZE", 30])
        cfg.merge_from_list(["OPTIM.MAX_EPOCH", 2, "TEST.NO_TEST", True])
        cfg.merge_from_list(SHORT.get(name, []))
        cfg.merge_from_list(list(pairs))
        cfg.freeze()
        return cfg

    return make


@torch.no_grad()
def heads(trainer):
    trainer.set_model_mode("eval")
    images, _ = trainer.parse_batch_test(next(iter(trainer.test_loader)))
    return trainer.model_heads(images)


@every
def test_configs_merge_and_open_with_their_command(name, tmp_path):
    for file in CONFIGS[name].glob("*.yaml"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(file)
        assert cfg.TRAINER.NAME == name
        command = f"#   python train.py --trainer {name} --config-file {file.relative_to(ROOT).as_posix()}"
        assert command in file.read_text().split("\n\n")[0]


@every
def test_a_run_and_its_files(name, make, tmp_path):
    trainer = make(name, "TEST.NO_TEST", False, "DATASET.SUBSAMPLE_CLASSES", "base")
    trainer.train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["test"]["heads"]) == {"clip", trainer.main_head}
    assert metrics["accuracy"] == metrics["test"]["heads"][trainer.main_head]["accuracy"]
    assert 0 < metrics["params"]["trainable"] < metrics["params"]["total"]
    assert (tmp_path / "run" / trainer.model_name / "model.pth.tar-2").is_file()


@every
def test_zero_shot_head_is_clip(name, make):
    trainer = make(name)
    images, _ = trainer.parse_batch_test(next(iter(trainer.test_loader)))
    network = trainer.network
    plain = network.clip.logit_scale * F.normalize(network.clip.encode_image(images), dim=-1) @ network.zeroshot.t()
    torch.testing.assert_close(heads(trainer)["clip"], plain, rtol=1e-4, atol=1e-3)


@every
def test_resuming_gives_the_uninterrupted_run(name, make, tmp_path):
    plain = ("INPUT.TRANSFORMS", ("normalize",))
    whole = make(name, *plain, out="whole")
    whole.train()
    half = make(name, *plain, "TRAIN.CHECKPOINT_FREQ", 1, out="half")
    half.train()
    folder = tmp_path / "half" / half.model_name
    (folder / "checkpoint").write_text("model.pth.tar-1\n")
    torch.manual_seed(5)
    again = make(name, *plain, out="half")
    again.train()
    for key, value in whole.network.learner.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(again.network.learner.state_dict()[key], value, rtol=1e-5, atol=1e-7)
    assert again.epoch == 1


@every
def test_new_classes_at_test_time(name, make, tmp_path):
    """Base-to-new: trained on one half of the classes, evaluated on the other, whose prompts are built anew."""
    base = make(name, "DATASET.SUBSAMPLE_CLASSES", "base")
    base.train()
    new = make(name, "DATASET.SUBSAMPLE_CLASSES", "new", out="new")
    before = heads(new)[new.main_head]
    new.load_model(str(tmp_path / "run"), epoch=2)
    after = heads(new)
    assert not torch.equal(before, after[new.main_head])
    every_class = make(name, out="all")
    every_class.load_model(str(tmp_path / "run"))
    images, _ = new.parse_batch_test(next(iter(new.test_loader)))
    with torch.no_grad():
        columns = every_class.model_heads(images)[new.main_head][:, 5:]
    torch.testing.assert_close(after[new.main_head], columns, rtol=1e-4, atol=1e-3)


@every
def test_predict(name, make, tmp_path):
    make(name).train()
    paths = [item.impath for item in make(name).dm.dataset.test[:3]]
    for classes in (None, "three,one"):
        args = SimpleNamespace(
            model_dir=str(tmp_path / "run"), load_epoch=None, classes=classes, cpu=True, debug=False, set=[],
            batch_size=None,
        )  # fmt: skip
        trainer, names = prediction.load_trainer(args)
        predictions, unreadable, head = predict.predict(
            prediction.Model(trainer, names), [(path, path) for path in paths]
        )
        assert (len(predictions), unreadable, head) == (3, {}, trainer.main_head)
        assert predictions[0].probabilities.shape == (len(names),)
        assert len(names) == (10 if classes is None else 2)


@every
def test_wrong_precision_and_missing_node(name, make_cfg, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("CLIP was loaded before the check")

    monkeypatch.setattr("trainers.base.clip_trainer.load_clip", refuse)
    node = TRAINER_REGISTRY.get(name).node_name
    with pytest.raises(ValueError, match=f"TRAINER.{node}.PREC to be one of fp32, fp16, amp, bf16"):
        build_trainer(make_cfg(name, f"TRAINER.{node}.PREC", "fp8"))
    cfg = make_cfg(name)
    cfg.defrost()
    del cfg.TRAINER[node]
    with pytest.raises(ValueError, match=f"node TRAINER.{node}"):
        build_trainer(cfg)
    with pytest.raises(ValueError, match="did you mean"):
        build_trainer(make_cfg(name, "MODEL.BACKBONE.NAME", "ViT-B16"))


# fmt: off
WRONG: dict[str, list[tuple[str, object]]] = {
    "CoOp": [("COOP.N_CTX", 0), ("COOP.CSC", "yes"), ("COOP.CTX_INIT", "a {}"), ("COOP.CLASS_TOKEN_POSITION", "back")],
    "CLIPLoRA": [
        ("CLIPLORA.RANK", 0), ("CLIPLORA.ALPHA", 0.0), ("CLIPLORA.DROPOUT", 1.0), ("CLIPLORA.N_ITERS", -1),
        ("CLIPLORA.LR_MIN", -1.0),
    ],
    "TwoStageFS": [
        ("TWOSTAGEFS.N_ITERS", -1), ("TWOSTAGEFS.FIRST_SHARE", 1.5), ("TWOSTAGEFS.NORMS", "some"),
        ("TWOSTAGEFS.LR_MIN", -1.0),
    ],
    "KgCoOp": [("KGCOOP.N_CTX", 0), ("KGCOOP.CTX_INIT", "a {}"), ("KGCOOP.W", -1.0)],
    "ProGrad": [("PROGRAD.N_CTX", 0), ("PROGRAD.FROM_TEMPLATE", 1), ("PROGRAD.LAMBDA", -1.0), ("PROGRAD.T", 0.0)],
    "TCP": [("TCP.N_CTX", 0), ("TCP.CTX_INIT", "a {}"), ("TCP.LAYER", 0), ("TCP.W", -1.0), ("TCP.REST", "a pet")],
    "CoCoOp": [("COCOOP.N_CTX", 0), ("COCOOP.CTX_INIT", "a {}")],
    "MaPLe": [("MAPLE.N_CTX", 0), ("MAPLE.N_CTX", 5), ("MAPLE.CTX_INIT", "a {}"), ("MAPLE.PROMPT_DEPTH", 0)],
    "IVLP": [
        ("IVLP.N_CTX_TEXT", 0), ("IVLP.N_CTX_TEXT", 5), ("IVLP.N_CTX_VISION", 0), ("IVLP.CTX_INIT", "a {}"),
        ("IVLP.PROMPT_DEPTH_TEXT", 0), ("IVLP.PROMPT_DEPTH_VISION", -1),
    ],
    "VPT": [("VPT.N_CTX_VISION", 0), ("VPT.CTX_INIT", "a {}"), ("VPT.PROMPT_DEPTH_VISION", 0)],
    "PromptSRC": [
        ("PROMPTSRC.N_CTX_TEXT", 5), ("PROMPTSRC.N_CTX_VISION", 0), ("PROMPTSRC.PROMPT_DEPTH_TEXT", 0),
        ("PROMPTSRC.TEXT_LOSS_WEIGHT", -1.0), ("PROMPTSRC.IMAGE_LOSS_WEIGHT", -1.0), ("PROMPTSRC.GPA_STD", 0.0),
        ("PROMPTSRC.N_TEMPLATES", 81),
    ],
    "CoPrompt": [
        ("COPROMPT.N_CTX", 5), ("COPROMPT.PROMPT_DEPTH", 0), ("COPROMPT.W", -1.0), ("COPROMPT.IMAGE_SHARE", 1.5),
        ("COPROMPT.TEXT_SHARE", -0.1),
    ],
    "MMRL": [
        ("MMRL.ALPHA", 1.5), ("MMRL.REG_WEIGHT", -1.0), ("MMRL.N_REP_TOKENS", 0), ("MMRL.REP_START", 0),
        ("MMRL.REP_START", 7), ("MMRL.REP_END", 2), ("MMRL.REP_DIM", 0), ("MMRL.HEADS", "all"),
    ],
    "MMRLPP": [("MMRLPP.BETA", 1.5), ("MMRLPP.PROJ_LORA_DIM", 0), ("MMRLPP.RES_LORA_DIM", 0), ("MMRLPP.ALPHA", -1.0)],
    "MMA": [
        ("MMADAPTER.TEXT_CTX_INIT", "a {}"), ("MMADAPTER.ADAPTER_START", 0), ("MMADAPTER.ADAPTER_DIM", 0),
        ("MMADAPTER.ADAPTER_END", 4), ("MMADAPTER.ADAPTER_SCALE", 0.0),
        ("MMADAPTER.GRAD_SCALING", "yes"),
    ],
}
# fmt: on


@pytest.mark.parametrize(("name", "key", "value"), [(n, *pair) for n, pairs in WRONG.items() for pair in pairs])
def test_wrong_values(name, key, value, make_cfg):
    cfg = make_cfg(name)
    cfg.defrost()
    node, key = key.split(".")
    cfg.TRAINER[node][key] = value
    with pytest.raises(ValueError, match=rf"Expected TRAINER.{node}.{key} to be .* but got"):
        build_trainer(cfg)


@every
@pytest.mark.parametrize("prec", ["amp", "bf16", "fp16"])
def test_reduced_precision(name, prec, make):
    trainer = make(name, f"TRAINER.{TRAINER_REGISTRY.get(name).node_name}.PREC", prec)
    trainer.set_model_mode("train")
    trainer.num_batches = len(trainer.train_loader_x)
    summary = trainer.forward_backward(next(iter(trainer.train_loader_x)))
    assert 0 < summary["loss"] < 100
    assert all(p.dtype == torch.float32 for p in trainer.network.learner.parameters())


@every
def test_nothing_to_load_and_nothing_there(name, make, tmp_path):
    trainer = make(name)
    trainer.load_model("")
    with pytest.raises(FileNotFoundError, match=f"checkpoint of {name} in"):
        trainer.load_model(str(tmp_path / "nowhere"))


def test_steps_of_lora(make):
    """N_ITERS x shots steps, however many batches an epoch has, on a cosine from LR to LR_MIN."""
    trainer = make("CLIPLoRA", "TRAINER.CLIPLORA.N_ITERS", 7, "DATASET.NUM_SHOTS", 1, "OPTIM.LR", 2e-4)
    assert len(trainer.train_loader_x) == 3  # ten images in batches of four, the last one of two
    rates, step = [], trainer.model_update
    trainer.model_update = lambda *args: (rates.append(trainer.get_current_lr()), step(*args))
    trainer.train()
    assert (len(rates), trainer.max_epoch) == (7, 3)
    cosine = [1e-6 + (2e-4 - 1e-6) * (1 + math.cos(math.pi * t / 7)) / 2 for t in range(8)]
    assert [*rates, trainer.get_current_lr()] == pytest.approx(cosine)


def test_lora_on_all_images_counts_epochs(make):
    trainer = make("CLIPLoRA", "TRAINER.CLIPLORA.N_ITERS", 7, "DATASET.NUM_SHOTS", -1)
    assert trainer.max_epoch == 2 and trainer.total_steps == 2 * len(trainer.train_loader_x)


@pytest.mark.parametrize("name", ["CoOp", "CoCoOp", "KgCoOp", "ProGrad", "TCP"])
def test_published_checkpoint_file(name, make, tmp_path):
    """As upstream writes it: half precision, full-length tokens of other classes, a live scheduler, no record."""
    trainer = make(name)
    learner = trainer.network.learner
    state = {key: torch.randn(p.shape).half() for key, p in learner.named_parameters()}
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.002, momentum=0.9)
    scheduler = {"successor": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50), "last_epoch": 50}
    tokens = {"token_prefix": torch.randn(40, 1, 64).half(), "token_suffix": torch.randn(40, 72, 64).half()}
    content = {"state_dict": {**state, **tokens}, "epoch": 50, "scheduler": scheduler, "val_result": None}
    (tmp_path / "prompt_learner").mkdir()
    torch.save(content, tmp_path / "prompt_learner" / "model.pth.tar-50")
    trainer.load_model(str(tmp_path), epoch=50)
    assert all(torch.equal(p, state[key].float()) for key, p in learner.named_parameters())
    assert torch.isfinite(heads(trainer)[trainer.main_head]).all()


@every
def test_a_list_of_templates(name, make):
    """The head clip is the mean over the templates."""
    trainer = make(name, "DATASET.TEMPLATE", ["a {}", "{} texture."])
    clip, names = trainer.network.clip, trainer.dm.dataset.classnames
    with torch.no_grad():
        rows = torch.stack([clip.encode_text([t.format(n) for n in names]) for t in ("a {}", "{} texture.")])
    want = torch.nn.functional.normalize(torch.nn.functional.normalize(rows, dim=-1).mean(0), dim=-1)
    torch.testing.assert_close(trainer.network.zeroshot, want, rtol=1e-4, atol=1e-5)


@every
def test_computing_the_beginning_of_prompts_once_changes_no_loss_and_no_gradient(name, make, monkeypatch):
    """On a GPU, prompts are computed whole where sharing saves too little (SHARING_COST)."""
    found = []
    for cost in (0, 10**6):
        monkeypatch.setitem(text.SHARING_COST, "cpu", cost)
        trainer = make(name, "INPUT.TRANSFORMS", ("normalize",))
        trainer.set_model_mode("train")
        trainer.batch_idx, trainer.num_batches = 0, 10
        trainer.guard.begin()
        torch.manual_seed(2)
        summary = trainer.forward_backward(next(iter(trainer.train_loader_x)))
        grads = [p.grad for p in trainer.network.learner.parameters() if p.grad is not None]
        found.append((summary["loss"], grads))
    (loss, grads), (loss_whole, grads_whole) = found
    assert loss_whole == pytest.approx(loss, rel=1e-5) and len(grads) == len(grads_whole) > 0
    for one, other in zip(grads, grads_whole, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_who_can_keep_views():
    assert {"CoOp", "CoCoOp", "KgCoOp", "MMA", "MMRL", "MMRLPP", "ProGrad", "TCP", "TwoStageFS"} <= set(KEEPS)
    refusing = [n for n in TRAINER_REGISTRY.registered_names() if getattr(TRAINER_REGISTRY.get(n), "no_views", "")]
    deep = {"CoPrompt", "IVLP", "MaPLe", "PromptSRC", "VPT"}
    assert set(refusing) == {"CLIPLoRA", "IMO", "IMODINO", *deep}


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        *((name, ()) for name in KEEPS),
        *((name, ("INPUT.VIEWS_MEMORY", 0.0, "PREC", "bf16")) for name in KEEPS),
        *((name, ("PREC", "amp")) for name in KEEPS),
        ("MMA", ("TRAINER.MMADAPTER.ADAPTER_START", 1)),
    ],
)
def test_losses_on_kept_views_are_those_of_the_same_images_encoded_anew(name, pairs, make):
    pairs = [f"TRAINER.{TRAINER_REGISTRY.get(name).node_name}.PREC" if part == "PREC" else part for part in pairs]
    cached = make(name, "INPUT.VIEWS", 2, *AUGMENTED, *pairs)
    got, order = epochs(cached, cached.train_loader_x, 3)
    assert cached.train_loader_x.store.on_disk == ("INPUT.VIEWS_MEMORY" in pairs)
    plain = make(name, *AUGMENTED, *pairs, out="plain")
    want, _ = epochs(plain, Uncached(plain, 2, 3, order), 3)
    assert len(got) == 3 * len(cached.train_loader_x) >= 6
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", KEEPS)
def test_the_frozen_image_tower_runs_once(name, make, monkeypatch):
    trainer = make(name, "INPUT.VIEWS", 1, *AUGMENTED, "DATALOADER.TRAIN_X.BATCH_SIZE", 5)
    visual, calls = trainer.network.clip.visual, {"prefix": 0, "suffix": 0, "first_tokens": 0}

    def count(part):
        whole = getattr(visual, part)

        def counted(*arguments):
            calls[part] += 1
            return whole(*arguments)

        monkeypatch.setattr(visual, part, counted)

    for part in calls:
        count(part)
    epochs(trainer, trainer.train_loader_x, 1)
    assert calls["prefix"] == 2
    calls.update(prefix=0, suffix=0, first_tokens=0)
    steps = len(epochs(trainer, trainer.train_loader_x, 1)[0])
    adapted = trainer.network.first_adapted is not None
    assert calls["prefix"] == 0 and calls["suffix"] + calls["first_tokens"] == (steps if adapted else 0)


@pytest.mark.parametrize("name", KEEPS)
def test_a_resumed_run_on_kept_views_ends_as_an_uninterrupted_one(name, make, tmp_path):
    pairs = ("INPUT.VIEWS", 2, *AUGMENTED, "OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    whole = make(name, *pairs, out="whole")
    whole.train()
    assert not whole.train_loader_x.store.known.any()  # their memory is given back
    half = make(name, *pairs, out="half")
    half.train()
    (tmp_path / "half" / half.model_name / "checkpoint").write_text("model.pth.tar-1\n")
    torch.manual_seed(5)
    again = make(name, *pairs, out="half")
    again.train()
    for key, value in whole.network.learner.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(again.network.learner.state_dict()[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(TRAINERS) - set(KEEPS)))
def test_a_method_that_can_keep_no_views_says_so_before_clip_is_loaded(name, make_cfg, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("CLIP was loaded before the check")

    monkeypatch.setattr("trainers.base.clip_trainer.load_clip", refuse)
    with pytest.raises(ValueError, match=f"Expected INPUT.VIEWS to be 0 for {name}, whose .* image tower, but got 2"):
        build_trainer(make_cfg(name, "INPUT.VIEWS", 2))


@pytest.mark.parametrize("name", KEEPS)
def test_wrong_numbers_of_views(name, make_cfg):
    with pytest.raises(ValueError, match="Expected INPUT.VIEWS to be a whole number, at least 0, but got -1"):
        build_trainer(make_cfg(name, "INPUT.VIEWS", -1))
