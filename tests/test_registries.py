"""Every registered trainer and dataset, found by enumerating the registries: a new one is tested without a new test."""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dataset_trees import make_tree

import datasets
import trainers
from dassl.config import clean_cfg, get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, build_dataset
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.engine.hooks import HookBase, TensorBoard
from dassl.evaluation.passes import Evaluation
from dassl.utils import read_image, set_random_seed
from trainers.base.losses import balanced_weights, class_loss
from trainers.clip import alike

TRAINERS = TRAINER_REGISTRY.registered_names()
DATASETS = DATASET_REGISTRY.registered_names()


def make_cfg(folder: Path, *pairs: Any):
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
    cfg.merge_from_list(["OUTPUT_DIR", str(folder), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1, "SEED", 1])
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "tiny", "INPUT.SIZE", (64, 64), "INPUT.TRANSFORMS", ("normalize",)])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "DATALOADER.TRAIN_X.BATCH_SIZE", 4, "OPTIM.MAX_EPOCH", 1])
    cfg.merge_from_list(["OPTIM.NAME", "adamw", "OPTIM.LR", 1e-2, "OPTIM.LR_SCHEDULER", "cosine", "USE_CUDA", False])
    cfg.merge_from_list(list(pairs))
    cfg.freeze()
    return cfg


def quick(name: str) -> tuple[Any, ...]:
    """Two views of each training image for methods that keep more (some keep 300), and few inner steps."""
    node = TRAINER_REGISTRY.get(name).config_node()
    known = make_cfg(Path("unused")).TRAINER.get(node, {})
    limits = {"VIEWS": 2, "ITER_MM": 20}
    few = {f"TRAINER.{node}.{key}": most for key, most in limits.items() if known.get(key, 0) > most}
    return tuple(part for pair in few.items() for part in pair)


@pytest.fixture
def build(tmp_path, random_tiny, random_adapters):
    def build(name: str, *pairs: Any, seed: int = 1):
        weights = ("MODEL.BACKBONE.WEIGHTS", str(random_tiny))
        cfg = make_cfg(tmp_path, "TRAINER.NAME", name, *quick(name), *weights, "SEED", seed, *pairs)
        if getattr(TRAINER_REGISTRY.get(name), "adapters", "none") == "needed":
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.IMO_WEIGHTS = str(random_adapters)
            cfg.freeze()
        set_random_seed(seed)
        return build_trainer(cfg)

    return build


def one_step(trainer) -> dict[str, Any]:
    """The loss summary of the first training step."""
    trainer.set_model_mode("train")
    trainer.epoch, trainer.batch_idx, trainer.num_batches = 0, 0, len(trainer.train_loader_x)
    return trainer.forward_backward(next(iter(trainer.train_loader_x)))


def tuned(trainer) -> dict[int, tuple[str, torch.nn.Parameter]]:
    """The parameters that a trainer claims to tune: those of its registered models that require gradients."""
    return {
        id(parameter): (f"{model}.{name}", parameter)
        for model in trainer.get_model_names()
        for name, parameter in trainer._models[model].named_parameters()
        if parameter.requires_grad
    }


def learns(trainer) -> bool:
    return len(trainer.get_model_names()) > 0


@torch.no_grad()
def logits(trainer) -> torch.Tensor:
    trainer.set_model_mode("eval")
    input, _ = trainer.parse_batch_test(next(iter(trainer.test_loader)))  # images, features, or both
    return trainer.model_inference(input)[:8]


@pytest.mark.parametrize("name", TRAINERS)
def test_descriptions_stand_in_place_of_templates(name, build, tmp_path):
    """A file in CuPL's layout, with one sentence for the first class, two for the second, ..."""
    path, words = tmp_path / "texts.json", ("red", "a", "the", "two")
    names = datasets.digits.CLASSES
    described = {one: [f"{word} {one}." for word in words[: 1 + i % 4]] for i, one in enumerate(names)}

    path.write_text(json.dumps(described))
    trainer = build(name, "DATASET.DESCRIPTIONS", str(path))
    network, want = trainer.network, []
    for texts in described.values():
        rows = [network.clip.encode_text([text])[0].float() for text in texts]
        if not getattr(trainer, "raw_mean", False):
            rows = [row / row.norm() for row in rows]
        want.append(sum(rows) / torch.norm(sum(rows)))
    got = network.zeroshot if isinstance(getattr(network, "zeroshot", None), torch.Tensor) else network.learner.zeroshot
    torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ZeroshotCLIP", "CoOp"])
