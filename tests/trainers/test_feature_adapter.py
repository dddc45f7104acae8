import json
from pathlib import Path

import pytest
import torch

from trainers.base.learner import pack_record, unpack_record
from trainers.clip_adapter import AdapterLearner, blend
from trainers.jclip_adapter import draw_curves, mapped_prompt, parse_prompt_map, result_lines


def naive_logits(f, w, learner, a, b, scale, final_relu):
    """The method's formulas, image by image and class by class."""

    def adapted(x, side, ratio):
        if ratio == 0:
            return x
        hidden = [max(0.0, float(row @ x)) for row in learner.down[side]]
        y = sum(h * column for h, column in zip(hidden, learner.up[side].t(), strict=True))
        if final_relu:
            y = torch.tensor([max(0.0, float(number)) for number in y])
        z = ratio * y + (1 - ratio) * x
        return z / z.norm()

    images, texts = [adapted(x, "image", a) for x in f], [adapted(x, "text", b) for x in w]
    return torch.tensor([[float(scale * (x @ y)) for y in texts] for x in images])


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.0), (0.6, 0.3), (0.0, 0.5)])
@pytest.mark.parametrize("final_relu", [False, True])
@torch.no_grad()
def test_logits(make_clip, names, a, b, final_relu):
    torch.manual_seed(0)
    f, w = (torch.nn.functional.normalize(torch.randn(n, 24), dim=1) for n in (6, 5))
    clip = make_clip()
    learner = AdapterLearner(clip, names, w, image_ratio=a, text_ratio=b, reduction=4, final_relu=final_relu)
    want = naive_logits(f, w, learner, a, b, clip.logit_scale, final_relu)
    torch.testing.assert_close(learner(f), want, rtol=1e-5, atol=2e-3)
    sides = {"image"} if b == 0 else {"text"} if a == 0 else {"image", "text"}
    assert {name for name, _ in learner.named_parameters()} == {f"{p}.{s}" for p in ("down", "up") for s in sides}
    assert all(p.shape in ((6, 24), (24, 6)) for p in learner.parameters())


def test_a_checkpoint_keeps_the_form_that_it_was_trained_in(make_clip, names, caplog):
    caplog.set_level("INFO")
    w, f = (torch.nn.functional.normalize(torch.randn(n, 24), dim=1) for n in (5, 6))
    sizes = {"image_ratio": 0.2, "text_ratio": 0.0, "reduction": 4}
    make = lambda form: AdapterLearner(make_clip(), names, w, **sizes, final_relu=form)  # noqa: E731
    for form in (False, True):
        trained, other = make(form), make(not form)
        other.take(trained.state_dict())
        assert torch.equal(other(f), trained(f)) and f"FINAL_RELU {form}, which counts" in caplog.text
        resumed = make(not form)
        resumed.load_state_dict(trained.state_dict())
        assert torch.equal(resumed(f), trained(f))
        assert unpack_record(other.get_extra_state())["facts"]["final_relu"] is form
    record = unpack_record(trained.get_extra_state())
    del record["facts"]["final_relu"]  # as checkpoints were before there was a choice: without the second ReLU
    now, plain = make(True), make(False)
    now.take({**make(False).state_dict(), "_extra_state": pack_record(record)})
    plain.take(now.state_dict())
    assert torch.equal(now(f), plain(f))


def test_blend_with_ratio_zero_changes_nothing():
    f = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    torch.testing.assert_close(blend(f, torch.randn(2, 8), torch.randn(8, 2), 0.0), f)


def test_prompt_map():
    entries = ("Animal=a photo of a {}, a kind of an animal.", "Animal_Sea=a photo of a {}, a sea animal.")
    prompt_map = parse_prompt_map(entries)
    default = "a photo of a {}."
    assert mapped_prompt("Animal_Polar_Bear", prompt_map, default) == "a photo of a Polar Bear, a kind of an animal."
    assert mapped_prompt("Animal_Sea_Otter", prompt_map, default) == "a photo of a Otter, a sea animal."
    assert mapped_prompt("Animal", prompt_map, default) == "a photo of a Animal, a kind of an animal."
    assert mapped_prompt("hot_dog", prompt_map, default) == "a photo of a hot dog."


@pytest.mark.parametrize("entries", [("Animal",), ("=a {}.",), ("a=x {}.", "a=y {}."), ("a=no place",)])
def test_wrong_prompt_map(entries):
    with pytest.raises(ValueError, match="Expected"):
        parse_prompt_map(entries)


def test_result_lines():
    logits = torch.tensor([[0.1, 0.9, 0.9, 0.3, 0.2, 0.0], [6.0, 5, 4, 3, 2, 1]])
    assert result_lines(["a/b/x.png", "y.png"], logits) == ["x.png 1 2 3 4 0", "y.png 0 1 2 3 4"]
    assert result_lines(["y.png"], logits[:1, :2]) == ["y.png 1 0"]


def test_curves_are_drawn(tmp_path):
    point = {"loss": 1.0, "accuracy": 50.0}
    draw_curves([{"epoch": 1, "train": point}, {"epoch": 2, "train": point, "val": point}], str(tmp_path / "c.png"))
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_files_of_a_run(tmp_path, random_tiny):
    import datasets
    import trainers
    from dassl.config import get_cfg_default
    from dassl.engine import build_trainer

    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
    cfg.merge_from_file(Path(trainers.__file__).parents[1] / "configs" / "trainers" / "jclip" / "tiny.yaml")
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1, "SEED", 1])
    cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, "OPTIM.MAX_EPOCH", 2])
    cfg.merge_from_list(["TRAINER.JCLIPADAPTER.VIEWS", 0])
    trainer = build_trainer(cfg)
    trainer.train()
    lines = (tmp_path / "result.txt").read_text().splitlines()
    assert len(lines) == len(trainer.dm.dataset.test)
    names = [item.impath.rsplit("/", 1)[1] for item in trainer.dm.dataset.test]
    assert [line.split()[0] for line in lines] == names and all(len(line.split()) == 6 for line in lines)
    correct = [int(line.split()[1]) == item.label for line, item in zip(lines, trainer.dm.dataset.test, strict=True)]
    assert 100 * sum(correct) / len(correct) == pytest.approx(
        json.loads((tmp_path / "metrics.json").read_text())["accuracy"]
    )
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [point["epoch"] for point in curves] == [1, 2] and set(curves[0]) == {"epoch", "train", "val"}
    assert (tmp_path / "curves.png").is_file()
