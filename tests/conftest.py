"""What every test starts from."""

import atexit
import gc
import logging
import os
import shutil
import signal
import tempfile

import pytest

# What `datasets` prepares from files of a test is of no use after it. It reads the variable when it is imported.
_CACHE = tempfile.mkdtemp(prefix="nio-hf-datasets-")
os.environ["HF_DATASETS_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

# The tests import some million objects that stay. Trainer collects garbage at the end of each training, which would
# look at all of them.
gc.disable()

# A shell starts what runs in its background with interrupts ignored, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def messages():
    """A command that ran in this process does not decide where later tests find the messages."""
    logger = logging.getLogger("nio_hf")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1:]
