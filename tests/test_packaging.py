"""The wheel holds what an installation needs, and the version, the packages and the rooms agree."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("nio_hf", "recipes", "pyproject.toml", "setup.cfg", "README.md"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_template_and_recipe(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nio_hf").rglob("*.py")}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nio_hf" / "templates").iterdir()}
    recipes = {f"nio_hf/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert modules | templates | recipes | {"nio_hf/py.typed"} <= packed
    assert not [name for name in packed if name.startswith(("tests", "recipes"))]


def test_recipes_are_found_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import nio_hf.catalog as c; print(c.__file__, *c.recipe_names(), c.recipes_dir())"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert shown[0].startswith(str(tmp_path / "site"))
    assert "vit-tiny/digits/nio" in shown
    assert shown[-1] == str(tmp_path / "site" / "nio_hf" / "recipes")


def test_every_requirement_is_pinned_at_a_version_that_it_allows():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if requirement.name != "nio-hf":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_every_imported_package_is_declared():
    imported = set()
    for path in (ROOT / "nio_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    names |= {"annotated_types": "annotated-types", "ruamel": "ruamel.yaml"}
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["recipes"]]
    asked += PROJECT["optional-dependencies"]["report"]
    declared = {Requirement(text).name for text in asked} - {"nio-hf"}
    foreign = imported - set(sys.stdlib_module_names) - {"nio_hf"}
    # Imported only for models that it has partitioned.
    optional = {"deepspeed"}
    assert optional == {Requirement(text).name for text in PROJECT["optional-dependencies"]["deepspeed"]}
    assert {names.get(name, name) for name in foreign} - optional == declared


def test_the_version_is_the_same_everywhere():
    import nio_hf

    assert f"version: {nio_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {nio_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()
