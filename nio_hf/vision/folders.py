"""Folders of images as people have them: which of them are read as which split, and what hides their classes."""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as _Format

from nio_hf.errors import DataError, Problem, listed, one_line

logger = logging.getLogger(__name__)

_IMAGES = frozenset(_Format.EXTENSIONS)
_METADATA = frozenset(_Format.METADATA_FILENAMES)
_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
"""Words by which `datasets` knows the folders of a split."""
_NAMED = {split: re.compile(rf"(?i)(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])") for split, words in _WORDS.items()}
_MANY = 100_000
_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder, symbolic links followed.

    Attributes:
        parts: of its path below the root.
        split: that it belongs to; None where no part of its path names one.
        base: parts of the path of the folder of that split; none of the root.
        linked: whether it is a symbolic link.
        images: number of images in it.
        others: number of other files, metadata left out.
        example: name of an image.
        lists: files other than images that are called like a split.
        has_metadata: whether metadata describe the images.
        is_empty: whether nothing is in it.
    """

    parts: tuple[str, ...]
    split: str | None
    base: tuple[str, ...]
    linked: bool
    images: int
    others: int
    example: str
    lists: tuple[str, ...]
    has_metadata: bool
    is_empty: bool

    @property
    def name(self) -> str:
        """Its path below the root."""
        return "/".join(self.parts)

    @property
    def inner(self) -> tuple[str, ...]:
        """Parts of its path below the folder of its split."""
        return self.parts[len(self.base) :]


class ImageFolder:
    """The images in a folder, by split.

    A split is a folder that is called so, wherever it lies: train, validation, test and the like. What lies inside
    belongs to it whatever it is called, and names of files mean nothing. Without such a folder everything is "train".

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders = list(_walk(root, (), None, (), False, frozenset()))
        outside = {folder.parts[:-1] for folder in self._folders if folder.images and folder.split is None}
        splits = {folder.base for folder in self._folders if folder.images and folder.split is not None}
        held = {folder.parts for folder in self._folders if folder.images}
        # A class may be called "train", too: its images lie beside those of other classes.
        if all(base in held and base[:-1] in outside for base in splits):
            self._folders = [dataclasses.replace(folder, split=None, base=()) for folder in self._folders]
            splits = set()
        self._read = [f for f in self._folders if f.images and (not splits or f.split is not None)]
        self._outside = [f for f in self._folders if f.images and splits and f.split is None]

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(folder.images for folder in self._folders)

    @property
    def others(self) -> int:
        """Number of files that are neither images nor metadata."""
        return sum(folder.others for folder in self._folders)

    def data_files(self) -> dict[str, list[str]]:
        """{split: patterns of its files}, as [`datasets.load_dataset`] takes them, which follows no symbolic links."""
        root, found = self.root.absolute(), {}
        for split in dict.fromkeys([*_WORDS, None]):
            bases = {folder.base for folder in self._read if folder.split == split}
            links = {folder.parts for folder in self._folders if folder.linked and folder.base in bases}
            if bases:
                folders = [glob.escape(str(root.joinpath(*parts))) for parts in sorted(bases | links)]
                found[split or "train"] = [f"{folder}/**" for folder in folders]
        return found

    def check(self, key: str) -> None:
        """Say what is left out, and refuse a folder whose classes cannot be known.

        Args:
            key: setting that names the folder.

        Raises:
            DataError: lists all that hides the classes.
        """
        empty = [str(self.root / folder.name) for folder in self._folders if folder.is_empty]
        if empty:
            logger.warning("No class is made of empty folders: %s.", listed(empty, _MAX_NAMED))
        if self._outside:
            count = sum(folder.images for folder in self._outside)
            names = listed([folder.name or str(self.root) for folder in self._outside], _MAX_NAMED)
            logger.warning("%d images lie outside of the splits and are not read: in %s.", count, names)
        lists = [f"{folder.name}/{name}".lstrip("/") for folder in self._folders for name in folder.lists]
        if lists:
            logger.warning("%s are not read: splits are folders, or given by data_files.", listed(lists, _MAX_NAMED))
        if self.images >= _MANY:
            logger.info(
                "%s: %s files are listed at every start. A Parquet file of their paths avoids that, see the README.",
                self.root,
                f"{self.images:,}",
            )
        problems = [dataclasses.replace(problem, where=key) for problem in self._problems()]
        if problems:
            raise DataError(*problems)

    def _problems(self) -> Iterator[Problem]:
        if any(folder.has_metadata for folder in self._folders):
            return
        levels: Counter[int] = Counter()
        for folder in self._read:
            levels[len(folder.inner)] += folder.images
        (level, _), *_ = levels.most_common()
        root, total = str(self.root), levels.total()
        if level == 0:
            fix = "Put the images of each class into a folder of their own, or say their label in a metadata.csv"
            yield Problem("", f"{root!r} has {levels[0]} images that are in no folder of a class", fix)
            return
        usual = [folder for folder in self._read if len(folder.inner) == level]
        odd = [folder for folder in self._read if len(folder.inner) != level]
        if odd:
            count = total - levels[level]
            names = listed([f"{folder.name}/{folder.example}".lstrip("/") for folder in odd], _MAX_NAMED)
            found = f"{count} of {total} images of {root!r} are not in the folder of a class as the others are: {names}"
            yield Problem("", found, "Move them into the folder of their class, or out of that folder")
        labels = {folder.parts[-1] for folder in usual}
        if len(labels) > 1:
            return
        (label,) = labels
        if len({folder.inner[:-1] for folder in usual}) > 1:
            names = listed([folder.name for folder in usual], _MAX_NAMED)
            found = f"the images of every class of {root!r} lie one level too deep, in a folder {label!r}: {names}"
            yield Problem("", found, f"Move them up, out of {label!r}: the folder that holds them names their class")
        else:
            found = f"all {levels[level]} images of {root!r} in folders are of one class, {label!r}"
            yield Problem("", found, "Give two classes or more, each in a folder of its own")


