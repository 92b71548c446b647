"""The package works without POSIX: a process without it imports all modules and writes checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
from nio_hf import NIOTrainer
from nio_hf.durable.manifest import candidates, checkpoint_fault
from tests.trainer.toys import ToyImages, arguments, build

folder = Path(sys.argv[1])
args = arguments(folder, save_strategy="steps", save_steps=1, save_total_limit=1)
NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages()).train()
print([(path.name, checkpoint_fault(path)) for path in candidates(folder)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="takes POSIX away")
def test_modules_import_and_checkpoints_are_written_without_posix(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_POSIX, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[('checkpoint-2', None)]" in done.stdout
