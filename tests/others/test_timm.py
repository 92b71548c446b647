"""NIO on models of timm: plain, and in TimmWrapper of transformers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture(scope="module")
def found():
    paths = [str(HERE.parent.parent)]
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        paths.append(str(HERE / "stand_ins"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.others.timm_run"]
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", ["plain", "wrapped"])
def test_tensors_are_told_apart_with_fused_queries_keys_and_values(found, name):
    kinds = found[name]["kinds"]
    assert kinds["blocks.0.attn.qkv.weight"] == kinds["blocks.1.mlp.fc2.weight"] == "trunk"
    assert kinds["pos_embed"] == kinds["cls_token"] == "additive"
    assert kinds["patch_embed.proj.weight"] == "input"
    assert kinds["head.weight"] == "head"


@pytest.mark.parametrize("name", ["plain", "wrapped"])
def test_the_trainer_initialises_and_trains(found, name):
    scales = found[name]["scales"]
    assert scales["blocks.0.attn.qkv.weight"] == scales["head.weight"] > 1
    assert scales["pos_embed"] >= scales["head.weight"]
    assert found[name]["is_applied"]
    assert 0 < found[name]["loss"] < 100


def test_transformers_draws_the_weights_of_timm_anew(found):
    spread = found["spread"]
    assert spread["transformers"] == pytest.approx(0.02, rel=0.05)
    assert spread["timm"] > 2 * spread["transformers"]
