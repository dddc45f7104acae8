"""Image files of every kind: converted to upright 8-bit RGB, or named with the reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dassl.utils import InputError, read_image

GRADIENT = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))  # 48 x 64, dark on the left


def save(path, image, **options):
    image.save(path, **options)
    return read_image(path)


def left_and_right(image) -> tuple[float, float]:
    gray = np.asarray(image.convert("L"), dtype=float)
    return gray[:, :8].mean(), gray[:, -8:].mean()


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.jpg"),
        ("L", "a.jpg"),
        ("CMYK", "a.jpg"),
        ("CMYK", "a.tif"),
        ("RGBA", "a.png"),
        ("LA", "a.png"),
        ("P", "a.png"),
        ("P", "a.gif"),
        ("RGB", "a.webp"),
        ("YCbCr", "a.jpg"),
    ],
)
def test_every_mode_becomes_rgb_and_keeps_its_picture(tmp_path, mode, name):
    read = save(tmp_path / name, Image.fromarray(GRADIENT).convert("RGB").convert(mode))
    assert (read.mode, read.size) == ("RGB", (64, 48))
    dark, bright = left_and_right(read)
    assert dark < 30 and bright > 225


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_cut_off(tmp_path, name):
    read = save(tmp_path / name, Image.fromarray(GRADIENT.astype(np.uint16) * 257))
    np.testing.assert_array_equal(np.asarray(read)[..., 0], GRADIENT)
    dim = save(tmp_path / name, Image.fromarray(np.full((8, 8), 200, dtype=np.uint16)))
    assert np.asarray(dim).max() == 1  # 200 of 65535 is nearly black


@pytest.mark.parametrize("highest", [0.5, 0.98, 1.0, 1.02])
def test_all_images_of_floats_have_one_scale(tmp_path, highest):
    """White is 1 whatever the image's own maximum is; what resampling carries a little beyond is cut off."""
    values = GRADIENT.astype(np.float32) / GRADIENT.max() * np.float32(highest)
    read = save(tmp_path / "a.tif", Image.fromarray(values))
    np.testing.assert_array_equal(np.asarray(read)[..., 1], np.clip(np.rint(values.astype(np.float64) * 255), 0, 255))


def test_numbers_that_tell_no_white_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.tif.*floats up to \d+ where 1 is white"):
        save(tmp_path / "a.tif", Image.fromarray(GRADIENT.astype(np.float32)))
    with pytest.raises(InputError, match=r"b\.tif.*32-bit integers, which tell no white"):
        save(tmp_path / "b.tif", Image.fromarray(GRADIENT.astype(np.int32)))


@pytest.mark.parametrize("highest", [100, 4095, 65535])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_all_images_of_sixteen_bits_have_one_scale(tmp_path, name, highest):
    values = (GRADIENT.astype(np.float64) / GRADIENT.max() * highest).astype(np.uint16)
    if name.endswith(".pgm"):  # Pillow writes 8 bits
        header = f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode()
        (tmp_path / name).write_bytes(header + values.astype(">u2").tobytes())
        read = read_image(tmp_path / name)
    else:
        read = save(tmp_path / name, Image.fromarray(values))
    np.testing.assert_array_equal(np.asarray(read)[..., 0], np.rint(values / 257).astype(np.uint8))


def test_transparent_pixels_are_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    read = save(tmp_path / "a.png", image)
    assert read.getpixel((1, 1)) == (255, 0, 0) and read.getpixel((6, 6)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(1, (0, 0, 4, 8))
    read = save(tmp_path / "b.png", palette, transparency=0)
    assert read.getpixel((1, 1)) == (10, 20, 30) and read.getpixel((6, 6)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.new("RGB", (40, 20))
    upright.paste((255, 255, 255), (0, 0, 10, 20))  # bright on the left
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)  # how a camera that was held otherwise stores it
    stored = upright if method is None else upright.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = save(tmp_path / "a.jpg", stored, exif=exif, quality=95)
    assert read.size == (40, 20)
    bright, dark = left_and_right(read)
    assert bright > 200 and dark < 50


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    read = save(tmp_path / "a.jpg", Image.fromarray(GRADIENT), exif=b"Exif\x00\x00nonsense")
    assert read.size == (64, 48)


def test_only_the_first_picture_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_very_wide_image_is_read_or_named(tmp_path):
    assert save(tmp_path / "a.png", Image.new("L", (50_000, 600))).size == (50_000, 600)
    with pytest.raises(InputError, match=r"b\.png.*50000 x 40 pixels"):
        save(tmp_path / "b.png", Image.new("L", (50_000, 40)))


def test_an_image_too_large_to_open_safely_is_named(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png.*10000 pixels"):
        read_image(tmp_path / "bomb.png")


def whole(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "tiff", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_images_are_named(tmp_path, kind, share):
    content = whole(kind)
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=f"cut.{kind}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "an empty file"), (b"Dear diary,\n", "no known image format"), (b"\xff\xd8\xff", "a.jpg")],
)
def test_files_that_are_no_images_are_named(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_image(tmp_path / "a.jpg")


def test_links_that_lead_nowhere_and_folders_are_named(tmp_path):
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("loop.jpg", "gone.jpg", "folder.jpg", "absent.jpg"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("least", "size"), [(0, (640, 480)), (300, (640, 480)), (240, (320, 240)), (60, (80, 60)), (1, (80, 60))]
)
def test_jpeg_files_are_decoded_at_the_smallest_size_that_is_enough(tmp_path, least, size):
    picture = Image.fromarray(GRADIENT).convert("RGB").resize((640, 480), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[0x0112] = 6  # it is stored sideways
    picture.save(tmp_path / "a.jpg", exif=exif)
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.jpg", least).size == size[::-1]
    assert read_image(tmp_path / "a.png", least).size == (480, 640)  # other formats are whole
    small = np.asarray(read_image(tmp_path / "a.jpg").resize((12, 16), Image.Resampling.BOX), dtype=float)
    reduced = np.asarray(read_image(tmp_path / "a.jpg", least).resize((12, 16), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - reduced).max() < 6  # the same picture
