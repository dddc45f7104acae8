import logging

import pytest
import torch
from torch.nn import functional as F

from trainers.base.learner import unpack_record
from trainers.clip import zeroshot_weights
from trainers.dlrclip.config import DLRCLIPConfig, LossWeights
from trainers.dlrclip.network import DLRCLIPNetwork

HEADS = ("clip", "cma", "glr", "final", "fused")
SMALL = {"start": 2, "end": 3, "dim": 16, "scale": 0.5, "glr_dim": 16, "fusion_dim": 8}
TEMPLATE = "a centered satellite photo of {}."


@pytest.fixture
def make(make_clip, names):
    """make(kind=..., ...) -> a small network on a random CLIP."""

    def build(kind="vit", classnames=names, clip=None, **arguments):
        clip = clip or make_clip(kind)
        torch.manual_seed(0)
        return DLRCLIPNetwork(clip, classnames, [TEMPLATE], DLRCLIPConfig(**{**SMALL, **arguments}))

    return build


def fit(network, images, labels, steps=4, lr=0.02):
    """A few steps of training -> the last losses."""
    network.train()
    optim = torch.optim.AdamW(network.learner.parameters(), lr=lr, eps=1e-4)
    for _ in range(steps):
        losses = network.losses(network(images), labels)
        optim.zero_grad()
        sum(losses.values()).backward()
        optim.step()
    network.eval()
    return losses


both_kinds = pytest.mark.parametrize("kind", ["vit", "resnet"])


class TestInitially:
    @both_kinds
    def test_refined_logits_are_the_zero_shot_logits_exactly(self, make, images, kind):
        outputs = make(kind)(images)
        assert torch.equal(outputs["glr"], outputs["clip"])
        assert not torch.equal(outputs["cma"], outputs["clip"])

    @both_kinds
    def test_zero_shot_branch_is_plain_clip(self, make, make_clip, images, names, kind):
        clip = make_clip(kind)
        weights = zeroshot_weights(clip, names, [TEMPLATE])
        want = clip.logit_scale * F.normalize(clip.encode_image(images), dim=-1) @ weights.T
        torch.testing.assert_close(make(kind, clip=clip)(images)["clip"], want, rtol=1e-5, atol=1e-4)

    @both_kinds
    def test_adapter_with_scale_zero_is_clip_with_the_same_prompt(self, make, make_clip, images, names, kind):
        clip = make_clip(kind)
        network = make(kind, clip=clip, scale=0.0)
        prompts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
        text = F.normalize(clip.encode_text(prompts), dim=-1)
        want = clip.logit_scale * F.normalize(clip.encode_image(images), dim=-1) @ text.T
        for mode in (True, False):
            got = network.train(mode)(images)["cma"]
            assert (got - want).abs().max() / want.abs().max() < 1e-6

    def test_context_is_configurable(self, make, make_clip, images, names):
        clip = make_clip()
        network = make(clip=clip, scale=0.0, text_ctx_init=TEMPLATE.split(" {}")[0])
        outputs = network(images)
        torch.testing.assert_close(outputs["cma"], outputs["clip"], rtol=1e-5, atol=1e-4)


class TestAgainstNaive:
    """The whole network against open_clip's plain blocks with the adapter's formula in forward hooks."""

    @staticmethod
    def adapted_features(clip_model, cma, images, prompts, kind):
        import open_clip

        seen, handles = {}, []

        def watch(block, side, number, adapt):
            handles.append(block.ln_1.register_forward_hook(lambda _m, _i, out: seen.update({(side, number): out})))

            def add(_module, _inputs, out):
                y = adapt(number, seen[side, number])
                return out if y is None else out + y

            handles.append(block.register_forward_hook(add))

        for i, block in enumerate(clip_model.transformer.resblocks, start=1):
            watch(block, "text", i, cma.text_edit.parallel)
        if kind == "vit":
            for i, block in enumerate(clip_model.visual.transformer.resblocks, start=1):
                watch(block, "visual", i, cma.visual_edit.parallel)
        else:
            visual = clip_model.visual
            blocks = [b for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4) for b in stage]
            for i, block in enumerate(blocks, start=1):

                def add(_module, _inputs, out, i=i):
                    y = cma.visual_edit.parallel(i, out)
                    return out if y is None else out + y

                handles.append(block.register_forward_hook(add))
        with torch.no_grad():
            features = clip_model.encode_image(images), clip_model.encode_text(open_clip.tokenize(prompts))
        for handle in handles:
            handle.remove()
        return [F.normalize(f, dim=-1) for f in features]

    @both_kinds
    def test_adapted_branch(self, make, images, labels, names, kind):
        from trainers.clip import CLIP

        from .conftest import random_open_clip

        network = make(kind, clip=CLIP(random_open_clip(kind), name="random"), end=9)
        fit(network, images, labels)
        prompts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
        image, text = self.adapted_features(random_open_clip(kind), network.learner.cma, images, prompts, kind)
        want = network.clip.logit_scale * image @ text.T
        for mode in (True, False):
            torch.testing.assert_close(network.train(mode)(images)["cma"], want, rtol=1e-4, atol=1e-3)


