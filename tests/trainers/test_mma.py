import open_clip
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from trainers.mma import MMAClassifier, MMAConfig
from trainers.modules.cross_modal_adapter import CrossModalAdapter

TEMPLATE = "a photo of a {}."


def naive_features(model, cma, images, prompts, kind):
    """Published MMA through open_clip's blocks: each block's output plus scale * up(relu(shared(relu(down(...)))))."""
    seen, handles = {}, []

    def adapt(side, i, x):
        if str(i) not in getattr(cma, side):
            return 0.0
        own = getattr(cma, side)[str(i)]
        shared = cma.shared[str(cma.share[i] if side == "visual" else i)]
        y = F.relu(x @ own.down.weight.t() + own.down.bias)
        y = F.relu(y @ shared.weight.t() + shared.bias)
        return own.scale * (y @ own.up.weight.t() + own.up.bias)

    def watch(side, blocks):
        for i, block in enumerate(blocks, start=1):
            handles.append(block.ln_1.register_forward_hook(lambda _m, _i, out, key=(side, i): seen.update({key: out})))
            handles.append(block.register_forward_hook(lambda _m, _i, out, key=(side, i): out + adapt(*key, seen[key])))

    watch("text", model.transformer.resblocks)
    if kind == "vit":
        watch("visual", model.visual.transformer.resblocks)
    else:
        stages = (model.visual.layer1, model.visual.layer2, model.visual.layer3, model.visual.layer4)
        for i, block in enumerate([b for stage in stages for b in stage], start=1):

            def add(_module, _inputs, out, i=i):
                y = adapt("visual", i, out.movedim(1, -1))
                return out if isinstance(y, float) else out + y.movedim(-1, 1)

            handles.append(block.register_forward_hook(add))
    features = model.encode_image(images), model.encode_text(open_clip.tokenize(prompts))
    for handle in handles:
        handle.remove()
    return [F.normalize(f, dim=-1) for f in features]


@pytest.fixture
def make(make_clip, names):
    def build(kind="vit", classnames=names, **arguments):
        clip = make_clip(kind)
        torch.manual_seed(3)
        blocks = {"adapter_start": 2, "adapter_end": 9, "adapter_dim": 16, "adapter_scale": 0.5}
        words = {"text_ctx_init": "a photo of a"}
        return MMAClassifier(clip, classnames, [TEMPLATE], MMAConfig(**{**words, **blocks, **arguments}))

    return build


@pytest.mark.parametrize("context", ["a photo of a", "a_photo of a", ""])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("grad_scaling", [True, False])
def test_logits_and_gradients_are_the_naive_ones(make, images, labels, names, kind, context, grad_scaling):
    classifier = make(kind, text_ctx_init=context, grad_scaling=grad_scaling)
    classifier.train()
    model, cma = random_open_clip(kind), classifier.learner.cma
    words = context.replace("_", " ")
    prompts = [f"{words} {name.replace('_', ' ')}.".strip() for name in names]
    image, text = naive_features(model, cma, images, prompts, kind)
    want = model.logit_scale.exp() * image @ text.t()
    got = classifier(images)
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    learnt = [p for p in cma.parameters() if p.requires_grad]
    want_grads = torch.autograd.grad(F.cross_entropy(want, labels), learnt, allow_unused=True)
    got_grads = torch.autograd.grad(F.cross_entropy(got, labels), learnt, allow_unused=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        if want_grad is not None and grad_scaling:
            want_grad = want_grad / 0.5  # the adapter's scale
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-4)
    classifier.eval()
    torch.testing.assert_close(classifier.both(images)[1], got, rtol=1e-5, atol=1e-4)


def test_five_published_steps_move_the_adapters_as_if_their_scale_were_one(make, images, labels):
    """SGD as published (momentum 0.9, decay 5e-4, rate 0.0015) on weights that get 1 / scale times their gradient.

    The oracle steps on plain gradients: with rate r / s and decay d * s, buf = 0.9 buf + g + d s w and w -= r / s buf.
    """
    scale, moved = 0.001, {}
    for grad_scaling, rate, decay in ((True, 0.0015, 5e-4), (False, 0.0015 / scale, 5e-4 * scale)):
        classifier = make(adapter_scale=scale, grad_scaling=grad_scaling)
        classifier.train()
        learnt = {name: p for name, p in classifier.learner.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in learnt.items()}
        buffers = {name: torch.zeros_like(p) for name, p in learnt.items()}
        for _ in range(5):
            grads = torch.autograd.grad(F.cross_entropy(classifier(images), labels), list(learnt.values()))
            with torch.no_grad():
                for (name, p), grad in zip(learnt.items(), grads, strict=True):
                    buffers[name] = 0.9 * buffers[name] + grad + decay * p
                    p -= rate * buffers[name]
        moved[grad_scaling] = torch.cat([(p.detach() - start[name]).flatten() for name, p in learnt.items()])
    assert moved[True].abs().max() > 0.01
    torch.testing.assert_close(moved[True], moved[False], rtol=1e-2, atol=1e-4)


def test_it_is_the_adapter_of_dlr_clip_with_a_fixed_scale(make):
    learner = make(adapter_scale=0.25).learner
    assert isinstance(learner.cma, CrossModalAdapter)
    fixed = {name for name, p in learner.named_parameters() if not p.requires_grad}
    assert fixed == {name for name, _ in learner.named_parameters() if name.endswith(".scale")}
    assert {float(p) for name, p in learner.named_parameters() if name in fixed} == {0.25}


def test_a_checkpoint_for_another_prompt(make):
    with pytest.raises(ValueError, match="the prompt context 'an image of' but got 'a photo of a'"):
        make(text_ctx_init="an image of").learner.take(make().learner.state_dict())


def test_a_checkpoint_with_other_blocks(make):
    with pytest.raises(ValueError, match="lacks"):
        make(adapter_start=1).learner.take(make().learner.state_dict())
