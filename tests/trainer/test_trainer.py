"""NIO inside the Trainer: when it runs, what it leaves alone, what it reports and saves."""

import json
import logging
import math
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, TrainerCallback

from nio_hf import NIOTrainer, NIOTrainingArguments, initialize
from nio_hf.errors import ConfigError, DataError, ModelError, NIOMemoryError, NumericsError, OutputError
from nio_hf.hub.run_folder import STATE_NAME
from nio_hf.trainer.digests import fingerprint
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.reporting import summary
from tests.durable.trainings import Counting
from tests.trainer.toys import Observed, ToyImages, build, load_state, refused, snapshot, trained, trainer_of, unchanged


def test_nio_scales_the_weights_and_nothing_else(tmp_path):
    trainer = trainer_of(tmp_path)
    before = snapshot(trainer.model)
    result = trainer.run_nio()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name] * torch.tensor(result.scales.get(name, 1.0))), name
    assert any(abs(omega - 1) > 1e-3 for omega in result.scales.values())
    assert trainer.model.training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("method", "again"), [("nio", False), ("lsuv", False), ("none", True)])
def test_a_model_that_initialize_has_changed_is_not_initialised_again(method, again, tmp_path, caplog):
    model, data = build("vit"), ToyImages()
    batches = [{"pixel_values": data.images[i : i + 8], "labels": data.labels[i : i + 8]} for i in range(0, 64, 8)]
    initialize(model, batches, lambda model, batch: model(**batch).loss, method=METHODS[method])
    initialised = snapshot(model)
    with caplog.at_level(logging.INFO, "nio_hf.trainer"):
        trainer = trained(tmp_path, Observed, model=model)
    assert len(trainer.results) == again
    assert trainer.nio_init_dir.exists() == again
    if not again:
        said = "NIO is skipped: it has initialised this model already. Call run_nio() to run it again."
        assert said in caplog.text
        assert unchanged(initialised, trainer.begun_with[0])


def test_models_of_a_shared_config_do_not_inherit_the_mark(tmp_path):
    config = build("vit").config
    for trial in range(2):
        model = AutoModelForImageClassification.from_config(config)
        assert len(trained(tmp_path / str(trial), Observed, model=model).results) == 1
    assert not hasattr(config, "nio")


def test_a_fingerprint_knows_weights_not_names():
    first, second = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    second[0].load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second[0].weight[0, 0] += 1e-6
    assert fingerprint(first) != fingerprint(second)


def test_an_initialised_checkpoint_loads_bit_for_bit_and_is_not_initialised_again(tmp_path, caplog):
    trainer = trainer_of(tmp_path)
    model, result = trainer.model, trainer.run_nio()
    loaded = AutoModelForImageClassification.from_pretrained(trainer.nio_init_dir, dtype=torch.float32)
    assert unchanged(snapshot(model), snapshot(loaded))
    assert loaded.config.nio["fingerprint"] == fingerprint(loaded)
    assert not hasattr(model.config, "nio")
    assert trained(tmp_path / "again", Observed, model=loaded).results == []

    changed = AutoModelForImageClassification.from_pretrained(trainer.nio_init_dir, dtype=torch.float32)
    with torch.no_grad():
        changed.classifier.weight.add_(1)
    assert len(trained(tmp_path / "third", Observed, model=changed).results) == 1
    assert "the weights are others" in caplog.text

    state = json.loads((trainer.nio_init_dir / STATE_NAME).read_text())
    assert state["result"]["after"]["value"] == result.after.value
    assert state["versions"]["torch"]
    assert not [name for name, _ in model.named_parameters() if name in json.dumps(state)]
    assert [t.omega for t in load_state(trainer.nio_init_dir).tensors] == [t.omega for t in result.tensors]