class TestSwitches:
    def present(self, network):
        return {name.split(".")[0] for name, _ in network.learner.named_parameters()}

    @pytest.mark.parametrize(
        ("switches", "parts", "losses"),
        [
            ({"skd": False}, {"cma", "glr", "fusion"}, {"ce_cma", "ce_glr", "ce_final", "l1_cma", "l1_glr"}),
            ({"skd": True}, {"cma", "glr", "fusion"}, {"ce_glr", "ce_final", "l1_glr", "kd"}),
            ({"skd": False, "cma": False}, {"glr", "fusion"}, {"ce_glr", "ce_final", "l1_glr"}),
            ({"skd": False, "glr": False}, {"cma", "fusion"}, {"ce_cma", "ce_final", "l1_cma"}),
            ({"skd": True, "glr": False}, {"cma", "fusion"}, {"ce_final", "kd"}),
            ({"skd": True, "fixed_weight": 0.3}, {"cma", "glr"}, {"ce_glr", "ce_final", "l1_glr", "kd"}),
            ({"skd": True, "lambda_": 0.0}, {"cma", "glr", "fusion"}, {"ce_glr", "ce_final", "l1_glr"}),
        ],
    )
    def test_parameters_and_losses(self, make, images, labels, switches, parts, losses):
        network = make(**switches)
        assert self.present(network) == parts
        outputs = network(images)
        got = network.losses(outputs, labels)
        assert set(got) == losses
        assert all(value.ndim == 0 and torch.isfinite(value) for value in got.values())

    def test_off_branches_pass_the_zero_shot_logits_on(self, make, images):
        without_cma = make(cma=False)(images)
        assert torch.equal(without_cma["cma"], without_cma["clip"])
        without_glr = make(glr=False)(images)
        assert torch.equal(without_glr["glr"], without_glr["clip"])
        assert "alpha" not in without_glr
        assert not torch.equal(without_glr["final"], without_glr["clip"])

    def test_both_off(self, make):
        with pytest.raises(ValueError, match="both off"):
            make(cma=False, glr=False)

    def test_loss_values(self, make, images, labels):
        weights = {"ce_cma": 0.5, "ce_glr": 2.0, "ce_final": 1.0, "l1_cma": 3.0, "l1_glr": 0.0}
        network = make(skd=False, loss=LossWeights(**weights))
        fit(network, images, labels)
        outputs = network(images)
        got = network.losses(outputs, labels)
        assert set(got) == {"ce_cma", "ce_glr", "ce_final", "l1_cma"}
        for branch, weight in (("cma", 0.5), ("glr", 2.0), ("final", 1.0)):
            p = outputs[branch].softmax(dim=1)[range(6), labels]
            assert got[f"ce_{branch}"].item() == pytest.approx(-weight * p.log().mean().item(), rel=1e-4)
        assert got["l1_cma"].item() == pytest.approx(
            3 * (outputs["cma"] - outputs["clip"]).abs().mean().item(), rel=1e-5
        )

    def test_no_loss_left(self, make):
        with pytest.raises(ValueError, match="at least one loss"):
            make(glr=False, skd=True, lambda_=0.0, loss=LossWeights(**{"ce_final": 0.0}))

    def test_fixed_values(self, make, images):
        outputs = make(fixed_alpha=0.25, fixed_weight=0.75)(images)
        assert torch.equal(outputs["alpha"], torch.full((6, 1), 0.25))
        torch.testing.assert_close(outputs["final"], 0.75 * outputs["cma"] + 0.25 * outputs["glr"])
        zero = make(fixed_weight=0.0)(images)
        assert torch.equal(zero["final"], zero["glr"])


