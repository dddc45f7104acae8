import naive_deep
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from dassl.utils import set_random_seed
from trainers.clip import Prompts
from trainers.coprompt import CoPrompt, CoPromptClassifier, CoPromptConfig, CoPromptLearner

SENTENCES = {
    "forest": ["many trees", "leaves"],
    "highway_road": ["a wide road", "cars", "lanes"],
    "river": ["water that runs"],
    "sea lake": ["water that stands", "waves"],
    "industrial buildings": ["halls", "chimneys", "smoke", "roofs"],
}


@pytest.fixture
def make(make_clip, names):
    def build(classnames=names, templates=None, **arguments):
        clip = make_clip()
        torch.manual_seed(3)
        learner = CoPromptLearner(clip, classnames, CoPromptConfig(**{"prompt_depth": 3, **arguments}))
        if templates is None:
            templates = Prompts(["a photo of a {}."], {**SENTENCES, "meadow": ["grass"]})
        return CoPromptClassifier(clip, classnames, templates, learner)

    return build


class Bare(CoPrompt):
    """A step alone, without a run."""

    settings = CoPromptConfig(w=3.0)
    place = 0.6

    def __init__(self, network):
        self.network = network

    def _draw(self):
        return self.place


def naive_features(model, learner, images, names):
    own = learner.prompt_learner
    text = {1: own.ctx, **dict(enumerate(own.compound_prompts_text, start=2))}
    maps = [own.proj, *own.compound_prompt_projections]
    behind = {i: t @ m.weight.t() + m.bias for (i, t), m in zip(text.items(), maps, strict=True)}
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
    t = naive_deep.encode_texts(model, prompts, own.ctx, {i: tokens for i, tokens in text.items() if i > 1})
    f = naive_deep.image_features(model, images, behind)
    mixed = []
    for x, layers, share in ((f, learner.adapter_image.fc, 0.1), (t, learner.adapter_text.fc, 0.2)):
        hidden = (x @ layers[0].weight.t()).clamp(min=0)
        mixed.append(F.normalize(share * (hidden @ layers[2].weight.t()).clamp(min=0) + (1 - share) * x, dim=-1))
    return mixed


def test_losses_and_gradients_are_the_naive_ones(make, images, labels, names):
    network = make().train()
    trainer, other = Bare(network), images.flip(3)
    outputs = trainer.run((images, other), labels)
    got = trainer.more_losses(outputs)
    model = random_open_clip()
    f, t = naive_features(model, network.learner, images, names)
    with torch.no_grad():
        frozen = F.normalize(model.encode_image(other), dim=-1)
        drawn = [SENTENCES[name][int(0.6 * len(SENTENCES[name]))] for name in names]
        texts = F.normalize(naive_deep.encode_texts(model, drawn), dim=-1)
    want = {
        "image": 3 * (1 - sum(a @ b for a, b in zip(f, frozen, strict=True)) / 6),
        "text": 3 * (1 - sum(a @ b for a, b in zip(t, texts, strict=True)) / 5),
    }
    logits = model.logit_scale.exp() * f @ t.t()
    torch.testing.assert_close(outputs.logits / 100, logits / 100, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    learnt = list(network.learner.parameters())
    total, want_total = (
        F.cross_entropy(x, labels) + sum(y.values()) for x, y in ((outputs.logits, got), (logits, want))
    )
    for a, b in zip(torch.autograd.grad(total, learnt), torch.autograd.grad(want_total, learnt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network.eval().both(images)[1], outputs.logits, rtol=1e-5, atol=1e-4)


def test_sentences_by_place(make):
    network = make()
    assert network.counts.tolist() == [2, 3, 1, 2, 4]
    for place, rows in ((0.0, [0, 2, 5, 6, 8]), (0.5, [1, 3, 5, 7, 10]), (0.9999, [1, 4, 5, 7, 11])):
        assert torch.equal(network.sentence_of_each(place), network.sentences[rows])
    plain = make(templates=["a photo of a {}."])  # without sentences, the template
    torch.testing.assert_close(plain.sentence_of_each(0.7), plain.zeroshot, rtol=1e-5, atol=1e-6)


def test_published_names_and_checkpoints(make):
    learner = make().learner
    own = {name: tuple(p.shape) for name, p in learner.named_parameters() if name.startswith("adapter")}
    weights = {"fc.0.weight": (6, 24), "fc.2.weight": (24, 6)}
    assert own == {f"adapter_{side}.{name}": shape for side in ("image", "text") for name, shape in weights.items()}
    state, learnt = naive_deep.published(learner, ("model_distill.visual.proj", "text_encoder.ln_final.weight"))
    learner.take(state)
    assert all(torch.equal(p, learnt[name].float()) for name, p in learner.named_parameters())


def test_other_classes(make, images):
    trained, other = make(), make(classnames=["meadow", "sea lake"])
    other.learner.take(trained.learner.state_dict())
    torch.testing.assert_close(
        other.eval().both(images)[1][:, 1], trained.eval().both(images)[1][:, 3], rtol=1e-4, atol=1e-3
    )
    with pytest.raises(ValueError, match="text_share 0.5 but got 0.2"):
        make(text_share=0.5).learner.take(trained.learner.state_dict())


@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_of_a_batch(small_run, views):
    trainer = build_trainer(small_run("coprompt")("CoPrompt", "DATALOADER.K_TRANSFORMS", views))
    set_random_seed(1)
    (first, second), labels = trainer.parse_batch_train(next(iter(trainer.train_loader_x)))
    assert first.shape == second.shape == (4, 3, 64, 64) and labels.shape == (4,)
    assert torch.equal(first, second) == (views == 1)


def test_the_sentence_follows_from_seed_and_step(small_run):
    trainer = build_trainer(small_run("coprompt")("CoPrompt", "SEED", 5))
    trainer.epoch, trainer.num_batches = 1, 7
    draws = []
    for trainer.batch_idx in (0, 1, 2, 0):
        torch.rand(3)
        draws.append(trainer._draw())
    assert draws[0] == draws[3] and len(set(draws)) == 3 and all(0 <= place < 1 for place in draws)
