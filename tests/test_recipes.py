"""Every recipe that comes with the package."""

import functools
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from nio_hf.catalog import accelerate_config_names, describe, find_accelerate_config, recipe_names, recipes_dir
from nio_hf.recipe.keys import known_keys
from nio_hf.recipe.loading import load_recipe
from nio_hf.tasks import task_of
from nio_hf.tasks.image_classification import build_model
from nio_hf.validate import validate_recipe

NAMES = recipe_names()
CLASSES = {"imagenet-1k": 1000, "cifar10": 10, "cifar100": 100, "imagenette": 10, "imagefolder": 10, "digits": 10}
MODELS = {
    "imagenet-1k": {"vit-tiny", "vit-small", "vit-base", "swin-tiny", "swin-small", "swin-base", "resnet-50"},
    "cifar10": {"vit-tiny", "swin-tiny", "resnet-18"},
    "cifar100": {"vit-tiny", "swin-tiny", "resnet-18"},
    "imagenette": {"vit-small", "swin-tiny"},
    "imagefolder": {"vit-small", "swin-tiny"},
    "digits": {"vit-tiny"},
    "stdlib": {"gpt2-tiny", "bert-tiny"},
    "wikitext-103": {"gpt2-small", "gpt2-medium", "bert-base", "llama-small"},
    "fineweb-edu": {"gpt2-small", "gpt2-medium", "bert-base", "llama-small"},
}
PUBLISHED = {
    # The sizes of the papers, in millions: DeiT (arXiv 2012.12877), table 1; Swin (arXiv 2103.14030), table 1;
    # ResNet-50 of torchvision.
    "vit-tiny": 5, "vit-small": 22, "vit-base": 86, "swin-tiny": 29, "swin-small": 50, "swin-base": 88,
    "resnet-50": 25.6,
    # GPT-2: its release; BERT: arXiv 1810.04805, section 3, which counts the layer of the next sentence.
    "gpt2-small": 124, "gpt2-medium": 355, "bert-base": 110,
}  # fmt: skip
NUMBER = re.compile(r"\s*[\w]+: *[\[{\d]")


@functools.cache
def load(name):
    return load_recipe(name, ["--use_cpu", "true"])


def header(name):
    """The first comment of a recipe, with commands that go over several lines in one."""
    text = (recipes_dir() / f"{name}.yaml").read_text().split("\n\n")[0]
    return re.sub(r" \\\n#\s+", " ", text)


def test_the_tree_holds_every_model_data_set_and_variant_and_nothing_else():
    roots = [f"{model}/{dataset}" for dataset, models in MODELS.items() for model in models]
    wanted = {f"{root}/{variant}" for root in roots for variant in ("nio", "warmup", "no_warmup")}
    files = {path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in recipes_dir().rglob("*.yaml")}
    assert set(NAMES) == wanted
    assert files == wanted | {f"accelerate_configs/{name}" for name in accelerate_config_names()}


@pytest.mark.parametrize("name", NAMES)
def test_it_validates_and_builds_its_model_with_the_parameters_of_its_header(name):
    validation = validate_recipe(name)
    assert validation.error is None, str(validation.error)
    recipe = load(name)
    assert recipe.training.output_dir == f"outputs/{name.replace('/', '-')}"
    classes = [str(number) for number in range(CLASSES.get(name.split("/")[1], 0))]
    with torch.device("meta"):
        model = build_model(recipe.model, tuple(classes)) if classes else task_of(recipe).build_model(recipe)
    stated = re.search(r"^# Parameters: ([\d,]+) \(.+\)$", header(name), flags=re.MULTILINE)
    assert int(stated[1].replace(",", "")) == model.num_parameters()
    model_name, dataset, _ = name.split("/")
    if model_name in PUBLISHED and (dataset == "imagenet-1k" or not classes):
        # Papers round: 28.3 million is "29 M" in the one of Swin, 5.7 million "5 M" in that of DeiT.
        assert abs(model.num_parameters() / 1e6 - PUBLISHED[model_name]) < 1
        assert "published" in stated[0]


@pytest.mark.parametrize("name", NAMES)
def test_its_header_says_what_it_is_and_how_it_is_run(name):
    text = header(name)
    assert 20 < len(describe(name)) <= 100
    assert "# Prerequisites: " in text
    commands = re.findall(r"^#   (.+)$", text, flags=re.MULTILINE)
    assert f"nio-hf train {name}" in commands
    assert any(re.fullmatch(rf"nio-hf train {name} --\w+.+", command) for command in commands)
    launch = [command for command in commands if command.startswith("accelerate launch ")]
    assert all(command.endswith(f"-m nio_hf.train {name}") for command in launch)
    assert launch
    for command in commands:
        for key in re.findall(r" --([a-z_]+)", command.partition(" -m ")[2] or command):
            assert key in known_keys(), command
        for file in re.findall(r"--config_file (\S+)", command):
            assert (recipes_dir().parent / file).is_file() or Path(file).name in accelerate_config_names()


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("/warmup")])
def test_every_number_of_a_published_training_has_its_source(name):
    path = recipes_dir() / f"{name}.yaml"
    section, bare = "", []
    for line in path.read_text().splitlines():
        if line.startswith("#") or not line:
            section = line or section
        elif NUMBER.match(line) and "#" not in line and not line.startswith("seed"):
            bare.append((line, section))
    # Where a whole section is our own choice or one paper's, its comment says so once.
    unsourced = [line for line, comment in bare if not re.search(r"our choice|arXiv|Lee|[Dd]igits|sizes", comment)]
    assert unsourced == [], name


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("/warmup")])
def test_variants_differ_from_the_published_training_in_what_they_are_named_after(name):
    root, variant = name.rsplit("/", 1)
    settings = {key: setting.value for key, setting in load(name).settings.items()}
    published = load(f"{root}/warmup").settings
    changed = {key for key in settings if key not in published or settings[key] != published[key].value}
    allowed = {"warmup_steps", "output_dir"} | ({"nio"} if variant == "nio" else set())
    assert {key for key in changed if not (variant == "nio" and key.startswith("nio_"))} == allowed
    assert settings["warmup_steps"] == 0


@pytest.mark.parametrize("name", accelerate_config_names())
def test_configurations_of_accelerate_can_be_read_and_do_not_warm_up(name):
    path = find_accelerate_config(name)
    config = load_config_from_file(str(path))
    processes = {"cpu": 1, "one_gpu": 1}
    assert config.num_processes == processes.get(name, config.num_processes)
    assert config.use_cpu == name.endswith("cpu")
    assert config.mixed_precision == "no"
    assert "scheduler" not in (getattr(config, "deepspeed_config", None) or {})
    text = re.sub(r" \\\n#\s+", " ", path.read_text())
    launched = re.search(r"accelerate launch .*-m nio_hf\.train (\S+)(.*)", text)
    recipe = load_recipe(launched[1], [*launched[2].replace("--use_cpu true", "").split(), "--use_cpu", "true"][-2:])
    sharded = config.distributed_type in ("FSDP", "DEEPSPEED")
    assert not (sharded and recipe.optimization.ema_decay), "averages of sharded weights are refused"
    assert text.startswith("# ")