@pytest.mark.parametrize(
    "changes", [{}, {"nio_search": "published", "nio_iterations": 3}], ids=["default", "published"]
)
def test_history_reaches_the_log(changes, tmp_path):
    trainer = trained(tmp_path, **changes)
    logged = [entry for entry in trainer.state.log_history if "nio_iteration" in entry]
    history = trainer.nio_result.history
    assert [entry["nio_iteration"] for entry in logged] == list(range(1, len(history) + 1))
    assert [(entry["nio_tried"], entry["nio_outcome"]) for entry in logged] == [(r.tried, r.outcome) for r in history]
    for name in ("grad_cosine", "grad_norm", "loss"):
        assert [entry.get(f"nio_{name}") for entry in logged] == [getattr(record, name) for record in history], name
    if changes:
        assert len([entry for entry in logged if "nio_grad_cosine" in entry]) == 3


class Tracker(TrainerCallback):
    """A tracker that keeps all that is logged, with its step."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


def test_trackers_get_the_measurements_once_before_the_first_step(tmp_path):
    tracker = Tracker()
    trainer = trained(tmp_path, logging_steps=1, callbacks=[tracker])
    measured = (0, {**summary(trainer.nio_result), "epoch": pytest.approx(0)})
    assert tracker.logged[0] == measured
    assert tracker.logged[0][1]["nio_grad_norm_before"] == trainer.nio_result.before.grad_norm
    trainer.train()
    assert [row for row in tracker.logged if "nio_cost" in row[1]] == [measured]


class Overflowing(NIOTrainer):
    """Its loss is no number at weights that are more than twice as large as they were."""

    def compute_nio_loss(self, model, inputs):
        norm = float(model.classifier.weight.detach().norm())
        self.limit = getattr(self, "limit", 2 * norm)
        return super().compute_nio_loss(model, inputs) * (float("nan") if norm > self.limit else 1.0)


def test_values_that_are_not_finite_are_left_out_of_the_log(tmp_path):
    trainer = trained(tmp_path, Overflowing)
    assert any(record.loss is not None and math.isnan(record.loss) for record in trainer.nio_result.history)
    json.dumps(trainer.state.log_history, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "title", "tried"),
    [
        ({}, "NIO", ["NIO: additive x48.5, others x7: "]),
        ({"nio_groups": "model", "nio_least_norm": 1.0, "nio_strength": 0.5}, "NIO", ["NIO: all x2.65: "]),
        ({"nio_least_norm": 1.0}, "NIO", ["NIO: additive x48.5, others x7: ", "NIO: additive x1.27, others x1.13: "]),
        ({"nio_search": "published", "nio_iterations": 3}, "NIO", ["NIO: a step of 0.003: "]),
        (
            {"nio_method": "gradinit", "nio_method_kwargs": {"iterations": 3}},
            "GradInit",
            ["GradInit: a step of 0.01: "],
        ),
    ],
    ids=["default", "half", "refused", "published", "baseline"],
)
def test_a_run_says_beforehand_what_it_will_cost_and_a_bar_counts_it(changes, title, tried, tmp_path, capsys, caplog):
    class Noting(NIOTrainer):
        said = ""

        def compute_nio_loss(self, *args):
            self.said = self.said or caplog.text
            return super().compute_nio_loss(*args)

    trainer = trainer_of(tmp_path, Noting, disable_tqdm=False, **changes)
    with caplog.at_level(logging.INFO, "nio_hf.trainer"):
        result = trainer.run_nio()
    most = re.search(rf"{title} will cost (\d+) training steps of 8 samples at most", trainer.said)
    assert result.cost <= int(most[1]) + 0.5
    shown = capsys.readouterr().err
    drawn = re.findall(rf"{title}.*?\| (\d+)/(\d+) steps", shown)
    assert [what for what in tried if what not in shown] == []
    assert drawn[0] == ("0", most[1])
    assert drawn[-1] == (f"{result.cost:.0f}",) * 2
    assert f"{title}: 100%" in shown
    counted = [int(done) for done, _ in drawn]
    assert counted == sorted(counted)


@pytest.mark.parametrize("method", ["lsuv", "none", "emergence"])
def test_a_method_without_iterations_has_a_bar_too(method, tmp_path, capsys):
    result = trainer_of(tmp_path, disable_tqdm=False, nio_method=method).run_nio()
    assert re.search(rf"{re.escape(result.title)}: .*\b{result.cost:.0f} steps", capsys.readouterr().err)


def test_no_progress_bar_where_progress_bars_are_off(tmp_path, capsys):
    trainer_of(tmp_path, disable_tqdm=True).run_nio()
    assert "NIO" not in capsys.readouterr().err


def test_what_nio_cannot_work_with_is_refused_and_leaves_the_model_alone(tmp_path):
    wrong, broken = ToyImages(), ToyImages()
    wrong.labels[:] = 77
    broken.images[:] = float("nan")
    for given, error, message in (
        ({"nio_batch_size": 4096}, DataError, "Lower nio_batch_size"),
        ({"train_dataset": wrong}, DataError, "label 77 for a model of 5 classes"),
        ({"train_dataset": ToyImages(0)}, DataError, "no samples"),
        ({"train_dataset": None}, DataError, "override get_nio_dataset"),
        ({"train_dataset": broken}, NumericsError, "the loss is nan"),
        ({"model": build("vit").half()}, ModelError, "torch.float16"),
        ({"model": build("vit").requires_grad_(False)}, ModelError, "no parameter requires"),
    ):
        trainer = trainer_of(tmp_path, **given)
        with refused(trainer, error, message):
            trainer.run_nio()
    with torch.device("meta"):
        meta = build("vit")
    with pytest.raises(ModelError, match="Materialise the model"):
        trainer_of(tmp_path, model=meta)


@pytest.mark.parametrize(
    ("name", "calls", "error", "raised"),
    [
        ("vit", 20, KeyboardInterrupt(), KeyboardInterrupt),
        ("resnet", 8, KeyboardInterrupt(), KeyboardInterrupt),
        ("vit", 20, torch.OutOfMemoryError("full"), NIOMemoryError),
    ],
)
def test_interrupt_and_out_of_memory_leave_the_model_alone(name, calls, error, raised, tmp_path):
    class Failing(Counting):
        def compute_nio_loss(self, *args, **kwargs):
            if self.losses >= calls:
                raise error
            return super().compute_nio_loss(*args, **kwargs)

    trainer = trainer_of(tmp_path, Failing, model=build(name))
    state = torch.get_rng_state()
    with refused(trainer, raised):
        trainer.run_nio()
    assert torch.equal(state, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []


class OfAnotherProcess(NIOTrainingArguments):
    """Arguments as a process has them that does not save."""

    @property
    def should_save(self):
        return False


def test_only_the_process_that_saves_describes_a_model(tmp_path):
    written = {name: tmp_path / name for name in ("nio_state.json", "nio_run.json", "model.safetensors")}
    for file in written.values():
        file.write_text("of rank 0")
    args = OfAnotherProcess(output_dir=str(tmp_path), use_cpu=True, report_to="none", nio=False)
    trainer_of(tmp_path, args=args).save_model()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(written, "of rank 0")


def test_a_metric_that_no_evaluation_has_is_refused_before_nio(tmp_path):
    choosing = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    choosing["eval_dataset"] = {"first": ToyImages(8), "second": ToyImages(8)}
    for metric, fix in ((None, "first_loss, second_loss"), ("eval_first_f1", "compute_metrics")):
        trainer = trainer_of(tmp_path, metric_for_best_model=metric, **choosing)
        with refused(trainer, KeyError, fix) as raised:
            trainer.train()
        assert isinstance(raised.value, ConfigError)
    allowed = trained(tmp_path, metric_for_best_model="second_loss", **choosing)
    assert allowed.state.best_model_checkpoint is not None


def test_output_that_cannot_be_written_is_found_before_nio_starts(tmp_path):
    trainer = trainer_of(tmp_path / "out")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    with refused(trainer, OutputError, "Choose an output_dir"):
        trainer.run_nio()
