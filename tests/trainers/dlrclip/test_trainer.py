import json
import math
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dassl.engine import build_trainer
from trainers.dlrclip.glr import BETA_GRID, best_beta

from .conftest import NAMES, ToyScenes, heads_on_test

HEADS = ("clip", "cma", "glr", "final", "fused")


def trained(trainer):
    """The trainer after training."""
    trainer.train()
    return trainer


def steps(trainer, before=lambda: None):
    """One epoch by hand, without the engine's loop -> the loss summaries; `before` is called before each step."""
    trainer.set_model_mode("train")
    summaries = []
    for index, batch in enumerate(trainer.train_loader_x):
        before()
        trainer.batch_idx = index
        summaries.append(trainer.forward_backward(batch))
    return summaries


NO_TEST = ("TEST.NO_TEST", True)


def test_the_guesses_have_keys(make, monkeypatch):
    """Fixed scales, scaled gradients, fewer blocks, the smallest of equal betas: as the source may have it."""
    node, grads = "TRAINER.DLRCLIP.", []
    open_ = (f"{node}LEARN_SCALE", False, f"{node}GRAD_SCALING", True, f"{node}BETA_TIES", "smallest")
    for pairs in ((), open_):
        trainer = make(*NO_TEST, *pairs, f"{node}SCALE", 0.1)
        network = trainer.network.train()
        images, labels = trainer.parse_batch_train(next(iter(trainer.train_loader_x)))
        torch.stack(list(trainer.loss(trainer.run(images, labels), labels).values())).sum().backward()
        grads.append({name: p.grad for name, p in network.learner.cma.named_parameters() if p.requires_grad})
    plain, scaled = grads
    assert {name for name in plain if name not in scaled} == {name for name in plain if name.endswith(".scale")}
    for name, grad in scaled.items():
        torch.testing.assert_close(grad, plain[name] / 0.1, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
    preferred = []
    chosen = lambda *logits, prefer: preferred.append(prefer) or best_beta(*logits, prefer=prefer)  # noqa: E731
    monkeypatch.setattr("trainers.dlrclip.trainer.best_beta", chosen)
    trainer.choose_beta()
    assert preferred == [0.0]
    assert set(make(f"{node}END", 2).network.learner.cma.shared) == {"2"}


class TestTraining:
    def test_a_run(self, make, tmp_path, monkeypatch):
        scalars = {}
        trainer = make()
        write = trainer.write_scalar
        monkeypatch.setattr(
            trainer,
            "write_scalar",
            lambda tag, v, step=None: (scalars.setdefault(tag, []).append(step), write(tag, v, step)),
        )
        trainer.train()
        assert (tmp_path / "run" / "dlrclip" / "model.pth.tar-2").exists()
        steps = list(range(8))  # 20 images in batches of 5, two epochs
        for name in ("alpha", "weight"):
            assert all(scalars[f"train/{name}/{what}"] == steps for what in ("mean", "min", "max"))
        assert scalars["train/res_scale"] == steps
        assert all(scalars[f"train/cma_scale/{side}/{i}"] == steps for side in ("visual", "text") for i in (2, 3))
        assert all(scalars[f"train/{name}"] == steps for name in ("loss", "acc", "ce_glr", "ce_final", "l1_glr", "kd"))
        assert scalars["train/lr"] == steps
        assert trainer.selected["beta"]["on"] == "val"
        assert trainer.selected["beta"]["n"] == 10

    def test_results_have_all_heads(self, make, tmp_path):
        pytest.importorskip("dassl.engine.hooks")  # ours
        trainer = make("TRAINER.DLRCLIP.HEAD", "fused")
        trainer.train()
        results = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert list(results["test"]["heads"]) == list(HEADS)
        assert results["accuracy"] == results["test"]["heads"]["fused"]["accuracy"]
        assert results["selected"] == trainer.selected
        assert {"loss", "ce_glr", "ce_final", "kd"} <= set(results["train"])
        self._check_curves(tmp_path / "run" / "tensorboard")

    @staticmethod
    def _check_curves(folder):
        """TensorBoard's own reader finds all that a run must report."""
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        reader.Reload()
        steps = ["loss", "ce_glr", "ce_final", "l1_glr", "kd", "res_scale", "lr", "images_per_second"]
        steps += [f"{name}/{what}" for name in ("alpha", "weight") for what in ("mean", "min", "max")]
        steps += [f"cma_scale/{side}/{block}" for side in ("visual", "text") for block in (2, 3)]
        for tag in steps:
            assert [event.step for event in reader.Scalars(f"train/{tag}")] == list(range(8)), tag
        for head in HEADS:
            assert len(reader.Scalars(f"when_done/test/{head}/accuracy")) == 1

    def test_rate_follows_a_cosine_per_step(self, make):
        trainer = make("OPTIM.MAX_EPOCH", 3)
        optim = trainer._optims["dlrclip"]
        rates = []
        for _ in range(3):
            steps(trainer, lambda: rates.append(optim.param_groups[0]["lr"]))
        assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * t / 12)) for t in range(12)])
        assert optim.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)

    def test_warm_up_counts_epochs(self, make):
        trainer = make("OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_TYPE", "constant", "OPTIM.WARMUP_CONS_LR", 0.001)
        rates = []
        steps(trainer, lambda: rates.append(trainer.get_current_lr()))
        assert rates == pytest.approx([0.001] * 4)
        assert trainer.get_current_lr() > 0.001

    def test_epsilon_of_the_optimizer(self, make):
        assert make()._optims["dlrclip"].param_groups[0]["eps"] == 1e-4
        assert "eps" not in make("OPTIM.NAME", "sgd")._optims["dlrclip"].param_groups[0]

    def test_same_seed_gives_the_same_losses(self, make):
        first, second = steps(make()), steps(make())
        assert first == second
        assert len(first) == 4

    def test_only_the_learner_is_registered_and_tuned(self, make):
        trainer = make()
        assert trainer.get_model_names() == ["dlrclip"]
        before = {name: p.clone() for name, p in trainer.network.clip.state_dict().items()}
        tuned = {id(p) for group in trainer._optims["dlrclip"].param_groups for p in group["params"]}
        assert tuned == {id(p) for p in trainer.network.learner.parameters()}
        trained(trainer)
        after = trainer.network.clip.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    @pytest.mark.parametrize("prec", ["amp", "bf16", "fp16"])
    def test_reduced_precision(self, make, prec):
        trainer = make("TRAINER.DLRCLIP.PREC", prec, "OPTIM.MAX_EPOCH", 1, *NO_TEST)
        trainer.train()
        assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in trainer.network.learner.parameters())

    @pytest.mark.parametrize(
        "pairs",
        [
            ("TRAINER.DLRCLIP.CMA", False),
            ("TRAINER.DLRCLIP.GLR", False),
            ("TRAINER.DLRCLIP.SKD", False),
            ("TRAINER.DLRCLIP.FIXED_WEIGHT", 0.5, "TRAINER.DLRCLIP.FIXED_ALPHA", 0.1),
        ],
    )
    def test_switches_run_save_and_load(self, make, pairs, tmp_path):
        saved = trained(make(*pairs, *NO_TEST))
        loaded = make(*pairs)
        loaded.load_model(str(tmp_path / "run"))
        want, got = heads_on_test(saved), heads_on_test(loaded)
        assert all(torch.equal(got[head], want[head]) for head in HEADS)

    def test_resuming_gives_the_uninterrupted_run(self, make, tmp_path):
        pytest.importorskip("dassl.engine.hooks")  # ours: upstream draws other batches after resuming
        pairs = ("OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1, "SEED", 1, *NO_TEST)
        want = trained(make(*pairs)).network.learner.state_dict()
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        folder = tmp_path / "again" / "dlrclip"
        (folder / "model.pth.tar-3").unlink()
        (folder / "model.pth.tar-2").unlink()
        (folder / "checkpoint").write_text("model.pth.tar-1\n")
        got = trained(make(*pairs, out="again")).network.learner.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


class TestBeta:
    def test_is_chosen_on_validation_images_only(self, make):
        class Untouchable:
            def __iter__(self):
                raise AssertionError("test images were read")

        trainer = make(*NO_TEST)
        trainer.test_loader = Untouchable()
        trained(trainer)
        logits, labels = trainer._collect(trainer.val_loader)
        mean = float(trainer.network.learner.weight_mean)
        want = best_beta(logits["cma"], logits["glr"], labels, prefer=mean)
        assert trainer.selected == {"beta": {"value": want.value, "on": "val", "n": 10}}
        assert float(trainer.network.learner.beta) == pytest.approx(want.value)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"val": 0}, "mean learnt w (no validation set)"),
            ({"val_is_test": True}, "mean learnt w (validation images are test images)"),
        ],
    )
    def test_without_validation_images_it_is_the_mean_weight(self, make, dataset, options, said, tmp_path):
        dataset(**options)
        trainer = trained(make(*NO_TEST))
        mean = float(trainer.network.learner.weight_mean)
        assert trainer.selected == {"beta": {"value": mean, "on": said, "n": 0}}
        assert mean != 0.5
        logits = heads_on_test(trainer)
        torch.testing.assert_close(logits["fused"], mean * logits["cma"] + (1 - mean) * logits["glr"])
        again = make()
        again.load_model(str(tmp_path / "run"))
        assert again.selected["beta"]["value"] == mean
        assert again.selected["beta"]["on"].startswith("mean learnt w")

    def test_val_as_in_coop_is_no_validation_set(self, make_cfg):
        cfg = make_cfg(*NO_TEST)
        cfg.defrost()
        cfg.DATASET.VAL = "coop"
        cfg.freeze()
        trainer = trained(build_trainer(cfg))
        assert trainer.selected["beta"]["n"] == 0

    def test_every_checkpoint_carries_one(self, make, tmp_path):
        trained(make("TRAIN.CHECKPOINT_FREQ", 2, "OPTIM.MAX_EPOCH", 3, *NO_TEST))
        for epoch in (2, 3):
            path = tmp_path / "run" / "dlrclip" / f"model.pth.tar-{epoch}"
            state = torch.load(path, weights_only=True)["state_dict"]
            assert 0 <= float(state["beta"]) <= 1
            assert int(state["beta_n"]) == 10

    def test_best_model_on_validation(self, make, tmp_path):
        trainer = make("TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 3)
        trainer.train()
        state = torch.load(tmp_path / "run" / "dlrclip" / "model-best.pth.tar", weights_only=True)["state_dict"]
        assert trainer.selected["beta"]["value"] == pytest.approx(float(state["beta"]))
        assert torch.equal(trainer.network.learner.glr.head.weight, state["glr.head.weight"])


class TestLoading:
    @pytest.fixture
    def run(self, make, tmp_path):
        make(*NO_TEST).train()
        return str(tmp_path / "run")

    def test_gives_equal_logits(self, make, run):
        first, second = make(out="1"), make(out="2")
        first.load_model(run)
        second.load_model(run, epoch=2)
        a, b = heads_on_test(first), heads_on_test(second)
        assert all(torch.equal(a[head], b[head]) for head in HEADS)
        fresh = heads_on_test(make(out="3"))
        assert torch.equal(fresh["clip"], a["clip"])
        assert not torch.equal(fresh["glr"], a["glr"])
        assert first.selected["beta"]["value"] in BETA_GRID
        assert first.selected["beta"]["n"] == 10

    def test_other_classes(self, make, run, dataset):
        dataset(names=["airport", "bridge", "desert"])
        trainer = make(out="other")
        trainer.load_model(run)
        logits = heads_on_test(trainer)
        assert torch.equal(logits["glr"], logits["clip"])
        w = float(trainer.network.learner.weight_mean)
        torch.testing.assert_close(logits["final"], w * logits["cma"] + (1 - w) * logits["clip"])
        assert not torch.allclose(logits["cma"], heads_on_test(make(out="fresh"))["cma"])
        trainer.test()
        with pytest.raises(ValueError, match="go on with the 5 classes"):
            trainer.train()

    def test_same_classes_under_another_dataset(self, make, run):
        trainer = make("DATASET.TEMPLATE", "{} texture.", out="other")
        trainer.load_model(run)
        logits = heads_on_test(trainer)
        assert not torch.equal(logits["glr"], logits["clip"])

    def test_subset_of_the_classes(self, make, run, dataset):
        full = make(out="full")
        full.load_model(run)
        want = heads_on_test(full)
        # The images of the two subset classes are those of classes 0 and 1; only the class list matters here.
        dataset(names=[NAMES[1], NAMES[3]], class_indices=[1, 3])
        part = make(out="part")
        part.load_model(run)
        assert part.network.seen
        images = torch.stack([item["img"] for item in full.test_loader.dataset])
        full.set_model_mode("eval")
        part.set_model_mode("eval")
        want, got = full.model_heads(images), part.model_heads(images)
        for head in HEADS:
            torch.testing.assert_close(got[head], want[head][:, [1, 3]])
        assert not torch.equal(got["glr"], got["clip"])

    def test_subset_is_reported_both_ways(self, make, run, dataset, tmp_path):
        dataset(names=[NAMES[1], NAMES[3]], class_indices=[1, 3])
        part = make(out="part")
        part.load_model(run)
        part.test()
        test = json.loads((tmp_path / "part" / "metrics.json").read_text())["test"]
        cut, kway = test["heads"], test["heads_kway"]
        assert list(cut) == list(kway) == list(HEADS)
        # Zero-shot classes do not see each other. (Logits, not accuracies: a random CLIP is nearly tied, and how sums
        # are rounded depends on the number of threads.)
        as_trained = heads_on_test(part)["clip"]
        part.bind_classes([NAMES[1], NAMES[3]], None)
        torch.testing.assert_close(as_trained, heads_on_test(part)["clip"])
        assert kway["glr"] == kway["clip"] and cut["glr"]["ece"] != cut["clip"]["ece"]  # no refiner for new classes

    def test_nothing_given(self, make):
        trainer = make()
        before = heads_on_test(trainer)
        trainer.load_model("")
        assert torch.equal(heads_on_test(trainer)["cma"], before["cma"])

    def test_no_such_checkpoint(self, make, run, tmp_path):
        trainer = make()
        with pytest.raises(FileNotFoundError, match="Expected a checkpoint of DLRCLIP in .*nowhere"):
            trainer.load_model(str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match="model.pth.tar-7"):
            trainer.load_model(run, epoch=7)

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            (("TRAINER.DLRCLIP.DIM", 4), "to have shape"),
            (("TRAINER.DLRCLIP.START", 1), "made with the same settings"),
            (("TRAINER.DLRCLIP.GLR", False), "made with the same settings"),
            (("TRAINER.DLRCLIP.FIXED_WEIGHT", 0.5), "made with the same settings"),
            (
                ("TRAINER.DLRCLIP.TEXT_CTX_INIT", "a drawing of a"),
                "prompt context 'a drawing of a' but got",
            ),
        ],
    )
    def test_a_checkpoint_that_does_not_fit(self, make, run, pairs, message):
        with pytest.raises(ValueError, match=message):
            make(*pairs, out="other").load_model(run)

    def test_a_checkpoint_for_other_weights(self, make, run, weights):
        trainer = make("MODEL.BACKBONE.WEIGHTS", str(weights / "b"), out="other")
        with pytest.raises(ValueError, match="for CLIP weights with sha256"):
            trainer.load_model(run)

    def test_a_checkpoint_of_something_else(self, make, tmp_path):
        folder = tmp_path / "else" / "dlrclip"
        folder.mkdir(parents=True)
        torch.save({"state_dict": {"ctx": torch.zeros(1)}, "epoch": 1}, folder / "model.pth.tar-1")
        with pytest.raises(ValueError, match="of DLRCLIP but got something else"):
            make().load_model(str(tmp_path / "else"), epoch=1)


