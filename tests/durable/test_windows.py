"""The package works without POSIX: a process without it imports all modules and writes checkpoints."""

import sys

import pytest

from tests.durable.trainings import start_python

WITHOUT_POSIX = """
import fcntl, os, signal, sys
flags, fsync = fcntl.fcntl, os.fsync

def fsync_as_on_windows(handle):
    if flags(handle, fcntl_getfl) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    fsync(handle)

fcntl_getfl = fcntl.F_GETFL
os.fsync = fsync_as_on_windows
import multiprocessing.util, torch, transformers.trainer  # they themselves use what is taken away
sys.modules["fcntl"] = None
for module, name in ((os, "O_DIRECTORY"), (os, "killpg"), (signal, "SIGHUP"), (signal, "SIGQUIT")):
    delattr(module, name)

import importlib, pkgutil
import nio_hf
for module in pkgutil.walk_packages(nio_hf.__path__, "nio_hf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from pathlib import Path
from nio_hf.durable.manifest import candidates, checkpoint_fault
from tests.trainer.toys import trained

folder = Path(sys.argv[1])
trained(folder, save_strategy="steps", save_steps=1, save_total_limit=1)
print([(path.name, checkpoint_fault(path)) for path in candidates(folder)])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="takes POSIX away")
def test_modules_import_and_checkpoints_are_written_without_posix(tmp_path):
    process = start_python("-c", WITHOUT_POSIX, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "[('checkpoint-2', None)]" in output