class TestGradients:
    @both_kinds
    @pytest.mark.parametrize("skd", [False, True])
    def test_reach_what_is_learnt_and_nothing_else(self, make, images, labels, kind, skd):
        network = make(kind, skd=skd)
        frozen = {name: p.clone() for name, p in network.clip.named_parameters()}
        fit(network, images, labels, steps=3)
        learnt = {name: p.grad for name, p in network.learner.named_parameters()}
        assert all(grad is not None and torch.isfinite(grad).all() for grad in learnt.values())
        dead = [name for name, grad in learnt.items() if not grad.abs().sum() > 0]
        assert dead == []
        assert all(not p.requires_grad and p.grad is None for p in network.clip.parameters())
        assert all(torch.equal(p, frozen[name]) for name, p in network.clip.named_parameters())
        claimed = {id(p) for p in network.learner.parameters()}
        assert {id(p) for p in network.parameters() if p.requires_grad} == claimed

    @pytest.mark.parametrize("off", ["cma", "glr"])
    def test_with_a_part_off(self, make, images, labels, off):
        network = make(**{off: False})
        fit(network, images, labels, steps=3)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.learner.parameters())

    def test_clip_is_not_in_the_learner(self, make):
        network = make()
        ours = sum(p.numel() for p in network.learner.parameters())
        assert ours < 20_000
        assert not any("visual." in name and "down" not in name and "up" not in name and "scale" not in name
                       for name in network.learner.state_dict())  # fmt: skip

    def test_frozen_clip_stays_in_evaluation_mode(self, make):
        network = make("resnet").train()
        assert network.learner.training
        assert not any(module.training for module in network.clip.modules())

    def test_training_lowers_the_loss(self, make, images, labels):
        network = make(skd=False, scale=1.0)
        first = network.losses(network.train()(images), labels)
        last = fit(network, images, labels, steps=40, lr=0.003)
        assert sum(last.values()) < sum(first.values())
        assert last["ce_final"] < 0.8 * first["ce_final"]


class TestBlocks:
    def test_end_is_clipped_to_each_depth(self, make, make_clip):
        network = make(clip=make_clip(vision_layers=5, text_layers=3), start=2, end=12)
        cma = network.learner.cma
        assert set(cma.visual) == {"2", "3", "4", "5"}
        assert set(cma.text) == {"2", "3"}
        assert set(cma.shared) == {"2", "3", "4", "5"}

    def test_resnet_adapts_the_last_two_stages(self, make):
        network = make("resnet", start=2, end=4)  # residual blocks 1 | 2 | 3 | 4 5, text blocks 2 3 4
        assert network.learner.cma.share == {3: 2, 4: 3, 5: 4}
        assert network._visual_start == 3

    def test_start_beyond_the_last_block(self, make):
        with pytest.raises(ValueError, match=r"\(START\) to be at most 4, the depth of random-vit, but got 5"):
            make(start=5, end=12)

    @pytest.mark.parametrize("start", [1, 4])
    def test_first_and_last_block(self, make, images, labels, start):
        network = make(start=start, end=4)
        fit(network, images, labels, steps=3)
        assert all(p.grad.abs().sum() > 0 for p in network.learner.parameters())


