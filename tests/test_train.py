"""`nio_hf.train`: a recipe from its command line to its files."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from nio_hf.recipe.loading import load_recipe
from nio_hf.train import build_trainer, initialise, main, train
from tests.trainer.toys import load_state

QUICK = ["--max_steps", "4", "--logging_steps", "2", "--eval_strategy", "no"]
SMALL = ["--model_config.num_hidden_layers", "1", "--nio_batch_size", "16", "--disable_tqdm", "--use_cpu"]


def _options(output_dir):
    return ["--output_dir", str(output_dir), *QUICK, *SMALL]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The output of a shortened run of the default recipe, through its own module."""
    output_dir = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "nio_hf.train", "vit-tiny/digits/nio", *_options(output_dir)]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert finished.returncode == 0, finished.stderr
    (output_dir / "stdout.txt").write_text(finished.stdout)
    (output_dir / "stderr.txt").write_text(finished.stderr)
    return output_dir


def test_it_ends_with_a_table_and_the_paths_of_what_it_wrote_and_warns_of_nothing(digits_run):
    shown = (digits_run / "stdout.txt").read_text()
    quantities = ["GradCosine (D = 4, B/D = 4)", "Gradient norm", "Loss at init", "Evaluation accuracy"]
    for quantity in [*quantities, "Seconds of NIO", "Seconds of training", "Initialisation: "]:
        assert quantity in shown
    for path in ["_nio_init", "plots/nio_scales.png", "plots/nio_history.png", "plots/training.png"]:
        assert str(digits_run / path) in shown
        assert (digits_run / path).exists()
    shown += (digits_run / "stderr.txt").read_text()
    assert "Warning" not in shown
    assert "Error" not in shown


def test_the_initialised_checkpoint_is_whole_and_metrics_and_state_are_saved(digits_run):
    init = digits_run / "_nio_init"
    model = AutoModelForImageClassification.from_pretrained(init, dtype=torch.float32)
    assert model.config.id2label[3] == "3"
    assert AutoImageProcessor.from_pretrained(init, backend="pil").size["height"] == 8
    result = load_state(init)
    assert [record.iteration for record in result.history] == list(range(1, len(result.history) + 1))
    assert result.history[-1].outcome == "accepted"
    # Where they are accepted, the measurement of the scales is the report after.
    assert result.cost == pytest.approx(4 + sum(record.cost for record in result.history)), "the report before"
    results = json.loads((digits_run / "all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    state = json.loads((digits_run / "trainer_state.json").read_text())
    logged = [entry["nio_loss"] for entry in state["log_history"] if "nio_iteration" in entry]
    assert logged == [record.loss for record in result.history]
    assert AutoModelForImageClassification.from_pretrained(digits_run).num_parameters() > 0


def test_an_initialised_checkpoint_is_trained_without_nio(digits_run, tmp_path):
    options = [*QUICK, "--nio_batch_size", "16", "--disable_tqdm", "--use_cpu", "--output_dir", str(tmp_path)]
    recipe = load_recipe("vit-tiny/digits/nio", [*options, "--model_name_or_path", str(digits_run / "_nio_init")])
    run = train(recipe)
    assert run.result is not None, "what was done to the model that it starts from"
    assert "Initialised checkpoint" not in run.files
    assert run.metrics["eval_accuracy"] > 0
    assert not (tmp_path / "_nio_init").exists()


def test_init_saves_and_does_not_train(tmp_path):
    run, again = (initialise(load_recipe("vit-tiny/digits/nio", _options(tmp_path))) for _ in range(2))
    assert run.metrics == {}
    assert set(run.files) == {"Initialised checkpoint", "Plot of the scales", "Plot of NIO by iteration"}
    assert not (tmp_path / "model.safetensors").exists()
    assert run.result.scales == again.result.scales, "a run over the output of another replaces it"
    assert load_state(tmp_path / "_nio_init").after == again.result.after


def test_a_training_that_diverges_fails_after_all_is_written(tmp_path, capsys):
    options = [*_options(tmp_path), "--nio", "false", "--max_grad_norm", "0", "--learning_rate", "1e38"]
    assert main(["vit-tiny/digits/nio", *options]) == 1
    shown = capsys.readouterr()
    assert "NumericsError: the training: diverged: its loss is not finite. Lower learning_rate." in shown.err
    assert f"Trained model: {tmp_path}" in shown.out
    assert (tmp_path / "all_results.json").exists()


def test_the_same_seed_gives_the_same_model_and_another_another(tmp_path):
    def weights(seed):
        trainer = build_trainer(load_recipe("vit-tiny/digits/nio", [*_options(tmp_path), "--seed", str(seed)]))
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["missing.yaml"], 2, "RecipeError: missing.yaml: no such recipe file"),
        (["--nio_gama", "3"], 2, "Did you mean 'nio_gamma'?"),
        (["--nio_sub_batches", "1"], 2, "--nio_sub_batches: 1. Give a whole number of at least 2."),
        (["--nio_batch_size", "2048", "--use_cpu"], 1, "DataError: train_dataset: 1437 samples for 4 report batches"),
        (["--model_name_or_path", "no/such/place"], 1, "ModelError: model_name_or_path: 'no/such/place'"),
        (["--output_dir", "/dev/null/run"], 1, "OutputError: /dev/null/run"),
        (["--resume_from_checkpoint", "nowhere"], 1, "CheckpointError: resume_from_checkpoint: 'nowhere' is no folder"),
        (["--report_to", "foo"], 2, "ConfigError"),
    ],
)
def test_user_errors_are_messages_with_an_exit_status(arguments, status, message, tmp_path, capsys):
    output = [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path)]
    assert main([*arguments, *output]) == status
    assert message in " ".join(capsys.readouterr().err.split())


def test_one_process_of_a_launch_reports_what_is_wrong_with_the_settings(monkeypatch, capsys):
    for rank, reports in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(["--nio_gama", "3"]) == 2
        assert ("Did you mean 'nio_gamma'?" in capsys.readouterr().err) == reports


def test_an_interrupt_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("nio_hf.train.build_trainer", interrupted)
    assert main(["--output_dir", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_checkpoint_with_other_classes_is_refused(digits_run, tmp_path, capsys):
    three = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = AutoModelForImageClassification.from_pretrained(digits_run / "_nio_init", **three)
    model.save_pretrained(tmp_path / "three")
    AutoImageProcessor.from_pretrained(digits_run, backend="pil").save_pretrained(tmp_path / "three")
    options = ["--model_name_or_path", str(tmp_path / "three"), "--output_dir", str(tmp_path / "out")]
    assert main(options) == 1
    assert "has 3 classes, the data set 10" in " ".join(capsys.readouterr().err.split())
