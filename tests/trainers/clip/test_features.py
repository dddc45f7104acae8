import contextlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from trainers.features.encoder import FeatureSet, ImageEncoder
from trainers.features.loaders import FeatureLoader, KnownFeatures, OneStep, TrainingFeatures, collect_features
from trainers.features.views import Mirror, SeededViews


class Noisy:
    """Seven items, each with fresh noise whenever it is read."""

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return {"img": torch.full((4,), float(i)) + torch.rand(4), "label": i % 3, "impath": f"{i}.png"}


class Images(Noisy):
    def __getitem__(self, i):
        return {"img": torch.arange(4.0) + i, "label": i % 3, "impath": f"{i}.png"}


def encode(images):
    return F.normalize(images, dim=-1)


def views(batch_size=3, workers=0, seed=5):
    loader = DataLoader(SeededViews(Noisy(), 2, seed), batch_size=batch_size, num_workers=workers)
    return collect_features(loader, encode, 2)


def test_views_depend_on_seed_view_and_item_alone():
    first = views()
    assert first.values.shape == (2, 7, 4)
    assert first.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert first.paths == [f"{i}.png" for i in range(7)]
    torch.rand(3)
    for other in (views(batch_size=5), views(workers=2)):
        assert torch.equal(other.values, first.values)
    assert not torch.equal(first.values[0], first.values[1])
    assert not torch.equal(views(seed=6).values, first.values)


def test_views_leave_the_program_s_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(2)
    torch.manual_seed(0)
    views()
    loader_draws = torch.initial_seed()
    assert loader_draws == 0
    torch.manual_seed(0)
    SeededViews(Noisy(), 2, 5)[3]
    assert torch.equal(torch.rand(2), want)


def test_incomplete_views_are_refused():
    with pytest.raises(ValueError, match="Expected 2 views"):
        collect_features(DataLoader(Images(), batch_size=3), encode, 2)


def test_summaries():
    known = views()
    features, labels = known.flat()
    assert torch.equal(features[7:], known.values[1]) and torch.equal(labels[7:], known.labels)
    naive = torch.stack([(known.values[0, i] + known.values[1, i]) / 2 for i in range(7)])
    torch.testing.assert_close(known.mean(), naive)


def test_loader_encodes_once_and_only_complete_passes_count():
    calls = []
    loader = FeatureLoader(DataLoader(Images(), batch_size=3), lambda x: calls.append(len(x)) or encode(x))
    assert len(loader) == 3 and len(loader.dataset) == 7
    next(iter(loader))
    assert calls == [3]
    first = list(loader)
    assert calls == [3, 3, 3, 1] and "img" in first[0]
    again = list(loader)
    assert sum(calls) == 10
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["feature"], b["feature"]) and torch.equal(a["label"], b["label"])
        assert list(a["impath"]) == b["impath"]
    assert len(loader.all()) == 7


class Memory:
    """A slot that has what has been saved."""

    def __init__(self):
        self.known = None

    def load(self):
        return self.known

    def save(self, values):
        self.known = FeatureSet(values, torch.arange(7) % 3, [f"{i}.png" for i in range(7)])


def test_images_with_known_features():
    slot = Memory()
    loader = KnownFeatures(DataLoader(Images(), batch_size=3), slot, "test")
    for batch in loader:  # whoever stops half-way leaves nothing
        assert batch["place"][0] == "test"
        loader.keep(batch["place"][1], encode(batch["img"]))
        break
    for batch in loader:  # nor who computes none
        assert "feature" not in batch
    assert slot.known is None
    for batch in loader:
        assert batch["place"][0] == "test"
        loader.keep(batch["place"][1], encode(batch["img"]))
    assert slot.known is not None
    for again in (loader, KnownFeatures(loader.loader, slot, "test")):
        for batch, plain in zip(again, loader.loader, strict=True):
            assert torch.equal(batch["img"], plain["img"]) and "place" not in batch
            assert torch.equal(batch["feature"], encode(plain["img"]))


def test_loader_regrouped():
    loader = FeatureLoader(DataLoader(Images(), batch_size=3), encode)
    loader.regroup([[0, 6, 2, 2], [1]])
    first, second = loader
    assert len(loader) == 2
    assert torch.equal(first["feature"], encode(torch.stack([Images()[i]["img"] for i in (0, 6, 2, 2)])))
    assert second["impath"] == ["1.png"]