class TestErrors:
    def test_before_anything_is_loaded(self, make, dataset, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("CLIP was loaded")

        monkeypatch.setattr("trainers.base.clip_trainer.load_clip", refuse)
        monkeypatch.setattr(ToyScenes, "__init__", refuse)
        for pairs, message in [
            (("TRAINER.DLRCLIP.DIM", 0), "DIM to be a whole number"),
            (("MODEL.BACKBONE.NAME", "ViT-B/61"), "ViT-B/16"),
            (("DATASET.TEMPLATE", "a photo"), "{}"),
        ]:
            with pytest.raises(ValueError, match=message):
                make(*pairs)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            make("MODEL.BACKBONE.WEIGHTS", "/nowhere/at/all")

    def test_image_size(self, make):
        with pytest.raises(ValueError, match=r"INPUT.SIZE to be \(32, 32\) for tiny but got \(64, 64\)"):
            make("INPUT.SIZE", (64, 64))

    def test_first_block_beyond_the_last(self, make):
        with pytest.raises(ValueError, match="START. to be at most 4"):
            make("TRAINER.DLRCLIP.START", 5, "TRAINER.DLRCLIP.END", 12)


class TestSharedFeatures:
    def test_a_second_run_reads_what_the_first_computed_and_says_the_same(self, make, tmp_path, monkeypatch):
        cache = ("FEATURE_CACHE.USE", True, "FEATURE_CACHE.DIR", str(tmp_path / "features"))
        earlier, trainer = make(*cache), make(*cache)
        first = heads_on_test(earlier)
        monkeypatch.setattr(trainer.network, "_run_frozen", forbidding_features(trainer.network._run_frozen))
        again = heads_on_test(trainer)
        plain = heads_on_test(make("FEATURE_CACHE.USE", False))
        assert len(list((tmp_path / "features").glob("*.safetensors"))) == 1
        for head in HEADS:
            assert torch.equal(first[head], again[head]) and torch.equal(first[head], plain[head])

    def test_the_features_are_those_that_other_methods_keep(self, make, tmp_path):
        trainer = make("FEATURE_CACHE.USE", True, "FEATURE_CACHE.DIR", str(tmp_path / "features"))
        heads_on_test(trainer)
        slot = trainer.test_loader.slot
        images = torch.cat([batch["img"] for batch in trainer.test_loader.loader])
        expected = [slot.encoder(part) for part in images.split(trainer.test_loader.loader.batch_size)]
        assert torch.equal(slot.load().values[0], torch.cat(expected))


def forbidding_features(run_frozen):
    """`run_frozen` that must not be asked for zero-shot features."""

    def run(hidden, with_features):
        assert not with_features
        return run_frozen(hidden, with_features)

    return run
