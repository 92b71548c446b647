"""What every test of this folder starts from."""

from tests.data.conftest import given_up_files, prompt_ends

__all__ = ["given_up_files", "prompt_ends"]
