"""Launches `launched.py` as users launch their scripts, on the CPU."""

import json
import os
import signal
import subprocess
from typing import NamedTuple

import yaml

from tests.distributed.ranks import free_port
from tests.durable.trainings import ROOT, start_python
from tests.trainer.toys import build

TIME_LIMIT = 240.0
DISTRIBUTED_TYPES = {"single": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP"}
DISTRIBUTED_TYPES |= dict.fromkeys(("zero1", "zero2", "zero3"), "DEEPSPEED")
_FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "ViTLayer",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_cpu_ram_efficient_loading": False,
}


class Outcome(NamedTuple):
    """How a launch ended: its exit status, the reports of the ranks that got that far, and what it printed."""

    status: int
    reports: list
    output: str


def launch(folder, strategy, processes, **settings):
    """Run `launched.py` and wait for it; `folder` holds the model and the output of one training."""
    with start(folder, strategy, processes, **settings) as process:
        try:
            output, _ = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"not ended after {TIME_LIMIT} s:\n{output}") from None
    files = sorted((folder / "output").glob("report-*.json"))
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return Outcome(process.returncode, reports, output)


def trained(folder, strategy, processes, **settings):
    """The reports of all ranks of a training that came to its end."""
    outcome = launch(folder, strategy, processes, **settings)
    assert outcome.status == 0, outcome.output[-3000:]
    assert len(outcome.reports) == processes
    return outcome.reports


def start(folder, strategy, processes, **settings):
    """Start `launched.py` in a session of its own."""
    for report in (folder / "output").glob("report-*.json"):
        report.unlink()
    file = folder / "settings.json"
    file.write_text(json.dumps(training_in(folder, strategy, **settings)), encoding="utf-8")
    module = ["-m", "tests.distributed.launched", file]
    if strategy != "single":
        config = folder / "accelerate.yaml"
        config.write_text(yaml.safe_dump(_config(strategy, processes)), encoding="utf-8")
        module = ["-m", "accelerate.commands.launch", "--config_file", config, *module]
    # Messages are not broken into lines.
    return start_python(*module, cwd=ROOT, env={"DS_ACCELERATOR": "cpu", "COLUMNS": "1000"})


def training_in(folder, strategy, **settings):
    """The settings of `launched.py` for a training in a folder, with the model that it starts from."""
    folder.mkdir(exist_ok=True)
    if not (folder / "model").is_dir():
        build(settings.get("model", "vit"), hidden_dropout_prob=0.1).save_pretrained(folder / "model")
    return {"strategy": strategy, "model_dir": str(folder / "model"), "output_dir": str(folder / "output"), **settings}


def _config(strategy, processes):
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(strategy, "DEEPSPEED"),
        "use_cpu": strategy == "ddp",
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "main_process_port": free_port(),
        "mixed_precision": "no",
    }
    if strategy == "fsdp2":
        config["fsdp_config"] = _FSDP
    if strategy.startswith("zero"):
        stage = int(strategy[-1])
        config["deepspeed_config"] = {
            "zero_stage": stage,
            "gradient_accumulation_steps": 1,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
            "zero3_init_flag": stage == 3,
            "zero3_save_16bit_model": stage == 3,
        }
    return config
