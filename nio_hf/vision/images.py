"""Stored images of any kind as RGB images, and their digests."""

from __future__ import annotations

import zlib
from pathlib import PurePath
from typing import Any

import datasets
from PIL import Image, ImageOps, UnidentifiedImageError

from nio_hf.errors import BrokenImageError, Problem, one_line

_SIXTEEN_BITS = 257
"""Divisor 65535 / 255 of greyscale of 16 bits, which Pillow would clip."""
_FIX = "Replace or remove it, or set skip_broken_images: true"
_FEATURE = datasets.Image()


def read_image(stored: Any, name: str) -> Image.Image:
    """Read an image in RGB, upright.

    Greyscale, palette and CMYK are converted, transparency is dropped as in the inference of transformers, and an EXIF
    orientation is applied.

    Args:
        stored: Image, or `{"bytes": ..., "path": ...}` as [`datasets.Image`] stores it, with a path that is local, in
            an archive or remote.
        name: Name of the image in messages.

    Raises:
        BrokenImageError: File that is missing, truncated, no image, or larger than Pillow allows.
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
    except Exception as error:  # whatever Pillow's decoders raise for a damaged file
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise BrokenImageError(Problem(where, f"cannot be read as an image: {reason}", _FIX)) from error


def image_digest(stored: Any, seed: int = 0) -> int:
    """Digest in [0, 2^32) of a stored image: the same in whatever order and folder the images come.

    The last two parts of its path stand for a file without bytes, in its archive if need be. Another seed gives
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
