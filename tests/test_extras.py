"""The core installation initialises and trains a user's model; parts that need an extra name it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nio_hf import errors, extras

ROOT = Path(__file__).parent.parent

CORE_ONLY = """
import importlib.metadata, sys
from nio_hf.extras import EXTRAS
absent = {*EXTRAS["recipes"], "pandas", "pyarrow", "dill", "multiprocess"}
absent -= {"filelock", "annotated_types", "pydantic"}  # torch and DeepSpeed bring them
sys.modules.update(dict.fromkeys(absent))
known = importlib.metadata.version
def version(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
"""
TRAIN = """
import logging, torch
from nio_hf import NIOTrainer, NIOTrainingArguments
from tests.trainer.toys import ToyImages, vision_model
logging.basicConfig(level=logging.INFO)
args = NIOTrainingArguments(
    output_dir=sys.argv[1], max_steps=2, save_steps=1, nio_batch_size=8, nio_report_batches=1, report_to=[],
    use_cpu=True, disable_tqdm=True,
)
trainer = NIOTrainer(vision_model("vit"), args, train_dataset=ToyImages())
trainer.train()
trainer.create_model_card()
trainer.train(resume_from_checkpoint="auto")
print(trainer.nio_result.status)
"""


def _run(code, *arguments):
    command = [sys.executable, "-c", CORE_ONLY + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_the_core_install_initialises_trains_resumes_and_writes_a_card(tmp_path):
    done = _run(TRAIN, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] in ("applied", "improved", "unchanged", "changed")
    assert "The card has no plots. Install what they need: pip install 'nio-hf[report]'" in done.stderr
    assert "## What NIO did" in (tmp_path / "README.md").read_text()


def test_commands_that_need_recipes_name_the_extra_and_the_catalogue_needs_none():
    done = _run("""
from nio_hf.cli.main import main
for name in ("train", "init", "compare", "tune", "validate", "inspect"):
    sys.argv = ["nio-hf", name, "vit-tiny/digits/nio"]
    try:
        main()
    except SystemExit as end:
        print(f"{name}: {end}")
sys.argv = ["nio-hf", "recipes"]
main()
""")
    assert done.returncode == 0, done.stderr
    refused, catalogue = done.stdout.splitlines()[:6], done.stdout.splitlines()[6:]
    assert "vit-tiny/digits/nio" in "".join(catalogue)
    for line in refused:
        assert "sklearn not installed. Install what they need: pip install 'nio-hf[recipes]'." in line


def test_plots_name_their_extra(monkeypatch, tmp_path):
    from nio_hf.report.style import figure

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r"^Plots: matplotlib not installed\. .*'nio-hf\[report\]'"
    with pytest.raises(errors.MissingExtraError, match=message), figure(tmp_path / "plot.png", 1, 1):
        pass
    assert issubclass(errors.MissingExtraError, ImportError)


def test_every_module_of_an_extra_is_brought_by_its_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = {"annotated_types": "annotated-types", "PIL": "pillow", "sklearn": "scikit-learn"}
    for name, modules in extras.EXTRAS.items():
        asked = [text.split(">=")[0] for text in project[name] + project["report"]]
        assert {distributions.get(module, module) for module in modules} == set(asked) - {"nio-hf[report]"}
