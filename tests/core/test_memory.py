"""What memory is free, inside of a container too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nio_hf.core import memory


@pytest.mark.parametrize(("limit", "expected"), [("max", sys.maxsize), ("1000", 1000 - 900 + 300), ("500", 0)])
def test_files_that_the_system_keeps_at_hand_are_free(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\nactive_file 100\ninactive_file 200\nfile_mapped 7\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    assert memory._control_group_memory() == expected


def test_without_a_container_there_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path / "nothing")
    assert memory._control_group_memory() == sys.maxsize
