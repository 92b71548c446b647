"""Fixtures of all tests of data sets."""

import gc
import warnings

import datasets
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def prompt_ends():
    """Spare the five seconds that `datasets` waits behind a parquet file, and torch for workers that are given up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


@pytest.fixture
def given_up_files():
    """Close in silence the files that `datasets` leaves open where reading ends with an error."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
