"""Transforms: which, in which order, and the ones of our own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from dassl.config import get_cfg_default
from dassl.data.transforms import AVAI_CHOICES, INTERPOLATION_MODES, build_transform
from dassl.data.transforms.randaugment import OPERATIONS
from dassl.data.transforms.transforms import Cutout, GaussianNoise, InstanceNormalization, Random2DTranslation
from dassl.utils import InputError

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def config(*names, size=(32, 32), interpolation="bicubic"):
    cfg = get_cfg_default()
    cfg.INPUT.TRANSFORMS = names
    cfg.INPUT.SIZE = size
    cfg.INPUT.INTERPOLATION = interpolation
    cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD = CLIP_MEAN, CLIP_STD
    return cfg


def picture(width=60, height=40):
    torch.manual_seed(0)
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy())


def kinds(cfg, is_train=True, choices=None):
    return [type(step).__name__ for step in build_transform(cfg, is_train, choices).transforms]


@pytest.mark.parametrize("name", AVAI_CHOICES)
def test_every_name_gives_a_tensor_of_the_size(name):
    random.seed(0)
    state = random.getstate()
    for is_train in (True, False):
        transform = build_transform(config(name, size=(32, 24)), is_train)
        for _ in range(4):
            output = transform(picture())
            assert type(output) is torch.Tensor
            assert output.shape == (3, 32, 24) and output.dtype == torch.float32
            assert torch.isfinite(output).all()
    assert random.getstate() == state  # torch's generator only, which workers seed


def test_test_images_are_squashed_or_their_middle_is_cut_out():
    cfg = config("normalize", size=(32, 24))
    assert kinds(cfg, is_train=False)[:2] == ["Resize", "CenterCrop"]
    cfg.INPUT.SQUASH = True
    assert "CenterCrop" not in kinds(cfg, is_train=False)
    whole = build_transform(cfg, is_train=False)(picture())
    cfg.INPUT.TRANSFORMS = ()
    want = np.asarray(picture().resize((24, 32), Image.Resampling.BICUBIC)) / 255
    assert whole.shape == (3, 32, 24)
    assert (
        float((build_transform(cfg, is_train=False)(picture()).permute(1, 2, 0) - torch.tensor(want)).abs().max())
        < 1e-6
    )


def test_order_is_fixed_whatever_the_config_says():
    everything = kinds(config(*AVAI_CHOICES))
    assert everything == kinds(config(*reversed(AVAI_CHOICES)))
    assert everything == [
        "Random2DTranslation",
        "RandomCrop",
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "AutoAugment",
        "AutoAugment",
        "AutoAugment",
        "RandAugment",
        "RandAugmentFixMatch",
        "RandAugment2",
        "ColorJitter",
        "RandomGrayscale",
        "RandomApply",
        "PILToTensor",
        "ToDtype",
        "Cutout",
        "Normalize",
        "GaussianNoise",
        "InstanceNormalization",
    ]
    assert kinds(config())[0] == "Resize"  # only without a crop
    assert kinds(config(*AVAI_CHOICES), is_train=False) == [
        "Resize",
        "CenterCrop",
        "PILToTensor",
        "ToDtype",
        "Normalize",
        "InstanceNormalization",
    ]


def test_choices_replace_the_configs():
    assert kinds(config("random_flip"), choices=["normalize"]) == ["Resize", "PILToTensor", "ToDtype", "Normalize"]
    assert kinds(config(), choices="normalize")[-1] == "Normalize"


def test_clip_test_transform_by_hand():
    image = picture(60, 40)
    output = build_transform(config("random_resized_crop", "random_flip", "normalize"), is_train=False)(image)
    resized = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    expected = (expected - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    torch.testing.assert_close(output, expected)


def test_clip_train_transform_settings():
    crop = build_transform(config("random_resized_crop", "random_flip", "normalize")).transforms[0]
    assert tuple(crop.scale) == (0.08, 1.0) and tuple(crop.ratio) == pytest.approx((3 / 4, 4 / 3))
    assert crop.interpolation is INTERPOLATION_MODES["bicubic"]


def test_no_transform():
    cfg = config("normalize")
    cfg.INPUT.NO_TRANSFORM = True
    assert build_transform(cfg) is None


@pytest.mark.parametrize(
    "cfg, told",
    [
        (config("random_flipp"), 'did you mean "random_flip"'),
        (config(interpolation="bicubik"), 'did you mean "bicubic"'),
        (config(size=(32,)), "INPUT.SIZE"),
        (config(size=(0, 32)), "INPUT.SIZE"),
    ],
)
def test_wrong_settings(cfg, told):
    with pytest.raises(InputError, match=told):
        build_transform(cfg)


def test_translation_covers_both_cases():
    torch.manual_seed(0)
    image = picture()
    plain = image.resize((24, 32), Image.Resampling.BILINEAR)
    results = [Random2DTranslation(32, 24)(image) for _ in range(20)]
    assert all(result.size == (24, 32) for result in results)
    assert 0 < sum(result.tobytes() == plain.tobytes() for result in results) < 20


def test_cutout():
    torch.manual_seed(0)
    image = torch.ones(3, 20, 20)
    for _ in range(20):
        output = Cutout(n_holes=1, length=6)(image)
        zeros = (output[0] == 0).nonzero()
        height, width = (zeros.amax(0) - zeros.amin(0) + 1).tolist()
        assert 3 <= height <= 6 and 3 <= width <= 6 and len(zeros) == height * width
        assert torch.equal(output[0], output[1])
    assert image.min() == 1  # the input is left alone


def test_noise_and_instance_norm():
    torch.manual_seed(0)
    image = torch.zeros(3, 50, 50)
    noisy = GaussianNoise(mean=1.0, std=0.5, p=1.0)(image)
    assert noisy.mean().item() == pytest.approx(1.0, abs=0.05) and noisy.std().item() == pytest.approx(0.5, abs=0.05)
    assert GaussianNoise(p=0.0)(image) is image
    normal = InstanceNormalization()(noisy * 3 + 7)
    torch.testing.assert_close(normal.mean((1, 2)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((1, 2)), torch.ones(3))


def test_every_operation_at_its_limits():
    for operation, low, high in OPERATIONS:
        for strength in (low, high):
            output = operation(picture(), strength)
            assert output.size == (60, 40) and output.mode == "RGB"