def test_descriptions_that_do_not_suit_are_told(name, build, tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"zero": []}))
    with pytest.raises(ValueError, match="at least one sentence"):
        build(name, "DATASET.DESCRIPTIONS", str(path))
    path.write_text(json.dumps({one.replace("zero", "zer0"): ["a digit."] for one in datasets.digits.CLASSES}))
    with pytest.raises(ValueError, match="lacks 'zero' .it has \"zer0\""):
        build(name, "DATASET.DESCRIPTIONS", str(path))


@pytest.mark.parametrize("name", TRAINERS)
def test_another_loss_takes_the_place_of_cross_entropy(name, build, monkeypatch):
    if not TRAINER_REGISTRY.get(name).cross_entropy:
        with pytest.raises(ValueError, match=f"OPTIM.LOSS to be ce for {name}, which takes no other loss"):
            build(name, "OPTIM.LOSS", "mae")
        if TRAINER_REGISTRY.get(name).weighs_classes:
            build(name, "OPTIM.CLASS_WEIGHTS", "balanced")
            return
        with pytest.raises(ValueError, match=f"OPTIM.CLASS_WEIGHTS to be none for {name}, which takes no weights"):
            build(name, "OPTIM.CLASS_WEIGHTS", "balanced")
        return
    taken = []
    monkeypatch.setattr(
        "trainers.base.clip_trainer.class_loss",
        lambda logits, labels, kind, weights: (
            taken.append((kind, weights)) or class_loss(logits, labels, kind, weights)
        ),
    )
    trainer = build(name, "OPTIM.LOSS", "mae", "OPTIM.CLASS_WEIGHTS", "balanced")
    assert any(trainer._optims.values())
    items = trainer.dm.dataset.train_x
    items[-1] = items[0]  # one class has two images now, and one has none
    one_step(trainer)
    assert taken and {kind for kind, _ in taken} == {"mae"}
    want = balanced_weights([item.label for item in items], trainer.num_classes)
    assert want is not None and all(torch.equal(weights, want) for _, weights in taken)


def test_a_loss_that_does_not_exist(build):
    with pytest.raises(ValueError, match="OPTIM.LOSS to be one of ce, mae but got 'huber'"):
        build("CoOp", "OPTIM.LOSS", "huber")


@pytest.mark.parametrize("name", TRAINERS)
def test_doubtful_labels_are_cleaned_before_anything_is_made_of_them(name, build):
    noise = ("DATASET.NUM_SHOTS", 4, "DATASET.LABEL_NOISE", 0.5)
    trainer = build(name, *noise, "DATASET.CLEANING", "drop", "DATASET.SUSPICIOUS", True)
    notes, left = trainer.run_notes(), len(trainer.dm.dataset.train_x)
    assert 0 < notes["cleaning"]["dropped"] == 40 - left and "precision" in notes["suspicious"]
    assert len(trainer.run_tables()["suspicious.csv"]) == 41
    if learns(trainer):
        one_step(trainer)


