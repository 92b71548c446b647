"""What every test of the texts starts from."""

from tests.vision.conftest import given_up_files, heard_logger, prompt_ends

__all__ = ["given_up_files", "heard_logger", "prompt_ends"]
