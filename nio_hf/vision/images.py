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
        name: of the image in messages, where it has no path.

    Raises:
        BrokenImageError: for a file that is missing, truncated, no image, or larger than Pillow allows.
    """
    content, path = (
        (None, None) if stored is None or isinstance(stored, Image.Image) else (stored["bytes"], stored["path"])
    )
    where = f"{path} ({name})" if path else name
    if stored is None or (not isinstance(stored, Image.Image) and content is None and not path):
        raise BrokenImageError(Problem(where, "no image", _FIX))
    try:
        if isinstance(stored, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(stored))
        with _FEATURE.decode_example(stored) as image:  # a file of several pictures stays open
            return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise BrokenImageError(Problem(where, f"too large: {one_line(error)}", _FIX)) from error
    except Exception as error:  # Pillow's decoders raise nearly every kind for a damaged file
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise BrokenImageError(Problem(where, f"cannot be read as an image: {reason}", _FIX)) from error


def image_digest(stored: Any, seed: int = 0) -> int:
    """A digest in [0, 2^32) of an image as it is stored: the same in whatever order and folder the images come.

    Args:
        stored: `{"bytes": ..., "path": ...}`; of a file without bytes the last parts of its path stand for it.
        seed: another seed gives another digest.
    """
    stored = stored or {"bytes": None, "path": None}
    content = stored["bytes"] or "/".join(PurePath(stored["path"] or "").parts[-2:]).encode()
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
