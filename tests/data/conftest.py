"""What every test of data sets of any kind starts from."""

from tests.vision.conftest import given_up_files, heard_logger, prompt_ends

__all__ = ["given_up_files", "heard_logger", "prompt_ends"]
