import math

import naive_deep
import open_clip
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from dassl.utils import set_random_seed
from trainers.base.deep_prompts import IndependentLearner
from trainers.clip import IMAGENET_TEMPLATES, Prompts
from trainers.promptsrc import PromptSRC, PromptSRCClassifier, PromptSRCConfig, epoch_weights

TEMPLATE = "a photo of a {}."


@pytest.fixture
def make(make_clip, names):
    def build(templates=(TEMPLATE,), count=4):
        clip = make_clip()
        torch.manual_seed(3)
        learner = IndependentLearner(clip, names, 4, 4, 3, 3, "a photo of a", "PromptSRC")
        return PromptSRCClassifier(clip, names, templates, learner, count)

    return build


class Bare(PromptSRC):
    """The losses alone, without a run."""

    settings = PromptSRCConfig(text_loss_weight=7.0, image_loss_weight=3.0)

    def __init__(self, network):
        self.network = network


def test_losses_are_the_naive_ones(make, images, names):
    network = make().train()
    outputs = network.outputs(images)
    got = Bare(network).more_losses(outputs)
    assert all(value.requires_grad for value in got.values())
    got = {name: value.detach() for name, value in got.items()}
    model = random_open_clip()
    with torch.no_grad():
        rows = []
        for name in names:
            texts = [one.replace("{}", name.replace("_", " ")) for one in IMAGENET_TEMPLATES[:4]]
            rows.append(model.encode_text(open_clip.tokenize(texts)).mean(dim=0))
        frozen_texts = F.normalize(torch.stack(rows), dim=-1)
        frozen = F.normalize(model.encode_image(images), dim=-1)
        wanted = (100 * frozen @ frozen_texts.t()).softmax(dim=1).double()
        said = outputs.logits.softmax(dim=1).double()
        kl = sum(
            float(p) * (math.log(p) - math.log(q))
            for p_row, q_row in zip(wanted.tolist(), said.tolist(), strict=True)
            for p, q in zip(p_row, q_row, strict=True)
        ) / (6 * 5)
        text = sum(
            abs(float(a) - float(b)) for a, b in zip(outputs.texts.flatten(), frozen_texts.flatten(), strict=True)
        )
        image = sum(abs(float(a) - float(b)) for a, b in zip(outputs.images.flatten(), frozen.flatten(), strict=True))
    assert float(got["text"]) == pytest.approx(7 * text / (5 * 24), rel=1e-4)
    assert float(got["image"]) == pytest.approx(3 * image / (6 * 24), rel=1e-4)
    assert float(got["logits"]) == pytest.approx(kl, rel=1e-3)


def test_sentences_take_the_place_of_templates(make, names):
    sentences = {name: [f"my {name}", f"no {name} here"] for name in names}
    model = random_open_clip()
    got = make(Prompts([TEMPLATE], sentences)).frozen_texts
    rows = [model.encode_text(open_clip.tokenize(sentences[name])).mean(dim=0) for name in names]
    torch.testing.assert_close(got, F.normalize(torch.stack(rows), dim=-1).detach(), rtol=1e-4, atol=1e-5)


def test_weights_of_epochs():
    heights = [math.exp(-0.5 * (e - 15) ** 2) for e in range(1, 21)]
    assert epoch_weights(20, 15, 1) == pytest.approx([height / sum(heights) for height in heights])
    assert epoch_weights(3, 900, 1) == pytest.approx([0, 0, 1])  # heights that a float cannot tell from 0
    assert epoch_weights(1, 6, 10) == [1.0]


@pytest.fixture
def run(small_run):
    def build(out, *pairs):
        set_random_seed(1)
        usual = ("OPTIM.MAX_EPOCH", 3, "TRAINER.PROMPTSRC.GPA_MEAN", 2.0, "TRAINER.PROMPTSRC.N_TEMPLATES", 2)
        return build_trainer(small_run("promptsrc", *usual)("PromptSRC", *pairs, out=out))

    return build


def test_what_is_learnt_is_the_mean_over_epochs_also_of_a_resumed_run(run, tmp_path):
    whole, stood = run("whole"), []
    step = whole.model_update

    def watched(*arguments):
        done = step(*arguments)
        if whole.batch_idx + 1 == whole.num_batches:
            stood.append([p.detach().clone() for p in whole.network.learner.parameters()])
        return done

    whole.model_update = watched
    whole.train()
    weights = epoch_weights(3, 2.0, 1.0)
    for place, p in enumerate(whole.network.learner.parameters()):
        want = sum(weight * values[place] for weight, values in zip(weights, stood, strict=True))
        torch.testing.assert_close(p.detach(), want)
        assert not torch.equal(p, stood[-1][place])
    half = run("half", "TRAIN.CHECKPOINT_FREQ", 1)
    half.train()
    (tmp_path / "half" / "VLPromptLearner" / "checkpoint").write_text("model.pth.tar-2\n")
    again = run("half")
    again.train()
    for mine, theirs in zip(again.network.learner.parameters(), whole.network.learner.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert again.start_epoch == 2


def test_published_checkpoints(make):
    learner = make().learner
    state, learnt = naive_deep.published(learner, ("prompt_learner.ZS_image_encoder.proj", "image_encoder.proj"))
    learner.take(state)
    assert all(torch.equal(p, learnt[name].float()) for name, p in learner.named_parameters())
    assert learner.prompt_learner.ctx.shape == (4, 32)
