"""Image files of any kind as RGB images."""

from __future__ import annotations

import zlib
from pathlib import PurePath
from typing import Any

import datasets
from PIL import Image, ImageOps, UnidentifiedImageError

from nio_hf.errors import BrokenImageError, Problem, one_line

_SIXTEEN_BITS = 257
"""65535 / 255: greyscale of 16 bits is reduced by it, where Pillow would clip."""
_FIX = "Replace or remove it, or set skip_broken_images: true"
_FEATURE = datasets.Image()


def read_image(stored: Any, name: str) -> Image.Image:
    """An image in RGB, upright.

    Greyscale, palette and CMYK are converted, transparency is dropped as inference in transformers does, an EXIF
    orientation is applied.

    Args:
        stored: `{"bytes": ..., "path": ...}` as [`datasets.Image`] stores it, the path local, in an archive or remote;
            or an image.
        name: Name of the image in messages, where it has no path.

    Raises:
        BrokenImageError: For a file that is missing, truncated, no image, or larger than Pillow allows.
    """
    where = name
    try:
        if isinstance(stored, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(stored))
        stored = stored or {"bytes": None, "path": None}
        if stored["path"]:
            where = f"{stored['path']} ({name})"
        elif stored["bytes"] is None:
            raise BrokenImageError(Problem(where, "no image", _FIX))
        with _FEATURE.decode_example(stored) as image:  # a file of several pictures stays open
            return _to_rgb(image)
    except BrokenImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImageError(Problem(where, f"too large: {one_line(error)}", _FIX)) from error
    except Exception as error:  # Pillow's decoders raise nearly every kind for a damaged file
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise BrokenImageError(Problem(where, f"cannot be read as an image: {reason}", _FIX)) from error


def image_digest(stored: Any, seed: int = 0) -> int:
    """A digest in [0, 2^32) of an image as it is stored: the same in whatever order and folder the images come.

    Of a file without bytes the last two parts of its path, in its archive if need be, stand for it. Another seed gives
    another digest.
    """
    stored = stored or {"bytes": None, "path": None}
    path, _, _ = (stored["path"] or "").partition("::")
    content = stored["bytes"] or "/".join(PurePath(path).parts[-2:]).encode()
    return zlib.crc32(content, seed)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / _SIXTEEN_BITS))
    if image.mode in ("I", "F"):
        image = image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
