"""The files in which a run describes itself, and their readers."""

import json
import shutil

import pytest
from transformers import EarlyStoppingCallback

from nio_hf.core import GradientInspection
from nio_hf.durable.manifest import write_manifest
from nio_hf.errors import CheckpointError
from nio_hf.hub.run_folder import (
    INSPECTION_DIR_NAME,
    INSPECTION_NAME,
    RUN_NAME,
    STATE_NAME,
    changed_arguments,
    final_metrics,
    inspection_json,
    model_folder,
    read_run,
    shareable,
    shareable_run,
)
from nio_hf.report import draw_run
from nio_hf.report.run import Facts, Run
from tests.trainer.toys import ToyImages, arguments, build, load_state, trained

EVALUATED = [
    {"step": 1, "eval_loss": 0.5, "eval_accuracy": 0.9, "eval_runtime": 1.0},
    {"step": 2, "eval_loss": 0.7, "eval_accuracy": 0.8, "eval_runtime": 1.0},
]


def saved(output_dir, **given):
    """A trainer that has trained and saved what it has."""
    trainer = trained(output_dir, **given)
    trainer.save_model()
    trainer.save_state()
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a training with checkpoints, which was saved and inspected at its end."""
    output_dir = tmp_path_factory.mktemp("run")
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
    inspection = saved(output_dir, nio_search="published", nio_iterations=5, **saving).inspect()
    (output_dir / INSPECTION_DIR_NAME).mkdir()
    (output_dir / INSPECTION_DIR_NAME / INSPECTION_NAME).write_text(inspection_json(inspection, 3))
    return output_dir


def test_a_trained_run(folder):
    run = read_run(folder)
    assert (run.steps, run.max_steps, run.is_trained, run.is_finished) == (3, 3, True, True)
    assert run.result is not None
    assert len(run.result.history) == 5
    assert (run.facts.model, run.facts.model_type, run.facts.classes) == ("ViTForImageClassification", "vit", 5)
    assert run.facts.parameters == sum(parameter.numel() for parameter in build("vit").parameters())
    assert run.facts.arguments["learning_rate"] == 1e-3
    assert "train_runtime" in run.metrics
    assert run.nio_share is not None
    assert 0 < run.nio_share < 1
    assert isinstance(run.inspection, GradientInspection)
    assert run.versions["nio_hf"]


def test_an_initialised_checkpoint_and_a_checkpoint(folder):
    initialised, checkpoint = read_run(folder / "_nio_init"), read_run(folder / "checkpoint-2")
    assert (initialised.steps, initialised.is_trained, initialised.metrics) == (0, False, {})
    assert (checkpoint.steps, checkpoint.max_steps, checkpoint.is_finished) == (2, 3, False)
    assert initialised.result == checkpoint.result


def test_of_an_interrupted_training_it_is_the_last_checkpoint(folder, tmp_path):
    for name in ("checkpoint-1", "checkpoint-2", "_nio_init"):
        shutil.copytree(folder / name, tmp_path / name)
    assert read_run(tmp_path).steps == 2
    assert model_folder(tmp_path) == tmp_path / "checkpoint-2"
    with (tmp_path / "checkpoint-2" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert model_folder(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(CheckpointError, match=r"model.safetensors has 1,000 bytes, not [\d,]+\. Give a checkpoint"):
        model_folder(tmp_path / "checkpoint-2")
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(tmp_path / name)
    assert read_run(tmp_path).steps == 0


@pytest.mark.parametrize("way", ["trained", "resumed", "without NIO"])
def test_a_training_from_an_initialised_checkpoint_knows_it_and_is_not_marked_as_one(way, folder, tmp_path):
    model = type(build("vit")).from_pretrained(folder / "_nio_init")
    resume = str(folder / "checkpoint-3") if way == "resumed" else None
    saved(tmp_path, resume=resume, model=model, nio=way != "without NIO", max_steps=4)
    assert "nio" in json.loads((folder / "_nio_init" / "config.json").read_text())
    assert "nio" not in json.loads((tmp_path / "config.json").read_text())
    if way == "trained":
        run = read_run(tmp_path)
        assert run.result == read_run(folder).result
        assert run.facts.started_from is None, "the path of a machine says nothing elsewhere"


@pytest.mark.parametrize(
    ("history", "step", "loss"),
    [
        ([*EVALUATED, {"step": 2, "train_runtime": 3.0}], 2, 0.7),
        ([*EVALUATED, {"step": 2, "train_runtime": 3.0}], 1, 0.5),
        ([*EVALUATED, {"step": 2, "train_runtime": 3.0}, {"step": 2, "eval_loss": 0.4}], 2, 0.4),
        (EVALUATED, 2, 0.7),
        (EVALUATED, 3, None),
    ],
)
def test_the_metrics_are_those_of_the_weights(history, step, loss):
    assert final_metrics(history, step).get("eval_loss") == loss


def test_of_a_training_that_keeps_its_best_the_metrics_are_those_of_the_best(tmp_path):
    evaluating = {"max_steps": 5, "learning_rate": 1.0, "eval_strategy": "steps", "eval_steps": 1}
    keeping = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    stopping = {"eval_dataset": ToyImages(), "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}
    saved(tmp_path, nio=False, **evaluating, **keeping, **stopping)
    run = read_run(tmp_path)
    assert run.is_finished
    losses = {entry["step"]: entry["eval_loss"] for entry in run.log_history if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert run.kept_step == best < run.steps < run.max_steps
    assert run.metrics["eval_loss"] == losses[best]
    last = read_run(tmp_path / f"checkpoint-{run.steps}")
    assert last.metrics["eval_loss"] == losses[run.steps]
    assert (last.kept_step, last.is_finished) == (None, False)


def test_the_seconds_are_those_of_all_sessions(folder, tmp_path):
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    file = tmp_path / "checkpoint-2" / RUN_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "training_seconds": 1000.0}))
    write_manifest(tmp_path / "checkpoint-2")
    for _ in range(2):
        saved(tmp_path, resume=True, save_strategy="steps", save_steps=1, max_steps=3)
        run = read_run(tmp_path)
        assert 1000 < run.metrics["train_runtime"] < 1200
        assert run.nio_share is not None
        assert run.nio_share < 0.1
    assert run.result == read_run(folder).result, "the initialisation is that of the first session"


def test_nothing_is_left_of_an_earlier_run_in_the_same_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    draw_run(read_run(tmp_path), tmp_path / "plots")
    own = {name: tmp_path / name for name in ("recipe.yaml", "README.md", "report.html")}
    for file in own.values():
        file.write_text("mine")
    saved(tmp_path, nio=False).create_model_card()
    assert all(file.read_text() == "mine" for file in own.values())
    run = read_run(tmp_path)
    assert (run.result, run.inspection, run.nio_share, run.steps) == (None, None, None, 2)
    assert [path.name for path in draw_run(run, tmp_path / "plots").values()] == ["training.png"]
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["training.png"]


def test_no_token_and_no_path_is_written(tmp_path):
    told = {"hub_token": "hf_secret", "hub_model_id": "user/model", "run_name": "mine", "nio_lr": 0.5}
    changed = changed_arguments(arguments(tmp_path, **told))
    assert changed["nio_lr"] == 0.5
    assert "hf_secret" not in str(changed)
    assert not {"hub_token", "output_dir", "run_name", "report_to"} & changed.keys()


def test_folders_that_hold_nothing(tmp_path):
    for read in (read_run, model_folder):
        with pytest.raises(CheckpointError, match=r"no (run|model) in it\. Give an output_dir"):
            read(tmp_path)
        with pytest.raises(CheckpointError, match="no such folder"):
            read(tmp_path / "nowhere")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="a file, not a folder"):
            read(tmp_path / "file")
        (tmp_path / "file").unlink()
    (tmp_path / "run-0").mkdir()
    with pytest.raises(CheckpointError, match="no run in it, but trials of a search: run-0"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"format": 1, "facts": {"model": "A", "new": 1}}', '{"format": 1}', "[]"])
def test_a_file_that_is_not_ours_is_named(tmp_path, text):
    (tmp_path / RUN_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_run(tmp_path)


@pytest.mark.parametrize("content", [None, "not json", "{}", "[]"])
def test_a_state_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=STATE_NAME):
        load_state(tmp_path)


def test_a_state_of_another_version_is_refused_with_its_format_and_former_settings(tmp_path):
    config = {"iterations": 20, "holdout_batches": 4, "scale_sharing": "all", "max_loss_rise": 0.1, "lr": 0.05}
    former = "with settings of a former version: nio_holdout_batches, nio_scale_sharing, nio_max_loss_rise"
    for state, found in (
        ({"format": 99}, "format 99, known is 3"),
        ({"format": 1, "task": {}, "result": {"config": config}}, f"format 1, known is 3, {former}"),
    ):
        (tmp_path / STATE_NAME).write_text(json.dumps(state))
        with pytest.raises(CheckpointError) as raised:
            load_state(tmp_path)
        fix = "Initialise again, or use the nio_hf version that wrote it"
        assert str(raised.value) == f"{tmp_path / STATE_NAME}: {found}. {fix}."


def test_paths_of_the_machine_are_cut_to_their_names():
    given = {"a": "/data/mine/images", "b": ["/x/y.parquet", "relative/z"], "c": {"d": "/e/*.png"}, "f": 3, "g": "/"}
    assert shareable(given) == {"a": "images", "b": ["y.parquet", "relative/z"], "c": {"d": "*.png"}, "f": 3, "g": "/"}
    facts = Facts("Net", dataset="/data/birds", arguments={"deepspeed": "/etc/zero.json", "seed": 3})
    run = shareable_run(Run("run", facts, recipe="data_dir: /data/birds\nlearning_rate: 0.001\n"))
    assert (run.facts.dataset, run.facts.arguments) == ("birds", {"deepspeed": "zero.json", "seed": 3})
    assert run.recipe == "data_dir: birds\nlearning_rate: 0.001\n"
