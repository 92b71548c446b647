"""The public names, and what importing them loads."""

import subprocess
import sys

import pytest

import nio_hf


def _modules_after(code):
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_package_loads_nothing_until_a_name_is_used():
    assert not {"torch", "transformers", "datasets", "matplotlib"} & _modules_after("import nio_hf")


def test_the_core_loads_torch_and_no_hugging_face_library():
    loaded = _modules_after("from nio_hf import GradCosine, NIOConfig, NIOResult, grad_cosine, initialize")
    assert "torch" in loaded
    assert not {"transformers", "accelerate", "datasets", "evaluate", "matplotlib"} & loaded


def test_names_are_sorted_listed_and_nothing_else_is_there():
    assert nio_hf.__all__ == sorted(nio_hf.__all__)
    assert set(nio_hf.__all__) <= set(dir(nio_hf))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = nio_hf.Trainer
