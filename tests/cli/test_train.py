"""Launch options of `nio-hf train`, and a training in two processes that equals the one in one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nio_hf.catalog import recipes_dir
from nio_hf.cli.main import app
from nio_hf.errors import RecipeError
from nio_hf.launch import launch, launch_command
from tests.tasks.recipes import make_folder, write_recipe
from tests.trainer.toys import load_state

RUNNER = CliRunner()


def test_launch_options_wrap_accelerate_launch_and_all_else_is_the_recipes(monkeypatch):
    calls = []
    monkeypatch.setattr("nio_hf.launch.launch", lambda *call: calls.append(call) or 7)
    options = ["--gradient_accumulation_steps", "2", "--seed=1"]
    arguments = ["vit-tiny/digits/nio", "--num_processes", "2", *options, "--gpu-ids", "0,1", "--config_file", "cpu"]
    assert RUNNER.invoke(app, ["train", *arguments]).exit_code == 7
    launch_options = {"config_file": "cpu", "num_processes": "2", "gpu_ids": "0,1"}
    assert calls == [(launch_options, ["vit-tiny/digits/nio", *options])]
    assert RUNNER.invoke(app, ["train", "--machine_rank", "1"]).exit_code == 7
    assert calls[1] == ({"machine_rank": "1"}, ["vit-tiny/digits/nio"])


def test_the_command_line_keeps_the_options_of_both_apart():
    command = launch_command({"config_file": "cpu", "num_machines": "2"}, ["a.yaml", "--num_processes_of_mine", "1"])
    config = str(recipes_dir() / "accelerate_configs" / "cpu.yaml")
    assert command[1:] == [
        *("-m", "accelerate.commands.launch", "--quiet", "--config_file", config, "--num_machines", "2"),
        *("-m", "nio_hf.train", "a.yaml", "--num_processes_of_mine", "1"),
    ]
    with pytest.raises(RecipeError, match=r"config_file: 'gpus' is no file. Give .* one of: cpu, fsdp2"):
        launch_command({"config_file": "gpus"}, [])


def test_the_exit_status_is_that_of_the_training(tmp_path):
    options = ["--train_split", "nothing", "--output_dir", str(tmp_path)]
    assert launch({"config_file": "cpu"}, ["vit-tiny/digits/nio", *options]) == 1
    with pytest.raises(RecipeError, match=r"Did you mean 'seed'\?"):
        launch({"config_file": "cpu"}, ["vit-tiny/digits/nio", "--sede", "1"])


def test_several_processes_without_gpus_or_a_configuration_are_refused(monkeypatch):
    # accelerate would run one process, and say nothing.
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("nio_hf.launch.default_config_file", "nowhere.yaml")
    refused = RUNNER.invoke(app, ["train", "vit-tiny/digits/nio", "--num_processes", "2"])
    assert refused.exit_code == 2
    assert "Add --config_file multi_cpu" in refused.output


@pytest.mark.slow
def test_two_processes_train_the_weights_that_one_process_trains(tmp_path):
    # 48 samples: shares of 4 come out even, so that no process is given some of them again.
    images = make_folder(tmp_path / "images", images=16)
    recipe = write_recipe(tmp_path, images, "global_batch_size: 16\noptim: sgd\nlearning_rate: 0.5\n")
    # What is drawn for a whole batch on its device depends on how the batch is shared; crops and flips do not.
    plain = ["--randaugment_magnitude", "null", "--color_jitter", "0", "--random_erasing", "0"]
    plain += ["--mixup_alpha", "0", "--cutmix_alpha", "0", "--per_device_train_batch_size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output, options in zip(outputs, ([], ["--config_file", "multi_cpu", "--num_processes", "2"]), strict=True):
        command = [sys.executable, "-m", "nio_hf.cli", "train", recipe, *options, *plain, "--output_dir", str(output)]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert (finished.stdout + finished.stderr).count("Trained model: ") == 1
    arguments = [torch.load(path / "training_args.bin", weights_only=False) for path in outputs]
    assert [each.gradient_accumulation_steps for each in arguments] == [4, 2], "two processes really ran"

    histories = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in outputs]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (load_file(path / "model.safetensors") for path in outputs)
    initial = load_file(outputs[0] / "_nio_init" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-5)
    assert max(float((one[name] - initial[name]).abs().max()) for name in one) > 0.01
    scales = [load_state(path / "_nio_init").scales for path in outputs]
    assert scales[1] == pytest.approx(scales[0], rel=1e-5)
    results = [json.loads((path / "all_results.json").read_text()) for path in outputs]
    assert results[1]["eval_accuracy"] == pytest.approx(results[0]["eval_accuracy"], abs=0.03)
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-4), "every image counts once"