class TestEvaluation:
    def test_heads(self, make, images):
        network = make().eval()
        heads = network.heads(images)
        assert tuple(heads) == HEADS
        assert all(logits.shape == (6, 5) for logits in heads.values())

    def test_fused_uses_beta_or_the_mean_weight(self, make, images, labels):
        network = make()
        fit(network, images, labels)
        for value in (float(network.learner.weight_mean), 0.0, 0.32, 1.0):
            heads = network.heads(images)
            if not network.learner.beta.isnan():
                value = float(network.learner.beta)
            torch.testing.assert_close(heads["fused"], value * heads["cma"] + (1 - value) * heads["glr"])
            network.learner.beta.fill_(0.32)

    def test_mean_weight_follows_training(self, make, images, labels):
        network = make().train()
        seen = []
        for step in range(25):
            before = network.learner.weight_mean.clone()
            weight = network(images)["weight"]
            assert torch.equal(network.learner.weight_mean, before)  # a step's w counts once the step was made
            network.learner.observe(weight)
            seen.append(weight.mean().item())
            with torch.no_grad():
                network.learner.fusion.layers[2].bias += 0.3
            mean = seen[0]
            for k, w in enumerate(seen, start=1):
                mean += max(1 / k, 0.1) * (w - mean)
            assert network.learner.weight_mean.item() == pytest.approx(mean, abs=1e-5)
            if step < 10:
                assert mean == pytest.approx(sum(seen) / len(seen))

    def test_text_features_are_computed_once_per_state(self, make, images, labels, monkeypatch):
        network = make().eval()
        calls = []
        suffix = network.clip.text.suffix

        def count(state, start, edits=(), *options):
            if edits:  # the zero-shot weights run without any
                calls.append(start)
            return suffix(state, start, edits, *options)

        monkeypatch.setattr(network.clip.text, "suffix", count)
        first = network(images)["cma"]
        assert torch.equal(network(images)["cma"], first)
        assert len(calls) == 1
        fit(network, images, labels, steps=1)
        calls.clear()
        trained = network(images)["cma"]
        assert len(calls) == 1
        assert not torch.allclose(trained, first)
        with torch.no_grad():
            network.learner.cma.text["2"].scale.add_(0.5)
        assert not torch.allclose(network(images)["cma"], trained)
        assert len(calls) == 2
        network.load_state_dict(network.state_dict())
        network(images)
        assert len(calls) == 3
        network.bind(network.classnames[:2], None)
        assert network(images)["cma"].shape == (6, 2)
        assert len(calls) == 4

    def test_training_and_evaluation_agree(self, make, images, labels):
        network = make()
        fit(network, images, labels)
        evaluated, trained = network.eval()(images), network.train()(images)
        for head in ("clip", "cma", "glr", "final"):
            torch.testing.assert_close(trained[head].detach(), evaluated[head])


class TestGivenParts:
    """What of an image does not depend on what is learnt may be given instead of computed."""

    @both_kinds
    @pytest.mark.parametrize("start", [1, 2, 4])
    def test_evaluation_with_known_features(self, make, make_clip, images, kind, start):
        clip = make_clip(kind)
        network = make(kind, clip=clip, start=start, end=4).eval()
        features = F.normalize(clip.encode_image(images), dim=-1)
        want, got = network.heads(images), network.heads(images, features)
        for head in HEADS:
            torch.testing.assert_close(got[head], want[head], rtol=1e-5, atol=1e-4)
        # They are used, not computed again: other features give other zero-shot logits, the same adapted ones.
        other = network.heads(images, features.flip(0))
        torch.testing.assert_close(other["clip"], want["clip"].flip(0), rtol=1e-5, atol=1e-4)
        assert torch.equal(other["cma"], got["cma"])

    @both_kinds
    @pytest.mark.parametrize("options", [{}, {"cma": False}])
    def test_training_with_the_frozen_part(self, make, images, labels, kind, options):
        network = make(kind, **options).train()
        part = network.frozen_part(images)
        assert (part.hidden is None) == ("cma" in options)
        want, got = network(images), network(features=part.features, hidden=part.hidden)
        for name in ("clip", "cma", "glr", "final"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-4)
        sum(network.losses(got, labels).values()).backward()
        assert all(p.grad is not None for p in network.learner.parameters())

    def test_without_cma_no_block_runs_where_features_are_known(self, make, images, monkeypatch):
        network = make(cma=False).eval()
        features = network.frozen_part(images).features
        want = network.heads(images)
        monkeypatch.setattr(type(network.clip.visual), "prefix", None)
        got = network.heads(images, features)
        assert all(torch.equal(got[head], want[head]) for head in HEADS)

    def test_nothing_given(self, make):
        with pytest.raises(ValueError, match="Expected images"):
            make()()