@pytest.mark.parametrize("name", TRAINERS)
def test_gradients_reach_exactly_what_the_trainer_tunes(name, build):
    trainer = build(name)
    if not learns(trainer):
        pytest.skip("learns nothing")
    claimed = tuned(trainer)
    if not any(trainer._optims.values()):  # fitted in closed form, or by a search
        states = [{k: v.clone() for k, v in model.state_dict().items()} for model in trainer._models.values()]
        assert not claimed
        one_step(trainer)
        new = [model.state_dict() for model in trainer._models.values()]
        assert any(not torch.equal(old[k], now[k]) for old, now in zip(states, new, strict=True) for k in old)
        return
    assert claimed
    before = {key: parameter.detach().clone() for key, (_, parameter) in claimed.items()}
    one_step(trainer)
    assert [label for label, parameter in claimed.values() if parameter.grad is None] == []
    assert any(not torch.equal(before[key], parameter) for key, (_, parameter) in claimed.items())
    in_optimizers = {
        id(parameter)
        for optimizer in trainer._optims.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    assert in_optimizers == set(claimed)
    # Whatever else is alive, frozen towers above all, got no gradient. (Trainers of earlier tests are not.)
    gc.collect()
    alive = gc.get_objects()
    kinds = {kind for kind in set(map(type, alive)) if issubclass(kind, torch.nn.Parameter)}  # of millions of objects
    assert [p for p in alive if type(p) in kinds and id(p) not in claimed and p.grad is not None] == []


def spoilt(batch: dict[str, Any]) -> dict[str, Any]:
    """A training batch whose images, or what is known of them, are NaN."""
    found = {key: batch[key] for key in ("img", "feature", "hidden") if batch.get(key) is not None}
    assert found
    nan = {
        key: tuple(v * torch.nan for v in value) if isinstance(value, (tuple, list)) else value * torch.nan
        for key, value in found.items()
    }
    return {**batch, **nan}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_that_is_left_out_moves_nothing(name, build, tmp_path):
    """A whole training with TRAIN.ON_NAN skip, in which one batch is NaN."""
    trainer = build(name, "TRAIN.ON_NAN", "skip", "TEST.NO_TEST", True)
    if not any(trainer._optims.values()):
        pytest.skip("makes no steps")
    trainer.max_epoch = 1
    batches, states = trainer.train_batches, []
    trainer.train_batches = lambda: (
        tuple(spoilt(batch) if number == 1 else batch for batch in given) for number, given in enumerate(batches())
    )

    def state() -> dict[str, torch.Tensor]:
        parts = [m.state_dict() for m in trainer._models.values()]
        parts += [
            {f"{number}.{key}": value for key, value in found.items() if isinstance(value, torch.Tensor)}
            for optimizer in trainer._optims.values()
            for number, found in enumerate(optimizer.state.values())
        ]
        return {f"{i} {key}": value.clone() for i, part in enumerate(parts) for key, value in part.items()}

    class Watching(HookBase):
        def before_step(self, trainer):
            states.append(state())

        def after_step(self, trainer):
            states.append(state())

    trainer.register_hooks([Watching()])
    trainer.train()
    assert json.loads((tmp_path / "metrics.json").read_text())["skipped_steps"] == 1
    before, after = states[2:4]
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0))] == []
    assert [key for key in states[1] if not torch.equal(states[0].get(key, states[1][key] + 1), states[1][key])]
    unchosen = {key for key, value in states[0].items() if not torch.isfinite(value.float()).all()}  # beta, say
    assert {key for key, value in states[-1].items() if not torch.isfinite(value.float()).all()} <= unchosen


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, [4, 4, 2]) for name in ("DLRCLIP", "CLIPLoRA", "TipAdapterF", "JCLIPAdapter", "RLA", "ProLIP")),
        *((name, [4, 4, 2]) for name in ("APET", "AMUTuning", "DAC", "FAR", "TwoStageFS")),
        *((name, [4, 4]) for name in ("CoOp", "CoCoOp", "KgCoOp", "ProGrad", "TCP", "MMA", "CLIPAdapter")),
        *((name, [4, 4]) for name in ("TaskRes", "CLAP", "MaPLe", "IVLP", "VPT", "PromptSRC")),
        *((name, [4, 4]) for name in ("CoPrompt", "MMRL", "MMRLPP")),
    ],
)
def test_the_last_smaller_batch_is_kept_or_left_out_as_in_the_source(name, sizes, build):
    """Ten images in batches of four."""
    loader = build(name).train_loader_x
    assert [len(batch["label"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("name", TRAINERS)
def test_saved_and_loaded_gives_equal_logits(name, build, tmp_path):
    trainer = build(name)
    if not learns(trainer):
        pytest.skip("saves nothing")
    one_step(trainer)
    trainer.save_model(0, str(tmp_path / "saved"))
    other = build(name, seed=2)
    one_step(other)
    expected = logits(trainer)
    assert not torch.equal(logits(other), expected)
    other.load_model(str(tmp_path / "saved"), epoch=1)
    assert torch.equal(logits(other), expected)
    # Scripts refuse to evaluate it on other classes where it says that it cannot, and only there.
    other.dm.dataset._classnames = [f"red {name}" for name in other.dm.dataset.classnames]
    learner = getattr(other.network, "learner", None)
    if learner is not None:
        learner.classnames = list(other.dm.dataset.classnames)
    own = other.each_class_has(other.cfg)
    with pytest.raises(ValueError, match="that were trained on") if own else contextlib.nullcontext():
        other.load_model(str(tmp_path / "saved"), epoch=1)


@pytest.mark.parametrize("name", TRAINERS)
def test_classes_that_texts_do_not_tell_apart_are_named_before_training(name, build, monkeypatch, caplog):
    monkeypatch.setattr(alike, "CLOSE", -1.0)
    with caplog.at_level("WARNING", logger=alike.__name__):
        build(name)
    (message,) = [record.getMessage() for record in caplog.records if record.name == alike.__name__]
    assert "{zero, one, two," in message and "Digits" not in message


@pytest.mark.parametrize("name", TRAINERS)
def test_same_seed_gives_equal_numbers(name, build):
    first, second = build(name), build(name)
    if learns(first):
        assert one_step(first) == one_step(second)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("name", TRAINERS)
def test_logits_have_a_column_per_class(name, build):
    trainer = build(name)
    assert logits(trainer).shape == (8, 10)


@pytest.mark.parametrize("name", TRAINERS)
def test_configuration_may_be_extended_twice(name):
    cfg = get_cfg_default()
    for _ in range(2):
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_s_settings_are_found_by_the_name_of_its_node(name, tmp_path):
    """In TensorBoard's hyper-parameters, and where a configuration is cut down to one trainer's."""
    cfg, trainer = make_cfg(tmp_path, "TRAINER.NAME", name), TRAINER_REGISTRY.get(name)
    node = trainer.config_node()
    written: dict[str, Any] = {}
    writer = SimpleNamespace(add_hparams=lambda parameters, tags: written.update(parameters))
    run = SimpleNamespace(
        cfg=cfg, writer=writer, evaluation=Evaluation("test"), config_node=trainer.config_node, epoch=0
    )
    TensorBoard().after_train(run)
    of_node = {key.split(".")[2] for key in written if key.startswith(f"TRAINER.{node}.")}
    assert of_node == set(cfg.TRAINER[node]) and of_node
    own = get_cfg_default()
    before = set(own.TRAINER)
    trainer.add_config(own)
    assert set(own.TRAINER) - before <= {node}  # what the class declares is what it makes
    short = cfg.clone()
    short.defrost()
    clean_cfg(short, name)
    assert set(short.TRAINER) == {"NAME", node} and short.TRAINER[node] == cfg.TRAINER[node]


@pytest.fixture
def dataset_cfg(tmp_path):
    """Configuration of a dataset by name; the benchmarks get a miniature tree."""

    def dataset_cfg(name: str):
        root = tmp_path / "data"
        if not root.exists():
            root.mkdir()
            make_tree(name, root)
        where = ("DATASET.ROOT", str(root) if any(root.iterdir()) else "")
        return make_cfg(tmp_path, "DATASET.NAME", name, "DATASET.NUM_SHOTS", 2, *where)

    return dataset_cfg


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_builds_picks_and_loads_an_image(name, dataset_cfg):
    dataset = build_dataset(dataset_cfg(name))
    assert dataset.num_classes == len(dataset.classnames) == len(dataset.lab2cname)
    assert {item.label for item in dataset.test} <= set(range(dataset.num_classes))
    assert all(dataset.lab2cname[item.label] == item.classname for item in dataset.test)
    for part in (dataset.train_x, dataset.val, dataset.test):
        if part:
            image = read_image(part[0].impath)
            assert image.mode == "RGB" and min(image.size) >= 32


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_is_the_same_twice_and_its_parts_are_apart(name, dataset_cfg):
    first, second = (build_dataset(dataset_cfg(name)) for _ in range(2))
    for part in ("train_x", "val", "test"):
        assert [i.impath for i in getattr(first, part) or []] == [i.impath for i in getattr(second, part) or []]
    if first.val is not None:
        train, val, test = ({i.impath for i in part} for part in (first.train_x, first.val, first.test))
        assert not (train & val or train & test or val & test)
        assert len(first.train_x) == 2 * first.num_classes


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_has_a_config_that_names_it(name):
    folder = Path(datasets.__file__).parent.parent / "configs" / "datasets"
    assert f'DATASET:\n  NAME: "{name}"\n' in [file.read_text() for file in folder.glob("*.yaml")]
