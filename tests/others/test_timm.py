"""NIO on models of timm: plain, and in TimmWrapper of transformers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture(scope="module")
def found():
    paths = [str(ROOT)]
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        paths.append(str(HERE / "stand_ins"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.others.timm_run"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["plain", "wrapped"])
def test_the_trainer_tells_tensors_apart_initialises_and_trains(found, name):
    kinds, scales = found[name]["kinds"], found[name]["scales"]
    assert kinds["blocks.0.attn.qkv.weight"] == kinds["blocks.1.mlp.fc2.weight"] == "trunk"
    assert kinds["pos_embed"] == kinds["cls_token"] == "additive"
    assert kinds["patch_embed.proj.weight"] == "input"
    assert kinds["head.weight"] == "head"
    assert scales["blocks.0.attn.qkv.weight"] == scales["head.weight"] > 1
    assert scales["pos_embed"] >= scales["head.weight"]
    assert found[name]["is_applied"]
    assert 0 < found[name]["loss"] < 100


def test_transformers_draws_the_weights_of_timm_anew(found):
    spread = found["spread"]
    assert spread["transformers"] == pytest.approx(0.02, rel=0.05)
    assert spread["timm"] > 2 * spread["transformers"]
