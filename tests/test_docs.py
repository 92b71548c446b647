"""The documents are true: commands, paths, settings, tables and examples."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import nio_hf
from nio_hf import NIOConfig, NIOTrainingArguments
from nio_hf.catalog import find_recipe
from nio_hf.recipe.keys import known_keys
from tests.trainer.toys import ToyImages

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = {"resolved", "data", "num_processes", "config_file", "device", "private", "license", "revision"}
OWN_OPTIONS = {
    "compare": {"steps", "arms", "learning_rates", "seeds", "jobs", "warmup_ratios", "arm", "diagnostics"},
    "tune": {"steps", "probe_steps", "jobs"},
}
_FENCE = re.compile(r"```python\n(.*?)```(\n<!-- not run: .+ -->)?", flags=re.DOTALL)
EXAMPLES = {
    f"{name}-{number}": code
    for name, text in {"README.md": README, **PAGES}.items()
    for number, (code, reason) in enumerate(_FENCE.findall(text))
    if not reason
}
"""{place: example}; a comment behind an example that is not run says why."""


def test_the_readme_is_short():
    assert len(README) < 7000


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_exists_and_every_make_target_is_one(document):
    text = document.read_text()
    for path in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
        assert (document.parent / path).exists(), path
    for path in re.findall(r"`((?:benchmarks|nio_hf|recipes|tests)(?:/[\w.-]+)*)`", text):
        assert (ROOT / path).exists(), path
    rules = re.findall(r"^([a-z][a-z -]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", text)) <= targets


def test_every_recipe_and_setting_of_a_command_exists():
    lines = [line for text in (README, *PAGES.values()) for line in text.splitlines()]
    commands = [line for line in lines if "nio-hf " in line or "nio_hf.train " in line]
    assert len(commands) > 20
    for command in commands:
        for name in re.findall(r"[\w-]+/[\w-]+/[\w-]+(?= |$)", command.split(" --")[0]):
            find_recipe(name)
        for key in re.findall(r" --([a-z_]+)", command):
            options = next((own for name, own in OWN_OPTIONS.items() if f" {name} " in command), OPTIONS)
            assert key in known_keys() or key in options, command


def test_the_published_settings_are_those_that_the_page_names():
    sentence = PAGES["settings.md"].split("`NIOConfig.published()` sets ")[1].replace("\n", " ")
    published, default = vars(NIOConfig.published()), vars(NIOConfig())
    for name in (name for name in published if published[name] != default[name]):
        value = published[name]
        shown = rf"`?{value:g}`?" if isinstance(value, float) else rf"`{value}`"
        assert re.search(rf"`{name}` to {shown}", sentence)


def test_public_names_are_those_that_are_exported():
    for names in re.findall(r"from nio_hf import ([\w, ]+)", "\n".join((README, *PAGES.values()))):
        assert set(names.split(", ")) <= set(nio_hf.__all__)
    for name in nio_hf.__all__:
        assert getattr(nio_hf, name).__doc__


@pytest.fixture
def forgotten_accelerator():
    """The state that an example sets up for the process does not reach other tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _limited(**arguments):
    return NIOTrainingArguments(**{"max_steps": 1, "report_to": "none", **arguments}, use_cpu=True)


@pytest.mark.usefixtures("forgotten_accelerator")
@pytest.mark.parametrize("place", EXAMPLES)
def test_examples_run_as_they_stand(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page, _, number = place.rpartition("-")
    code = EXAMPLES[place].replace("NIOTrainingArguments(", "limited(")
    if "Accelerator()" in code:
        code = f"{EXAMPLES[f'{page}-{int(number) - 1}']}\n{code}"
    code = code.replace("image_size=32,", "image_size=32, num_hidden_layers=1, hidden_size=48, intermediate_size=96,")
    torch.manual_seed(0)
    names = {"train_dataset": ToyImages(400), "limited": _limited}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    if "Accelerator()" in code:
        optimized = {id(tensor) for group in names["optimizer"].param_groups for tensor in group["params"]}
        assert optimized == {id(tensor) for tensor in names["model"].parameters()}
        assert len(list(names["loader"])) == len(names["batches"])


def test_no_path_of_a_machine_and_no_registry_is_named():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(r"/" r"root/|/" r"home/\w|/" r"work/|pypi\.|download\.pytorch|files\.pythonhosted")
    for name in tracked.stdout.split():
        assert not forbidden.search((ROOT / name).read_text(errors="ignore")), name


def test_the_versions_are_those_that_are_allowed_and_tested():
    table = PAGES["quickstart.md"].split("| versions |")[1].split("\n\n")[0].splitlines()
    names, _, oldest, usual, _ = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    floors = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    for row, versions in ((oldest, floors), (usual, pins)):
        known = {name.replace("-", "_"): version.split(".")[:2] for name, version in versions.items()}
        assert [known[name] for name in names[:-1]] == [version.split(".") for version in row[1:-1]]
