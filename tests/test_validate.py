"""`nio-hf validate`: recipes that pass, recipes that fail, and the checks with data."""

import huggingface_hub
import pytest
from typer.testing import CliRunner

from nio_hf.cli.main import app
from nio_hf.errors import MetricError
from nio_hf.recipe.loading import load_recipe
from nio_hf.validate import consistency_notes, consistency_problems, validate_recipe
from tests.tasks.recipes import make_folder, write_recipe

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


def test_recipes_that_pass_and_recipes_that_do_not_are_all_reported(tmp_path):
    wrong = tmp_path / "no_warmup.yaml"
    wrong.write_text("base: vit-tiny/digits/warmup\nnio: false\nwarmup_steps: 5\n")
    names = ["vit-tiny/digits/nio", str(wrong), "vit-tiny/nowhere/nio", "swin-tiny/imagenet-1k/warmup"]
    shown = RUNNER.invoke(app, ["validate", *names, "--num_processes", "8"], env={"COLUMNS": "300"})
    assert shown.exit_code == 1
    steps = "512 samples a step: 8 processes x 64 x 1"
    assert f"ok  vit-tiny/digits/nio  ViTForImageClassification; {steps}" in shown.output
    assert "Note: 4 sub-batches on 8 processes: 4 of them are idle." in shown.output
    assert f"no  {wrong}" in shown.output
    assert "5 in a recipe without warmup. Set warmup_steps: 0." in shown.output
    assert "no  vit-tiny/nowhere/nio" in shown.output
    assert "1024 samples a step: 8 processes x 128 x 1 accumulated" in shown.output
    assert RUNNER.invoke(app, ["validate", names[0], names[3], "--nio_lr", "0.1"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["validate"], 2, "Missing argument"),
        (["validate", "--seed", "1"], 2, "no recipe. Name one, or the path of a YAML file"),
        (["validate", "vit-tiny/digits/nio", "--sede", "1"], 1, "Did you mean 'seed'?"),
        (["validate", "vit-tiny/digits/nio", "--use_cpu"], 0, "ok"),
        (["validate", "vit-base/imagenet-1k/nio", "--num_processes", "3"], 1, "1024 is no multiple of 128 samples on"),
        (["validate", "vit-base/imagenet-1k/nio", "--model_config.hidden_act", "relux"], 1, "no model can be built"),
        (["validate", "vit-tiny/digits/nio", "--no_weight_decay", "[foo]"], 1, "has no parameter 'foo'"),
        (["validate", "vit-tiny/digits/nio", "--model_type", "efficientnet", "--image_size", "8"], 1, "image_size"),
    ],
)
def test_the_exit_status_says_whether_all_is_well(arguments, status, message):
    shown = RUNNER.invoke(app, arguments, env={"COLUMNS": "300"})
    assert shown.exit_code == status, shown.output
    assert message in shown.output


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_with_data_a_batch_is_read_nio_run_and_nothing_kept(streaming, images, tmp_path):
    recipe = write_recipe(tmp_path, images)
    found = validate_recipe(recipe, ["--streaming", streaming, "--output_dir", str(tmp_path / "mine")], with_data=True)
    assert found.error is None, str(found.error)
    assert "8 images of 16x16 read" in found.summary
    images = "a stream of images" if streaming == "true" else "36 images"
    assert f"3 classes, {images} to train on, {images} to evaluate on" in found.summary
    assert "a short run of NIO: GradCosine" in found.summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("options", "run"),
    [
        (["--nio", "false", "--nio_batch_size", "64"], None),
        (["--nio_method", "gradinit"], "GradInit"),
        (["--nio_search", "published"], "NIO"),
    ],
)
def test_with_data_the_method_of_the_recipe_runs(options, run, images, tmp_path):
    found = validate_recipe(write_recipe(tmp_path, images), options, with_data=True)
    assert found.error is None, str(found.error)
    assert (f"a short run of {run}: GradCosine" in found.summary) == (run is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data_dir", "nowhere"], "data_dir: 'nowhere' cannot be loaded as 'imagefolder'"),
        (["--nio_batch_size", "64"], "train_dataset: 36 samples for 1 report batches of 64"),
        (["--report_to", "nowhere"], "nowhere is not supported"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint: 'nowhere' is no folder"),
        (["--nio_seed_optimizer", "gi_adam", "--optim", "sgd"], "nio_seed_optimizer: given with SGD"),
        (["--output_dir", "/dev/null/run"], "/dev/null"),
        (["--push_to_hub", "me/mine"], "me/mine: "),
        (
            ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "64"],
            "dataloader_drop_last: true, and 36 images fill no batch of 64",
        ),
        (["--streaming", "true", "--nio_batch_size", "64"], "batches: 0 batches, of which 1 are to be reported on"),
    ],
)
def test_what_training_refuses_before_it_starts_is_an_error_of_that_recipe(
    options, message, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = validate_recipe(write_recipe(tmp_path, images), options, with_data=True)
    assert message in str(found.error)


def test_a_metric_that_no_evaluation_has_is_refused_before_a_training_is_paid(images, tmp_path):
    options = ["--load_best_model_at_end", "true", "--save_strategy", "epoch", "--eval_strategy", "epoch"]
    recipe = write_recipe(tmp_path, images)
    found = validate_recipe(recipe, [*options, "--metric_for_best_model", "acuracy"], with_data=True)
    assert isinstance(found.error, MetricError)
    assert "metric_for_best_model: 'acuracy', and evaluations have accuracy, loss, " in str(found.error)
    assert validate_recipe(recipe, [*options, "--metric_for_best_model", "accuracy"], with_data=True).error is None


def _load(folder, text, name):
    minimal = "model_type: vit\nmodel_config: {image_size: 8, patch_size: 2}\n"
    (folder / f"{name}.yaml").write_text(minimal + text)
    return load_recipe(str(folder / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "text", "messages"),
    [
        ("nio", "warmup_steps: 10\n", ["10 in a recipe without warmup. Set warmup_steps: 0"]),
        (
            "no_warmup",
            "warmup_steps: 0.1",
            ["0.1 in a recipe without", "true in no_warmup.yaml. Set nio: false"],
        ),
        ("warmup", "nio: false\n", ["0 in a recipe with warmup"]),
        ("nio", "nio: false\n", ["false in nio.yaml. Set nio: true"]),
        ("nio", "", []),
        ("mine", "warmup_steps: 10\n", []),
    ],
)
def test_a_recipe_is_what_its_name_claims(name, text, messages, tmp_path):
    found = list(consistency_problems(_load(tmp_path, text, name)))
    assert len(found) == len(messages)
    for problem, message in zip(found, messages, strict=True):
        assert message in str(problem)


def test_what_works_but_may_not_be_meant_is_noted(tmp_path):
    recipe = _load(tmp_path, "nio_sub_batches: 4\n", "mine")
    assert list(consistency_notes(recipe, 1)) == []
    for processes, message in ((3, "some of them wait"), (8, "4 of them are idle")):
        (note,) = consistency_notes(recipe, processes)
        assert f"4 sub-batches on {processes} processes: {message}" in note
