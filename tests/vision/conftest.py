"""Fixtures of all tests of this folder."""

from tests.data.conftest import given_up_files, prompt_ends  # noqa: F401