def make_training(**arguments):
    known = FeatureSet(torch.arange(14.0).view(2, 7, 1), torch.arange(7), ())
    return TrainingFeatures(lambda: known, 7, 3, seed=1, **arguments)


def test_training_batches_take_each_image_once_in_an_order_of_seed_and_epoch():
    training = make_training()
    assert len(training) == 3

    def epoch(number):
        training.set_epoch(number)
        return torch.cat([batch["feature"] for batch in training]).flatten().tolist()

    assert sorted(epoch(0)) == list(range(7))
    assert sorted(epoch(1)) == list(range(7, 14))  # the other view
    assert sorted(epoch(2)) == list(range(7))
    assert epoch(0) == epoch(0) != epoch(2)


def test_steps_run_over_as_many_passes_as_needed():
    batches = list(make_training(steps=5))
    assert [len(batch["label"]) for batch in batches] == [3, 3, 1, 3, 3]
    assert len(make_training(steps=5)) == 5
    assert len(list(make_training(steps=2))) == 2


def test_every_view_in_one_pass():
    training = make_training(every_view=2)
    batches = list(training)
    assert len(batches) == len(training) == 5
    features = torch.cat([batch["feature"] for batch in batches]).flatten()
    assert sorted(features.tolist()) == list(range(14))
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), features.long() % 7)


def test_one_step():
    features = make_training()
    (batch,) = OneStep(features.dataset, lambda: features.all().labels)
    assert batch["label"].tolist() == list(range(7))


@pytest.mark.parametrize(("steps", "sizes"), [(0, [3, 3]), (5, [3, 3, 3, 3, 3])])
def test_the_last_batch_of_a_pass_may_be_left_out(steps, sizes):
    training = make_training(steps=steps, drop_last=True)
    batches = list(training)
    assert [len(batch["label"]) for batch in batches] == sizes and len(training) == len(sizes)
    rows = torch.cat([batch["index"] for batch in batches[:2]]).tolist()
    assert len(set(rows)) == 6
    known = FeatureSet(torch.zeros(1, 2, 1), torch.arange(2), ())
    assert [len(b["label"]) for b in TrainingFeatures(lambda: known, 2, 3, seed=1, drop_last=True)] == [2]


def test_mirror():
    image = torch.arange(24.0).view(2, 3, 4)
    want = torch.stack([torch.stack([torch.tensor(row.tolist()[::-1]) for row in channel]) for channel in image])
    assert torch.equal(Mirror()(image), want)
    assert "0x" not in repr(Mirror())


@pytest.mark.parametrize("raw", [False, True])
def test_encoder(make_clip, raw):
    clip = make_clip()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = ImageEncoder(clip, "fp32", contextlib.nullcontext)
    got = (encoder.raw() if raw else encoder)(images)
    want = clip.encode_image(images)
    torch.testing.assert_close(got, want if raw else want / want.pow(2).sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_encoder_before_the_projection(make_clip, kind):
    clip = make_clip(kind)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = ImageEncoder(clip, "fp32", contextlib.nullcontext)
    before = encoder.before_projection()
    got = before(images)
    torch.testing.assert_close(got, clip.pool_image(images))
    assert got.shape == (3, before.width) == (3, clip.visual.pooled_dim)
    assert (encoder.projected, encoder.unit, encoder.width) == (True, True, 24)  # it is a copy
    assert not before.raw().projected
    encoder.parts = 2
    with pytest.raises(ValueError, match="Expected an encoder of one kind of features but got one of 2"):
        encoder.before_projection()


@pytest.mark.skipif(torch.cuda.is_available(), reason="devices are seeded at once here")
def test_reading_views_notes_nothing_for_devices_that_nobody_uses():
    """torch.manual_seed would keep a traceback of each call, for the day that a GPU is used."""
    views, before = SeededViews([torch.zeros(1)] * 3, views=2, seed=1), len(torch.cuda._queued_calls)
    assert len([views[number] for number in range(len(views))]) == 6
    assert len(torch.cuda._queued_calls) == before