def find_image_folder(name: str, data_dir: str | None) -> tuple[str, ImageFolder] | None:
    """The local folder of images that a data set is, and the setting that names it; None for any other data set.

    Args:
        name: "imagefolder", or a folder.
        data_dir: the folder, or one in the folder that is named.
    """
    if name == "imagefolder":
        root, key = Path(data_dir or ""), "data_dir"
    else:
        root, key = Path(name, data_dir or ""), "dataset_name"
    if not root.is_dir() or (name != "imagefolder" and (root / "README.md").is_file()):
        return None
    folder = ImageFolder(root)
    is_meant = name == "imagefolder" or folder.images > folder.others
    return (key, folder) if folder.images and is_meant else None


def _walk(
    path: Path,
    parts: tuple[str, ...],
    split: str | None,
    base: tuple[str, ...],
    linked: bool,
    above: frozenset[Path],
) -> Iterator[_Folder]:
    """A folder and those below, names in order, but for hidden ones and links that lead back."""
    real = path.resolve()
    if real in above:
        return
    if split is None and parts:
        split = _split_named(parts[-1])
        base = () if split is None else parts
    try:
        with os.scandir(path) as entries:
            own = sorted((e for e in entries if not e.name.startswith((".", "__"))), key=lambda entry: entry.name)
    except OSError as error:
        found = f"cannot be read: {one_line(error)}"
        raise DataError(Problem(str(path), found, "Allow to read it, or move it out")) from error
    folders = [entry for entry in own if entry.is_dir()]
    files = [entry.name for entry in own if not entry.is_dir()]
    images = [name for name in files if f".{name.rpartition('.')[2].lower()}" in _IMAGES]
    others = sorted(set(files) - set(images) - _METADATA)
    yield _Folder(
        parts,
        split,
        base,
        linked,
        images=len(images),
        others=len(others),
        example=images[0] if images else "",
        lists=tuple(name for name in others if _split_named(name.partition(".")[0])),
        has_metadata=not _METADATA.isdisjoint(files),
        is_empty=not own,
    )
    for entry in folders:
        yield from _walk(path / entry.name, (*parts, entry.name), split, base, entry.is_symlink(), above | {real})


def _split_named(name: str) -> str | None:
    """The split that is called so."""
    return next((split for split, pattern in _NAMED.items() if pattern.search(name)), None)
