"""Local folders of images: their splits, and layouts that hide their classes."""

from __future__ import annotations

import dataclasses
import glob
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as _Format

from nio_hf.errors import DataError, Problem, listed, one_line

logger = logging.getLogger(__name__)

_WORDS = {str(split): "|".join(words) for split, words in SPLIT_KEYWORDS.items()}
"""{split: words by which `datasets` knows its folders}."""
_MANY = 100_000
_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder, symbolic links followed.

    Attributes:
        parts: Parts of the path below the root.
        base: Parts of the path of its split; None without a part that names a split.
        is_link: Whether the folder is a symbolic link.
        images: Names of the images in the folder.
        others: Names of the other files, metadata left out.
        has_metadata: Whether metadata describe the images.
        is_empty: Whether the folder is empty.
    """

    parts: tuple[str, ...]
    base: tuple[str, ...] | None
    is_link: bool
    images: list[str]
    others: list[str]
    has_metadata: bool
    is_empty: bool

    @property
    def inner(self) -> tuple[str, ...]:
        """Parts of the path below the folder of the split."""
        return self.parts[len(self.base or ()) :]

    def path_of(self, name: str = "") -> str:
        """Path of the folder, or of a file in it, below the root."""
        return "/".join((*self.parts, *([name] if name else [])))


def find_image_files(name: str, data_dir: str | None) -> dict[str, list[str]] | None:
    """Find the files of a local folder of images as [`datasets.load_dataset`] takes them; None for other data sets.

    A folder called train, validation, test or the like is a split, wherever it lies. Everything inside belongs to that
    split, and names of files mean nothing. Without such a folder everything is "train". `name` is a folder with
    `data_dir` in it, or "imagefolder" with `data_dir` as the folder.

    Returns:
        {split: patterns of its files}; links, which `datasets` does not follow, have patterns of their own.

    Raises:
        DataError: Folder that cannot be read, and every cause that hides the classes.
    """
    is_asked = name == "imagefolder"
    root = Path(data_dir or "") if is_asked else Path(name, data_dir or "")
    if not root.is_dir() or (not is_asked and (root / "README.md").is_file()):
        return None
    folders = list(_walk(root, (), None, False, frozenset()))
    images = sum(len(folder.images) for folder in folders)
    if not images or (not is_asked and images <= sum(len(folder.others) for folder in folders)):
        return None
    held = [folder for folder in folders if folder.images]
    outside = {folder.parts[:-1] for folder in held if folder.base is None}
    bases = {folder.base for folder in held if folder.base is not None}
    # A class may be called "train", too: its images lie beside the images of other classes.
    if bases <= {folder.parts for folder in held} and all(base[:-1] in outside for base in bases):
        folders = [dataclasses.replace(folder, base=None) for folder in folders]
        held, bases = [folder for folder in folders if folder.images], set()
    read = [folder for folder in held if not bases or folder.base is not None]
    _report(root, folders, [folder for folder in held if folder not in read], images)
    where = "data_dir" if is_asked else "dataset_name"
    hidden = [] if any(folder.has_metadata for folder in folders) else list(_hidden_classes(str(root), read))
    if hidden:
        raise DataError(*(Problem(where, found, fix) for found, fix in hidden))
    files: dict[str, list[str]] = {}
    for split in [*_WORDS, None] if bases else [None]:
        tops = {folder.base or () for folder in read if _split_named(folder.base) == split}
        links = {folder.parts for folder in folders if folder.is_link and (folder.base or ()) in tops}
        if tops:
            paths = [root.absolute().joinpath(*parts) for parts in sorted(tops | links)]
            files[split or "train"] = [f"{glob.escape(str(path))}/**" for path in paths]
    return files


def _report(root: Path, folders: list[_Folder], outside: list[_Folder], images: int) -> None:
    """Report folders and files that are not read."""
    empty = [str(root.joinpath(*folder.parts)) for folder in folders if folder.is_empty]
    if empty:
        logger.warning("Empty folders make no class: %s.", listed(empty, _MAX_NAMED))
    if outside:
        count = sum(len(folder.images) for folder in outside)
        names = listed([folder.path_of() or str(root) for folder in outside], _MAX_NAMED)
        logger.warning("%d images lie outside of the splits and are not read: in %s.", count, names)
    lists = [f.path_of(name) for f in folders for name in f.others if _split_named((name.partition(".")[0],))]
    if lists:
        logger.warning("%s are not read: splits are folders, or given by data_files.", listed(lists, _MAX_NAMED))
    if images >= _MANY:
        told = "%s: %s files are listed at every start. A Parquet file of their paths avoids that, see docs/images.md."
        logger.info(told, root, f"{images:,}")


def _hidden_classes(root: str, read: list[_Folder]) -> Iterator[tuple[str, str]]:
    """Yield (cause that hides the classes, advice) for the folders that are read."""
    levels: Counter[int] = Counter()
    for folder in read:
        levels[len(folder.inner)] += len(folder.images)
    level, count = levels.most_common(1)[0]
    if level == 0:
        fix = "Put the images of each class into a folder of their own, or say their label in a metadata.csv"
        yield f"{root!r} has {count} images that are in no folder of a class", fix
        return
    usual = [folder for folder in read if len(folder.inner) == level]
    odd = [folder.path_of(folder.images[0]) for folder in read if len(folder.inner) != level]
    if odd:
        found = f"{levels.total() - count} of {levels.total()} images of {root!r} are not in the folder of a class "
        fix = "Move them into the folder of their class, or out of that folder"
        yield f"{found}as the others are: {listed(odd, _MAX_NAMED)}", fix
    label = usual[0].parts[-1]
    if any(folder.parts[-1] != label for folder in usual):
        return
    if len({folder.inner[:-1] for folder in usual}) > 1:
        names = listed([folder.path_of() for folder in usual], _MAX_NAMED)
        found = f"the images of every class of {root!r} lie one level too deep, in a folder {label!r}: {names}"
        yield found, f"Move them up, out of {label!r}: the folder that holds them names their class"
    else:
        found = f"all {count} images of {root!r} in folders are of one class, {label!r}"
        yield found, "Give two classes or more, each in a folder of its own"


def _walk(
    path: Path, parts: tuple[str, ...], base: tuple[str, ...] | None, is_link: bool, above: frozenset[Path]
) -> Iterator[_Folder]:
    """Yield a folder and the folders below, sorted by name, without hidden ones and links that lead back."""
    real = path.resolve()
    if real in above:
        return
    if base is None and _split_named(parts):
        base = parts
    try:
        own = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "__")))
    except OSError as error:
        found = f"cannot be read: {one_line(error)}"
        raise DataError(Problem(str(path), found, "Allow to read it, or move it out")) from error
    folders = [entry for entry in own if entry.is_dir()]
    files = [entry.name for entry in own if not entry.is_dir()]
    images = [name for name in files if f".{name.rpartition('.')[2].lower()}" in _Format.EXTENSIONS]
    others = sorted({*files} - {*images, *_Format.METADATA_FILENAMES})
    yield _Folder(parts, base, is_link, images, others, not {*files}.isdisjoint(_Format.METADATA_FILENAMES), not own)
    for entry in folders:
        yield from _walk(entry, (*parts, entry.name), base, entry.is_symlink(), above | {real})


def _split_named(parts: tuple[str, ...] | None) -> str | None:
    """Split that the last part of a path names."""
    for split, words in _WORDS.items():
        if parts and re.search(rf"(?i)(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])", parts[-1]):
            return split
    return None