class TestOtherClasses:
    def test_unseen_list(self, make, make_clip, images, labels, names, caplog):
        clip = make_clip()
        network = make(clip=clip)
        fit(network, images, labels)
        network.learner.beta.fill_(0.25)
        new = ["airport", "bridge", "desert"]
        with caplog.at_level(logging.INFO):
            network.bind(new)
            outputs = network(images)
            network(images)
        assert sum("is not the one trained on" in r.message for r in caplog.records) == 1
        assert torch.equal(outputs["glr"], outputs["clip"])
        torch.testing.assert_close(outputs["weight"], network.learner.weight_mean.expand(6, 1))
        w = network.learner.weight_mean
        torch.testing.assert_close(outputs["final"], w * outputs["cma"] + (1 - w) * outputs["clip"])
        torch.testing.assert_close(outputs["fused"], 0.25 * outputs["cma"] + 0.75 * outputs["clip"])
        weights = zeroshot_weights(clip, new, [TEMPLATE])
        want = clip.logit_scale * F.normalize(clip.encode_image(images), dim=-1) @ weights.T
        torch.testing.assert_close(outputs["clip"], want, rtol=1e-5, atol=1e-4)
        assert "alpha" not in outputs
        network.bind(names)
        assert "alpha" in network(images)

    def test_unseen_list_of_the_same_length_or_order(self, make, names):
        network = make()
        network.bind(list(reversed(names)))
        assert not network.seen
        network.bind(names[:-1] + ["airport"], class_indices=[0, 1, 2, 3, 4])
        assert not network.seen

    def test_unseen_list_with_a_fixed_weight(self, make, images):
        network = make(fixed_weight=0.9).eval()
        network.bind(["airport", "bridge"])
        torch.testing.assert_close(network(images)["weight"], torch.full((6, 1), 0.9))

    def test_subset_by_index_takes_columns(self, make, images, labels, names):
        network = make()
        fit(network, images, labels)
        full = network.heads(images)
        network.bind([names[i] for i in (3, 0, 4)], class_indices=[3, 0, 4])
        assert network.seen
        part = network.heads(images)
        for head in HEADS:
            torch.testing.assert_close(part[head], full[head][:, [3, 0, 4]])
        assert not torch.equal(part["glr"], part["clip"])

    @pytest.mark.parametrize("indices", [[0, 1], [0, 7], [0], [-1, 0]])
    def test_wrong_indices_are_no_subset(self, make, names, indices):
        network = make()
        network.bind([names[4], names[0]], class_indices=indices)
        assert not network.seen

    def test_training_on_another_list(self, make, images):
        network = make().train()
        network.bind(["airport", "bridge"])
        with pytest.raises(ValueError, match="class list"):
            network(images)

    def test_no_class(self, make):
        with pytest.raises(ValueError, match="at least one class"):
            make().bind([])


class TestState:
    @both_kinds
    def test_save_and_load_give_equal_logits(self, make, images, labels, kind, tmp_path):
        network = make(kind)
        fit(network, images, labels)
        network.learner.beta.fill_(0.4)
        want = network.heads(images)
        torch.save(network.learner.state_dict(), tmp_path / "state.pt")
        other = make(kind).eval()
        other.learner.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        got = other.heads(images)
        assert all(torch.equal(got[head], want[head]) for head in HEADS)

    def test_state_says_what_it_was_trained_on(self, make, names):
        network = make()
        record = unpack_record(network.learner.state_dict()["_extra_state"])
        assert record["classnames"] == names
        assert record["facts"]["backbone"] == "random-vit"
        assert record["facts"]["context"] == "a photo of a"
        assert len(record["facts"]["weights_digest"]) == 64

    def test_non_latin_class_names(self, make):
        network = make(classnames=["früh", "猫", "a 'b' \"c\""])
        other = make(classnames=["x", "y", "z"])
        other.learner.load_state_dict(network.learner.state_dict())
        assert other.learner.classnames == ["früh", "猫", "a 'b' \"c\""]

    def test_loading_takes_the_size_of_the_checkpoint_s_class_list(self, make, images, labels, names):
        network = make()
        fit(network, images, labels)
        other = make(classnames=["airport", "bridge"])
        other.learner.load_state_dict(network.learner.state_dict())
        assert other.learner.classnames == names
        assert other.learner.glr.head.out_features == 5
        other.bind(names)
        got, want = other.eval().heads(images), network.heads(images)
        assert all(torch.equal(got[head], want[head]) for head in HEADS)

    def test_another_architecture_is_refused(self, make):
        with pytest.raises(RuntimeError, match="size mismatch"):
            make(dim=8).learner.load_state_dict(make(dim=16).learner.state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            make(start=1).learner.load_state_dict(make(start=2).learner.state_dict())


@pytest.mark.parametrize("precision", ["bf16", "amp"])
def test_reduced_precision(make, make_clip, names, images, labels, precision):
    from trainers.clip import CLIP

    from .conftest import random_open_clip

    network = make(clip=CLIP(random_open_clip(), name="random", precision=precision))
    reference = make(clip=make_clip())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "amp"):
        outputs = network.train()(images)
        losses = network.losses(outputs, labels)
    assert all(p.dtype == torch.float32 for p in network.learner.parameters())
    assert all(outputs[head].dtype == torch.float32 for head in ("clip", "cma", "glr", "final"))
    want = reference.train()(images)
    for head in ("clip", "cma"):
        assert (outputs[head] - want[head]).abs().max() < 3  # of 100, the logit scale
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.learner.parameters())
