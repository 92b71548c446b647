"""A training for `accelerate launch`: `launched.py SETTINGS.json`, which writes one report per rank.

Settings: strategy, model ("vit", "swin"), whether its head is replaced, model_dir, output_dir, arguments (of
NIOTrainingArguments), and what goes wrong on the way.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from nio_hf import NIOTrainer
from nio_hf.console import exit_status
from nio_hf.core import Collective
from nio_hf.trainer import checkpoints
from nio_hf.trainer.digests import fingerprint
from nio_hf.trainer.replica import gathered
from tests.distributed import cpu_backends
from tests.trainer import toys

COMMON = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
COMMON |= {"learning_rate": 1e-3, "nio_batch_size": 12, "nio_sub_batches": 3}
PUBLISHED = {**toys.PUBLISHED, "nio_iterations": 4, "nio_curvature": "exact"}
COMPUTED = {"nio_search": "balance"}


class _Reporting(NIOTrainer):
    """Writes down the weights after NIO, and is killed or asked to stop where the settings say so."""

    initialised = ""
    losses = 0
    seeds = None
    partitioned = False

    def run_nio(self, **kwargs):
        self.partitioned = any(hasattr(parameter, "ds_id") for parameter in self.unwrapped_model.parameters())
        result = super().run_nio(**kwargs)
        self.initialised = weights(self)
        return result

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        if self.args.nio_seed_optimizer is not None:
            state = self.optimizer.optimizer.state
            moments = (state[parameter]["exp_avg_sq"] for parameter in self.unwrapped_model.parameters())
            self.seeds = [float(whole(moment).double().sum()) for moment in moments]
        return prepared

    def prepare_nio_batch(self, batch, number):
        time.sleep(self.pace)
        self._fault("nio", number)
        if self.faults.get("nan") == [Collective.current().rank, number]:
            batch["pixel_values"][:] = float("nan")
        return batch

    def compute_nio_loss(self, *args):
        self.losses += 1
        self._fault("loss", self.losses)
        return super().compute_nio_loss(*args)

    def _save_rng_state(self, output_dir):
        self._fault("checkpoint", self.state.global_step)
        super()._save_rng_state(output_dir)

    def training_step(self, *args, **kwargs):
        time.sleep(self.pace)
        self._fault("step", self.state.global_step)
        return super().training_step(*args, **kwargs)

    def _fault(self, place, number):
        """Send the signal that the settings name, at `place` the first time that its number is reached."""
        fault = self.faults.get(place)
        once = Path(self.args.output_dir) / f"fault-{place}"
        rank = Collective.current().rank
        if fault is not None and fault["number"] == number and fault.get("rank", 0) == rank and not once.exists():
            once.touch()
            send = os.killpg if fault.get("group") else os.kill
            send(os.getpid(), signal.Signals[fault["signal"]])


def _killed_in_save(output_dir):
    """Let the first save of an initialised checkpoint be killed before its manifest is written."""
    original = checkpoints.write_manifest

    def write_manifest(directory):
        once = Path(output_dir) / "fault-save"
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(directory)

    checkpoints.write_manifest = write_manifest


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(trainer):
    """Digest of the weights of the model, whole."""
    model = trainer.unwrapped_model
    values = torch.nn.ParameterDict()
    with gathered(model):
        for name, parameter in model.named_parameters():
            values[name.replace(".", "/")] = torch.nn.Parameter(whole(parameter).detach().float().clone())
    return fingerprint(values)


def make_trainer(settings):
    """The trainer of some settings; the ranks start from different weights where they can."""
    # The arguments come first, since ZeRO-3 spreads a model that is made after them.
    args = toys.arguments(settings["output_dir"], **{**COMMON, **settings.get("arguments", {})})
    model = AutoModelForImageClassification.from_pretrained(settings["model_dir"], dtype=torch.float32)
    if settings.get("replaced_head"):
        torch.manual_seed(0)
        width = model.classifier.in_features
        model.classifier = torch.nn.Sequential(
            torch.nn.Linear(width, 8), torch.nn.GELU(), torch.nn.Linear(8, toys.CLASSES)
        )
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0 and settings["strategy"] != "zero3":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * rank
    trainer = _Reporting(model=model, args=args, train_dataset=toys.ToyImages())
    trainer.faults = settings.get("faults", {})
    # Seconds that each batch takes longer.
    trainer.pace = settings.get("pace", 0.0)
    if "save" in trainer.faults:
        _killed_in_save(settings["output_dir"])
    return trainer


def run(settings):
    trainer = make_trainer(settings)
    # In one piece, which lines of two processes do not cut into.
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    trainer.train(settings.get("resume"))
    if settings.get("nio_again"):
        trainer.run_nio()
    result = trainer.nio_result
    report = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "scales": None if result is None else [tensor.omega for tensor in result.tensors],
        "initialised": trainer.initialised,
        "seeds": trainer.seeds,
        "partitioned": trainer.partitioned,
        "trained": weights(trainer),
        "step": trainer.state.global_step,
        "race": None if result is None or result.race is None else dataclasses.asdict(result.race),
    }
    trainer.save_model()
    return report


def main():
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    if settings["strategy"] == "fsdp2":
        cpu_backends.enable_fsdp()
    if settings["strategy"].startswith("zero"):
        cpu_backends.enable_deepspeed()

    def action():
        report = run(settings)
        file = Path(settings["output_dir"]) / f"report-{Collective.current().rank}.json"
        file.write_text(json.dumps(report), encoding="utf-8")
        return 0

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
