"""Image files of any kind: read as RGB and upright, or refused with the name of the file."""

import gc
import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from nio_hf.errors import BrokenImageError
from nio_hf.vision.samples import read_image
from tests.vision.pictures import BROKEN, encoded, photo, stored

FIX = "Replace or remove it, or set skip_broken_images: true."
EVERY_BYTE = np.arange(256, dtype=np.uint8).reshape(16, 16)
ORIENTATION = 0x0112


def pixels(content):
    image = read_image(stored(content), "image 0")
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values):
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF"])
def test_greyscale_has_its_value_in_each_channel(file_format):
    image = Image.fromarray(np.repeat(np.repeat(EVERY_BYTE[::4, ::4], 8, 0), 8, 1))
    found = pixels(encoded(image, file_format)).astype(int)
    assert np.abs(found - grey(np.asarray(image).astype(int))).max() <= (16 if file_format == "JPEG" else 0)


@pytest.mark.parametrize(
    ("dtype", "file_format"), [("uint16", "PNG"), ("uint16", "TIFF"), (">u2", "TIFF"), ("int32", "TIFF")]
)
def test_greyscale_of_sixteen_bits_is_scaled_down_and_not_clipped(dtype, file_format):
    image = Image.fromarray((EVERY_BYTE.astype(np.int64) * 257).astype(dtype))
    np.testing.assert_array_equal(pixels(encoded(image, file_format)), grey(EVERY_BYTE))
    decoded = Image.fromarray(EVERY_BYTE.astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(read_image(decoded, "image 0")), grey(EVERY_BYTE))


def test_greyscale_of_numbers_of_32_bits_is_read_where_its_range_is_known():
    small = Image.fromarray(EVERY_BYTE.astype(np.int32))
    np.testing.assert_array_equal(pixels(encoded(small, "TIFF")), grey(EVERY_BYTE))
    for values in (EVERY_BYTE.astype(np.float32) / 255, EVERY_BYTE.astype(np.int32) * 70_000):
        with pytest.raises(BrokenImageError, match="have no known range"):
            pixels(encoded(Image.fromarray(values), "TIFF"))


def test_one_bit_and_cmyk_have_the_colours_that_pillow_gives_them():
    image = Image.fromarray(EVERY_BYTE).convert("1")
    np.testing.assert_array_equal(pixels(encoded(image)), grey(np.asarray(image).astype(np.uint8) * 255))
    solid = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(solid, "JPEG")).astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_and_the_colours_beneath_it_stay(mode):
    opaque = photo(0, 16, 16).convert(mode[:-1])
    image = opaque.copy()
    image.putalpha(Image.fromarray(EVERY_BYTE))
    np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(opaque.convert("RGB")))


@pytest.mark.parametrize(
    ("file_format", "transparency"), [("PNG", None), ("PNG", 3), ("PNG", bytes(range(256))), ("GIF", 3)]
)
def test_a_palette_gives_its_colours_with_and_without_transparency(file_format, transparency):
    image = photo(1, 16, 16).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(pixels(encoded(image, file_format, **options)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_an_exif_orientation_is_applied(file_format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(photo(2, 3, 5).resize((40, 24), Image.Resampling.NEAREST), file_format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert upright.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    np.testing.assert_array_equal(pixels(content), upright)
    decoded = read_image(Image.open(io.BytesIO(content)), "image 0")
    np.testing.assert_array_equal(np.asarray(decoded), upright)


@pytest.mark.parametrize("file_format", ["GIF", "TIFF", "PNG"])
def test_the_first_of_several_pictures_is_read_and_the_file_closed(file_format, tmp_path):
    path = tmp_path / f"several.{file_format.lower()}"
    photo(3).save(path, file_format, save_all=True, append_images=[photo(4)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        image = read_image(stored(None, str(path)), "image 0")
        assert file_format == "GIF" or np.array_equal(np.asarray(image), np.asarray(photo(3)))
        assert getattr(image, "fp", None) is None
        del image
        gc.collect()
    assert not caught


def png_of_a_wrong_checksum():
    content = bytearray(encoded(photo(9)))
    content[content.index(b"IDAT") + 6] ^= 255
    return bytes(content)


def png_that_claims_no_width():
    content = bytearray(encoded(photo(9)))
    content[16:20] = struct.pack(">I", 0)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


BROKEN_FILES = {
    "empty": lambda: b"",
    "no image": lambda: BROKEN,
    "only a signature": lambda: encoded(photo(0))[:8],
    **{
        f"a truncated {name}": lambda name=name: encoded(photo(7, 40, 40), name)[:1000]
        for name in ("PNG", "JPEG", "WEBP", "TIFF", "GIF")
    },
    "a wrong checksum": png_of_a_wrong_checksum,
    "no width": png_that_claims_no_width,
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_file_is_an_error_that_names_it_and_the_fix(kind):
    with pytest.raises(BrokenImageError) as raised:
        read_image(stored(BROKEN_FILES[kind](), "photos/cat/7.jpg"), "image 7 of the train part")
    message = str(raised.value)
    assert message.startswith("photos/cat/7.jpg (image 7 of the train part): cannot be read as an image: ")
    assert message.endswith(FIX)
    assert "\n" not in message
    assert "object at 0x" not in message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_no_damage_to_a_file_ends_in_an_error_of_somebody_else(file_format):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "maker"
    options = {} if file_format in ("GIF", "BMP") else {"exif": exif}
    if file_format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Raw profile type exif", "\nexif\n       4\n4d4d002a")
    content = encoded(photo(11, 20, 17), file_format, **options)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for position in generator.integers(0, min(len(damaged), 300), generator.integers(1, 6)):
            damaged[position] = generator.integers(256)
        if generator.random() < 0.3:
            damaged = damaged[: generator.integers(len(damaged))]
        try:
            read_image(stored(bytes(damaged)), "image 0")
        except BrokenImageError:
            refused += 1
    assert refused > 20


def test_an_image_of_more_pixels_than_pillow_allows_is_refused_with_their_number(monkeypatch):
    content = encoded(photo(12, 10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(BrokenImageError, match=r"bomb.png \(image 0\): too large: Image size \(100 pixels\)") as raised:
        read_image(stored(content, "bomb.png"), "image 0")
    assert str(raised.value).endswith(FIX)


def test_a_sample_without_an_image_a_missing_file_and_a_folder_are_broken_images(tmp_path):
    for missing in (None, stored(None), stored(None, "")):
        with pytest.raises(BrokenImageError, match=r"^image 3 of the train part: no image\. Replace or remove it"):
            read_image(missing, "image 3 of the train part")
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(BrokenImageError, match=re.escape(f"{path} (image 0): cannot be read as an image")):
            read_image(stored(None, str(path)), "image 0")
