"""DePT, an option of CoOp, KgCoOp and TCP."""

import json

import pytest
import torch
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY, build_trainer
from trainers.base.dept import DePTHead, DePTKeys
from trainers.base.prompts import PromptClassifier, PromptLearner, PromptTrainer

METHODS = {"CoOp": "coop", "KgCoOp": "kgcoop", "TCP": "tcp"}


@pytest.fixture
def make(small_run):
    def build(name, *pairs, out="run"):
        node = f"TRAINER.{name.upper()}.DEPT"
        usual = (f"{node}.WEIGHT", 0.7, "DATALOADER.TRAIN_X.BATCH_SIZE", 5, "OPTIM.MAX_EPOCH", 2)
        return build_trainer(small_run(METHODS[name], *usual)(name, *pairs, out=out))

    return build


def make_classifier(clip, names, weight=0.7):
    torch.manual_seed(3)
    learner = PromptLearner(clip, names, torch.randn(4, clip.text.width), dept=DePTKeys(weight=weight))
    if learner.dept is not None:
        with torch.no_grad():
            for p in learner.dept.parameters():
                p.add_(0.5 * torch.randn_like(p))
    return PromptClassifier(clip, names, ["{}"], learner)


def test_who_has_it():
    found = {
        name
        for name in TRAINER_REGISTRY.registered_names()
        if issubclass(TRAINER_REGISTRY.get(name), PromptTrainer)
        and "dept" in TRAINER_REGISTRY.get(name).config.__dataclass_fields__
    }
    assert found == set(METHODS)


def test_the_linear_classifier_is_the_naive_one(make_clip, names, images, labels):
    classifier = make_classifier(make_clip(), names)
    head, clip = classifier.learner.dept, classifier.clip
    features, texts = clip.encode_image(images), classifier.encode_texts()

    def shifted(x, film):
        return torch.stack(
            [torch.stack([s * v + b for s, v, b in zip(film.scale, row, film.bias, strict=True)]) for row in x]
        )

    linear = head.linear_probe_proj
    of_images = shifted(features, head.film_lp_img) @ linear.weight.t() + linear.bias
    of_texts = shifted(texts, head.film_lp_text) @ linear.weight.t() + linear.bias
    logits, doubled = head.trained_on(features, texts, labels)
    torch.testing.assert_close(logits, torch.cat([of_texts[labels], of_images]), rtol=1e-4, atol=1e-4)
    assert doubled.tolist() == [*labels.tolist(), *labels.tolist()]
    prompts = clip.logit_scale * F.normalize(features, dim=-1) @ F.normalize(texts, dim=-1).t()
    torch.testing.assert_close(classifier.train()(images), prompts, rtol=1e-4, atol=1e-3)  # training: separate terms
    torch.testing.assert_close(classifier.eval()(images), 0.3 * prompts + 0.7 * of_images, rtol=1e-4, atol=1e-3)


def test_without_it_nothing_is_added(make_clip, names):
    learner = make_classifier(make_clip(), names, weight=0.0).learner
    assert learner.dept is None and set(learner.state_dict()) == {"ctx", "token_prefix", "token_suffix", "_extra_state"}


def test_classes_of_a_checkpoint(make_clip, names, images):
    trained = make_classifier(make_clip(), names).eval()
    state = trained.learner.state_dict()
    part = make_classifier(make_clip(), [names[3], names[0]]).eval()
    part.learner.take(state)
    torch.testing.assert_close(part.both(images)[1], trained.both(images)[1][:, [3, 0]], rtol=1e-4, atol=1e-3)
    other = make_classifier(make_clip(), ["meadow", names[0]]).eval()
    other.learner.take(state)
    assert not other.learner.dept.applies
    plain = make_classifier(make_clip(), ["meadow", names[0]], weight=0.0).eval()
    with torch.no_grad():
        plain.learner.ctx.copy_(trained.learner.ctx)
    torch.testing.assert_close(other.both(images)[1], plain.both(images)[1])
    other.learner.take(make_classifier(make_clip(), other.classnames).learner.state_dict())
    assert other.learner.dept.applies  # the next checkpoint may be for these classes
    with pytest.raises(ValueError, match="lacks .*dept"):
        make_classifier(make_clip(), names).learner.take(plain.learner.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_a_step_and_its_learning_rates(name, make):
    trainer = make(name, "OPTIM.LR", 0.02, "OPTIM.WARMUP_EPOCH", -1)
    head = {id(p) for p in trainer.network.learner.dept.parameters()}
    groups = trainer._optims["prompt_learner"].param_groups
    assert [{id(p) in head for p in group["params"]} for group in groups] == [{False}, {True}]
    assert [group["lr"] for group in groups] == pytest.approx([0.02, 0.13])
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.network.learner.parameters()))
    trainer.set_model_mode("train")
    trainer.num_batches = len(trainer.train_loader_x)
    batch = next(iter(trainer.train_loader_x))
    with torch.no_grad():
        outputs = trainer.network.outputs(batch["img"])
        logits, doubled = trainer.network.learner.dept.trained_on(outputs.features, outputs.texts, batch["label"])
    summary = trainer.forward_backward(batch)
    assert summary["ce"] == pytest.approx(0.3 * float(F.cross_entropy(outputs.logits, batch["label"])), rel=1e-4)
    assert summary["linear"] == pytest.approx(0.7 * float(F.cross_entropy(logits, doubled)), rel=1e-4)
    assert all(p.grad is not None for p in trainer.network.learner.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_base_to_new(name, make, tmp_path):
    base = make(name, "DATASET.SUBSAMPLE_CLASSES", "base", "TEST.NO_TEST", False, "INPUT.VIEWS", 1)
    base.train()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"] >= 0
    again = make(name, "DATASET.SUBSAMPLE_CLASSES", "base", out="again")
    again.load_model(str(tmp_path / "run"), epoch=2)
    for trainer in (base, again):
        trainer.set_model_mode("eval")
    images, _ = base.parse_batch_test(next(iter(base.test_loader)))
    with torch.no_grad():
        heads = base.model_heads(images)[base.main_head]
        torch.testing.assert_close(again.model_heads(images)[base.main_head], heads)
        prompts = base.network.logits(base.network.frozen_part(images).features, base.network.text_features())
    assert not torch.allclose(heads, prompts)
    new = make(name, "DATASET.SUBSAMPLE_CLASSES", "new", out="new")
    new.load_model(str(tmp_path / "run"), epoch=2)
    assert not new.network.learner.dept.applies and not new.each_class_has(new.cfg)
    new.set_model_mode("eval")
    with torch.no_grad():
        got = new.model_heads(images)[new.main_head]
        want = new.network.logits(new.network.frozen_part(images).features, new.network.text_features())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("key", "value"), [("WEIGHT", 1.5), ("WEIGHT", -0.1), ("LR_FACTOR", 0.0)])
def test_wrong_values(make, key, value):
    with pytest.raises(ValueError, match=rf"Expected TRAINER.COOP.DEPT.{key} to be a number, .* but got"):
        make("CoOp", f"TRAINER.COOP.DEPT.{key}", value)


def test_half_precision_features_are_taken():
    head = DePTHead(6, 3)
    assert head(torch.randn(2, 6).half()).dtype == torch.float32
