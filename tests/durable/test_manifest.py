"""Which checkpoints are known to be whole, which one is taken, and which ones are deleted."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from nio_hf.durable import manifest
from nio_hf.durable.manifest import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    begin,
    candidates,
    checkpoint_fault,
    fault_of,
    has_manifest,
    newest_usable,
    rotate,
    write_manifest,
)
from nio_hf.errors import OutputError
from nio_hf.files import write_atomically

TOO_LARGE = """
import resource, signal, sys
from pathlib import Path
from nio_hf.durable.manifest import write_manifest
from nio_hf.errors import OutputError
from nio_hf.files import write_atomically

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    write_atomically(folder / "state.json", "x" * 5000)
except OSError as error:
    print("state:", error.strerror)
try:
    write_manifest(folder)
except OutputError as error:
    print("manifest:", error)
"""


def test_a_checkpoint_is_whole_once_its_manifest_is_written(tmp_path: Path) -> None:
    checkpoint = _unsealed(tmp_path / "checkpoint-1")
    assert not has_manifest(checkpoint)
    assert "it was not written to its end" in str(fault_of(checkpoint))
    write_manifest(checkpoint)
    assert has_manifest(checkpoint)
    assert fault_of(checkpoint) is None


@pytest.mark.parametrize("moment", ["_entry", "write_atomically"])
def test_a_checkpoint_whose_sealing_was_cut_off_is_not_taken_for_one_of_trainer(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint-1"
    begin(checkpoint)
    (checkpoint / "model.bin").write_bytes(b"weights")
    TrainerState().save_to_json(str(checkpoint / "trainer_state.json"))
    monkeypatch.setattr(manifest, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(checkpoint)
    monkeypatch.undo()
    assert not has_manifest(checkpoint)
    assert "it was not written to its end" in str(checkpoint_fault(checkpoint))
    write_manifest(checkpoint)
    assert checkpoint_fault(checkpoint) is None
    assert sorted(path.name for path in checkpoint.iterdir()) == ["model.bin", MANIFEST_NAME, "trainer_state.json"]
    assert list(json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]) == ["model.bin", "trainer_state.json"]


def test_a_checkpoint_of_trainer_can_be_used_once_its_state_is_written(tmp_path: Path) -> None:
    checkpoint = _unsealed(tmp_path / "checkpoint-1")
    assert newest_usable(candidates(tmp_path)) is None
    state = checkpoint / "trainer_state.json"
    TrainerState().save_to_json(str(state))
    assert newest_usable(candidates(tmp_path)) == checkpoint
    os.truncate(state, 5)
    assert "trainer_state.json cannot be read" in str(checkpoint_fault(checkpoint))


@pytest.mark.parametrize("later", ["sealed", "unsealed"])
def test_the_newest_is_the_one_written_last_sealed_or_not(later: str, tmp_path: Path) -> None:
    sealed, unsealed = _sealed(tmp_path / "checkpoint-1"), _unsealed(tmp_path / "checkpoint-2")
    TrainerState().save_to_json(str(unsealed / "trainer_state.json"))
    _saved_at(sealed, 2e9 if later == "sealed" else 1e9)
    os.utime(unsealed / "trainer_state.json", (1.5e9, 1.5e9))
    assert newest_usable(candidates(tmp_path)) == (sealed if later == "sealed" else unsealed)
    rotate(tmp_path, 1, [])
    assert _steps(tmp_path) == ([1] if later == "sealed" else [2])


def _truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.bin", 99)


def _change(checkpoint: Path) -> None:
    (checkpoint / "model.bin").write_bytes(b"y" + b"x" * 99)


def _change_below(checkpoint: Path) -> None:
    (checkpoint / "parts" / "one" / "optimizer.bin").write_bytes(b"other")


def _remove(checkpoint: Path) -> None:
    (checkpoint / "model.bin").unlink()


def _replace_by_a_folder(checkpoint: Path) -> None:
    _remove(checkpoint)
    (checkpoint / "model.bin").mkdir()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_truncate, "model.bin has 99 bytes, not 100"),
        (_change, "model.bin has been changed: its SHA-256 is another one"),
        (_change_below, "parts/one/optimizer.bin has been changed"),
        (_remove, "model.bin is missing"),
        (_replace_by_a_folder, "model.bin is missing"),
    ],
)
def test_what_happened_to_a_file_is_said(harm: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    checkpoint = _sealed(tmp_path / "checkpoint-1")
    harm(checkpoint)
    assert message in str(fault_of(checkpoint))


def test_files_added_later_do_no_harm(tmp_path: Path) -> None:
    checkpoint = _sealed(tmp_path / "checkpoint-1")
    (checkpoint / "README.md").write_text("of a hub")
    (checkpoint / "parts" / "notes.txt").write_text("of a user")
    assert fault_of(checkpoint) is None


def test_large_sizes_are_readable(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "model.bin").write_bytes(bytes(1_234_567))
    write_manifest(checkpoint)
    os.truncate(checkpoint / "model.bin", 1_000_000)
    assert "has 1,000,000 bytes, not 1,234,567" in str(fault_of(checkpoint))


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\x00" * 300,
        b"\xff\xfe",
        b"not json",
        b"[]",
        b"{}",
        b"null",
        b'{"format": 99, "saved": 1.0, "files": {}}',
        b'{"format": 1, "saved": 1.0}',
        b'{"format": 1, "saved": null, "files": {}}',
        b'{"format": 1, "saved": 1.0, "files": []}',
        b'{"format": 1, "saved": 1.0, "files": {"model.bin": 100}}',
        b'{"format": 1, "saved": 1.0, "files": {"model.bin": ["many", "digest"]}}',
        b'{"format": 1, "saved": 1.0, "files": {"model.bin": [1, "digest", 3]}}',
    ],
)
def test_a_manifest_that_cannot_be_read_is_as_good_as_none(content: bytes | None, tmp_path: Path) -> None:
    checkpoint = _sealed(tmp_path / "checkpoint-1")
    (checkpoint / MANIFEST_NAME).unlink()
    if content is not None:
        (checkpoint / MANIFEST_NAME).write_bytes(content)
    assert f"{MANIFEST_NAME} is missing or cannot be read" in str(fault_of(checkpoint))
    assert newest_usable(candidates(tmp_path)) is None


def test_the_manifest_names_files_of_sub_folders_and_not_itself(tmp_path: Path) -> None:
    checkpoint = _sealed(tmp_path / "checkpoint-1")
    write_manifest(checkpoint)
    content = json.loads((checkpoint / MANIFEST_NAME).read_text())
    assert list(content["files"]) == ["model.bin", "parts/one/optimizer.bin"]
    assert fault_of(checkpoint) is None


def test_a_checkpoint_can_be_moved(tmp_path: Path) -> None:
    moved = _sealed(tmp_path / "checkpoint-1").rename(tmp_path / "elsewhere")
    assert fault_of(moved) is None


def test_the_newest_is_the_one_written_last_not_the_one_of_the_largest_number(tmp_path: Path) -> None:
    for step in (10, 9, 3):
        _sealed(tmp_path / f"checkpoint-{step}")
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-3"
    write_manifest(tmp_path / "checkpoint-9")
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-9"


def test_of_checkpoints_written_at_once_the_newest_has_the_largest_number(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        _saved_at(_sealed(tmp_path / f"checkpoint-{step}"), 5.0)
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-10"


def test_broken_ones_are_passed_over_and_it_is_said_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 4):
        _sealed(tmp_path / f"checkpoint-{step}")
    (_unsealed(tmp_path / "checkpoint-5") / UNFINISHED_NAME).touch()
    _truncate(tmp_path / "checkpoint-4")
    _remove(tmp_path / "checkpoint-3")
    _change(tmp_path / "checkpoint-1")
    with caplog.at_level(logging.WARNING):
        assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-2"
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(messages) == [
        f"{tmp_path / 'checkpoint-3'} is passed over: model.bin is missing.",
        f"{tmp_path / 'checkpoint-4'} is passed over: model.bin has 99 bytes, not 100.",
        f"{tmp_path / 'checkpoint-5'} is passed over: {MANIFEST_NAME} is missing: it was not written to its end.",
    ]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert [newest_usable(candidates(tmp_path / name)) for name in ("empty", "missing", "file")] == [
            None,
            None,
            None,
        ]
    assert not caplog.records


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    others = ["checkpoint-abc", "checkpoint-5.old", "checkpoint-", "checkpoint--7", "my-checkpoint-8", "_nio_init"]
    for name in others:
        _sealed(tmp_path / name)
    (tmp_path / "checkpoint-3").write_text("a file")
    assert newest_usable(candidates(tmp_path)) is None
    kept = _sealed(tmp_path / "checkpoint-4")
    rotate(tmp_path, 1, [kept])
    assert newest_usable(candidates(tmp_path)) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "checkpoint-3", "checkpoint-4"])


@pytest.mark.parametrize(
    ("limit", "left"),
    [(None, [1, 2, 3, 4]), (0, [1, 2, 3, 4]), (-1, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])],
)
def test_the_oldest_are_deleted_down_to_the_limit(limit: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        newest = _sealed(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, limit, [newest])
    assert _steps(tmp_path) == left


def test_the_oldest_is_the_one_written_first_whatever_its_number(tmp_path: Path) -> None:
    for step in (30, 2, 11):
        newest = _sealed(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 2, [newest])
    assert _steps(tmp_path) == [2, 11]


def test_what_is_to_be_kept_is_kept_however_old(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        newest = _sealed(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 3, [newest, tmp_path / "checkpoint-1"])
    assert _steps(tmp_path) == [1, 3, 4]
    rotate(tmp_path, 1, [newest, tmp_path / "checkpoint-1"])
    assert _steps(tmp_path) == [1, 4]


def test_a_checkpoint_named_another_way_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        _sealed(tmp_path / f"checkpoint-{step}")
    monkeypatch.chdir(tmp_path)
    rotate(tmp_path, 1, [Path("checkpoint-1")])
    assert _steps(tmp_path) == [1]


def test_one_to_keep_that_is_gone_takes_no_place_of_another(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        newest = _sealed(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 1, [newest, tmp_path / "checkpoint-77"])
    assert _steps(tmp_path) == [3]


def test_half_written_ones_are_deleted_first(tmp_path: Path) -> None:
    for step in (1, 2):
        _sealed(tmp_path / f"checkpoint-{step}")
    for step in (3, 9):
        _unsealed(tmp_path / f"checkpoint-{step}")
    newest = _sealed(tmp_path / "checkpoint-4")
    rotate(tmp_path, 3, [newest])
    assert _steps(tmp_path) == [1, 2, 4]


def test_the_last_one_known_to_be_whole_is_never_deleted(tmp_path: Path) -> None:
    whole = _saved_at(_sealed(tmp_path / "checkpoint-1"), 1.0)
    for step in (2, 3):
        _sealed(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 1, [whole])
    assert newest_usable(candidates(tmp_path)) == whole


def test_a_clock_that_was_put_back_does_not_delete_the_newest(tmp_path: Path) -> None:
    _saved_at(_sealed(tmp_path / "checkpoint-1"), 4e9)
    newest = _sealed(tmp_path / "checkpoint-2")
    rotate(tmp_path, 1, [newest])
    assert _steps(tmp_path) == [2]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "old")
    write_atomically(file, "Größe")
    assert file.read_text(encoding="utf-8") == "Größe"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_file_keeps_what_it_held_where_writing_fails(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "old")
    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[what], _full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_a_file_that_could_not_be_written_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "state.json", "new")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_output_error_and_the_checkpoint_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _unsealed(tmp_path / "checkpoint-1")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OutputError, match=r"checkpoint-1: .*No space left.* Free space, then start again\."):
        write_manifest(checkpoint)
    assert fault_of(checkpoint) is not None


def test_a_checkpoint_that_is_gone_cannot_be_sealed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="checkpoint-1"):
        write_manifest(tmp_path / "checkpoint-1")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_file_that_grows_too_large_in_fact_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("old")
    for number in range(20):
        (checkpoint / f"{number}.bin").write_bytes(b"x")
    command = [sys.executable, "-c", TOO_LARGE, str(checkpoint)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "state: File too large" in output
    assert f"manifest: {checkpoint}: " in output
    assert (checkpoint / "state.json").read_text() == "old"
    assert fault_of(checkpoint) is not None


def _unsealed(checkpoint: Path) -> Path:
    """A checkpoint without a manifest, as a training leaves it that was killed."""
    (checkpoint / "parts" / "one").mkdir(parents=True)
    (checkpoint / "model.bin").write_bytes(b"x" * 100)
    (checkpoint / "parts" / "one" / "optimizer.bin").write_bytes(b"state")
    return checkpoint


def _sealed(checkpoint: Path) -> Path:
    write_manifest(_unsealed(checkpoint))
    return checkpoint


def _saved_at(checkpoint: Path, seconds: float) -> Path:
    """The checkpoint as if it had been written at another time."""
    file = checkpoint / MANIFEST_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "saved": seconds}))
    return checkpoint


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.iterdir())


def _full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
