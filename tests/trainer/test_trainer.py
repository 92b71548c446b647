"""NIO inside the Trainer: when it runs, what it leaves alone, what it reports and saves."""

import json
import logging
import re

import pytest
import torch
from transformers import AutoModelForImageClassification

from nio_hf import NIOTrainer, NIOTrainingArguments, initialize
from nio_hf.baselines import METHODS
from nio_hf.errors import ConfigError, DataError, ModelError, NIOMemoryError, NumericsError, OutputError
from nio_hf.hub.run_folder import STATE_NAME
from nio_hf.trainer.digests import fingerprint
from tests.trainer.toys import ToyImages, arguments, build, load_state, snapshot, unchanged


def test_nio_scales_the_weights_once_and_keeps_the_parameters(tmp_path):
    model = build("vit")
    before = snapshot(model)
    identities = [id(parameter) for parameter in model.parameters()]
    trainer = NIOTrainer(model=model, args=arguments(tmp_path), train_dataset=ToyImages())
    result = trainer.run_nio()
    assert [id(parameter) for parameter in model.parameters()] == identities
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * torch.tensor(result.scales.get(name, 1.0))), name
    assert any(abs(omega - 1) > 1e-3 for omega in result.scales.values())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nio_runs_once_per_model_and_once_per_model_init(tmp_path):
    trainer = NIOTrainer(model=build("vit"), args=arguments(tmp_path / "a"), train_dataset=ToyImages())
    runs = _count_runs(trainer)
    trainer.train()
    trainer.train()
    assert runs == [1]
    trainer = NIOTrainer(model_init=lambda: build("vit"), args=arguments(tmp_path / "b"), train_dataset=ToyImages())
    runs = _count_runs(trainer)
    trainer.train()
    trainer.train()
    assert runs == [1, 1]


def test_a_model_that_initialize_has_seen_is_not_initialised_again(tmp_path, caplog):
    model = build("vit")
    data = ToyImages()
    batches = [{"pixel_values": data.images[i : i + 8], "labels": data.labels[i : i + 8]} for i in range(0, 64, 8)]
    initialize(model, batches, lambda model, batch: model(**batch).loss)
    initialised = snapshot(model)
    trainer = NIOTrainer(model=model, args=arguments(tmp_path, learning_rate=0.0), train_dataset=data)
    runs = _count_runs(trainer)
    with caplog.at_level(logging.INFO, "nio_hf.trainer"):
        trainer.train()
    assert runs == []
    assert "NIO is skipped: it has initialised this model already. Call run_nio() to run it again." in caplog.text
    assert unchanged(initialised, snapshot(model))
    assert not trainer.nio_init_dir.exists()

    same = NIOTrainer(model=build("vit"), args=arguments(tmp_path / "another"), train_dataset=data)
    runs = _count_runs(same)
    same.train()
    assert runs == [1], "a model of its own"


@pytest.mark.parametrize(("method", "again"), [("none", True), ("lsuv", False)])
def test_a_model_that_a_baseline_has_changed_is_not_initialised_again(method, again, tmp_path):
    model, data = build("vit"), ToyImages()
    batches = [{"pixel_values": data.images[i : i + 8], "labels": data.labels[i : i + 8]} for i in range(0, 64, 8)]
    initialize(model, batches, lambda model, batch: model(**batch).loss, method=METHODS[method])
    trainer = NIOTrainer(model=model, args=arguments(tmp_path), train_dataset=data)
    runs = _count_runs(trainer)
    trainer.train()
    assert runs == [1] * again


def test_models_of_a_shared_config_do_not_inherit_the_mark(tmp_path):
    config = build("vit").config
    for trial in range(3):
        model = AutoModelForImageClassification.from_config(config)
        trainer = NIOTrainer(model=model, args=arguments(tmp_path / str(trial)), train_dataset=ToyImages())
        runs = _count_runs(trainer)
        trainer.train()
        assert runs == [1]
    assert not hasattr(config, "nio")


def test_initialised_checkpoint_loads_bit_for_bit_and_is_not_initialised_again(tmp_path, caplog):
    model = build("vit")
    trainer = NIOTrainer(model=model, args=arguments(tmp_path), train_dataset=ToyImages())
    result = trainer.run_nio()
    loaded = AutoModelForImageClassification.from_pretrained(trainer.nio_init_dir, dtype=torch.float32)
    assert unchanged(snapshot(model), snapshot(loaded))
    assert loaded.config.nio["fingerprint"] == fingerprint(loaded)
    assert not hasattr(model.config, "nio")

    again = NIOTrainer(model=loaded, args=arguments(tmp_path / "again"), train_dataset=ToyImages())
    runs = _count_runs(again)
    again.train()
    assert runs == []

    changed = AutoModelForImageClassification.from_pretrained(trainer.nio_init_dir, dtype=torch.float32)
    with torch.no_grad():
        changed.classifier.weight.add_(1)
    third = NIOTrainer(model=changed, args=arguments(tmp_path / "third"), train_dataset=ToyImages())
    runs = _count_runs(third)
    with caplog.at_level(logging.WARNING):
        third.train()
    assert runs == [1]
    assert "the weights are others" in caplog.text

    state = json.loads((trainer.nio_init_dir / STATE_NAME).read_text())
    assert state["result"]["after"]["value"] == result.after.value
    assert state["versions"]["torch"]
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if name in json.dumps(state)]
    assert [t.omega for t in load_state(trainer.nio_init_dir).tensors] == [t.omega for t in result.tensors]


@pytest.mark.parametrize(
    "changes", [{}, {"nio_search": "published", "nio_iterations": 3}], ids=["default", "published"]
)
def test_history_reaches_the_log(changes, tmp_path):
    args = arguments(tmp_path, **changes)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "nio_iteration" in entry]
    history = trainer.nio_result.history
    assert [entry["nio_iteration"] for entry in logged] == list(range(1, len(history) + 1))
    assert [(entry["nio_tried"], entry["nio_outcome"]) for entry in logged] == [(r.tried, r.outcome) for r in history]
    for name in ("grad_cosine", "grad_norm", "loss"):
        assert [entry.get(f"nio_{name}") for entry in logged] == [getattr(record, name) for record in history], name
    if changes:
        assert len([entry for entry in logged if "nio_grad_cosine" in entry]) == 3
    summary = next(entry for entry in trainer.state.log_history if "nio_grad_cosine_after" in entry)
    assert summary["nio_grad_norm_before"] == trainer.nio_result.before.grad_norm


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
def test_the_progress_bar_counts_training_steps_and_says_what_is_tried(changes, title, tried, tmp_path, capsys, caplog):
    args = arguments(tmp_path, disable_tqdm=False, **changes)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    with caplog.at_level(logging.INFO, "nio_hf.trainer"):
        result = trainer.run_nio()
    most = re.search(rf"{title} will cost (\d+) training steps of 8 samples at most", caplog.text)
    assert most is not None
    shown = capsys.readouterr().err
    drawn = re.findall(rf"{title}.*?\| (\d+)/(\d+) steps", shown)
    assert [what for what in tried if what not in shown] == []
    assert drawn[0] == ("0", most[1])
    assert drawn[-1] == (f"{result.cost:.0f}",) * 2
    assert f"{title}: 100%" in shown
    counted = [int(done) for done, _ in drawn]
    assert counted == sorted(counted)


def test_a_run_says_beforehand_what_it_will_cost_at_most(tmp_path, caplog):
    for name, changes in {
        "default": {},
        "all refused": {"nio_least_norm": 1.0},
        "one group": {"nio_groups": "model"},
    }.items():
        args = arguments(tmp_path / name, **changes)
        trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
        caplog.clear()
        before = []
        with caplog.at_level(logging.INFO, "nio_hf.trainer"):
            trainer.compute_nio_loss = lambda *a, log=before, f=trainer.compute_nio_loss: (
                log.append(caplog.text) or f(*a)
            )
            result = trainer.run_nio()
        most = re.search(r"NIO will cost (\d+) training steps of 8 samples at most", before[0])
        assert most is not None, name
        assert result.cost <= int(most[1]) + 0.5, name


@pytest.mark.parametrize("method", ["lsuv", "none", "emergence"])
def test_a_method_without_iterations_has_a_bar_too(method, tmp_path, capsys):
    args = arguments(tmp_path, disable_tqdm=False, nio_method=method)
    result = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages()).run_nio()
    assert re.search(rf"{re.escape(result.title)}: .*\b{result.cost:.0f} steps", capsys.readouterr().err)


def test_no_progress_bar_where_progress_bars_are_off(tmp_path, capsys):
    trainer = NIOTrainer(model=build("vit"), args=arguments(tmp_path), train_dataset=ToyImages())
    assert trainer.args.disable_tqdm
    trainer.run_nio()
    assert "NIO" not in capsys.readouterr().err


def test_too_large_a_batch_leaves_the_model_alone(tmp_path):
    _refused(build("vit"), ToyImages(), arguments(tmp_path, nio_batch_size=4096), DataError, "Lower nio_batch_size")


def test_bad_data_leaves_the_model_alone(tmp_path):
    wrong = ToyImages()
    wrong.labels[:] = 77
    _refused(build("vit"), wrong, arguments(tmp_path), DataError, "label 77 for a model of 5 classes")
    _refused(build("vit"), ToyImages(0), arguments(tmp_path), DataError, "no samples")
    _refused(build("vit"), None, arguments(tmp_path), DataError, "override get_nio_dataset")
    broken = ToyImages()
    broken.images[:] = float("nan")
    _refused(build("vit"), broken, arguments(tmp_path), NumericsError, "the loss is nan")


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
    NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages()).save_model()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(written, "of rank 0")


def test_bad_models_are_refused(tmp_path):
    _refused(build("vit").half(), ToyImages(), arguments(tmp_path), ModelError, "torch.float16")
    _refused(build("vit").requires_grad_(False), ToyImages(), arguments(tmp_path), ModelError, "no parameter requires")
    with torch.device("meta"):
        meta = build("vit")
    with pytest.raises(ModelError, match="Materialise the model"):
        NIOTrainer(model=meta, args=arguments(tmp_path), train_dataset=ToyImages())


def test_interrupt_and_out_of_memory_leave_the_model_alone(tmp_path):
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (torch.OutOfMemoryError("full"), NIOMemoryError)):

        class Failing(NIOTrainer):
            calls = 0

            def compute_nio_loss(self, *args, error=error, **kwargs):
                Failing.calls += 1
                if Failing.calls > 20:
                    raise error
                return super().compute_nio_loss(*args, **kwargs)

        model = build("vit")
        before = snapshot(model)
        trainer = Failing(model=model, args=arguments(tmp_path), train_dataset=ToyImages())
        state = torch.get_rng_state()
        with pytest.raises(raised):
            trainer.run_nio()
        assert unchanged(before, snapshot(model))
        assert torch.equal(state, torch.get_rng_state())
        assert not trainer.nio_init_dir.exists()


def test_a_metric_that_no_evaluation_has_is_refused_before_nio(tmp_path):
    def trainer(**changes):
        settings = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, **changes}
        sets = {"first": ToyImages(8), "second": ToyImages(8)}
        model = build("vit")
        return NIOTrainer(
            model=model, args=arguments(tmp_path, **settings), train_dataset=ToyImages(), eval_dataset=sets
        )

    for metric, fix in ((None, "first_loss, second_loss"), ("eval_first_f1", "compute_metrics")):
        refused = trainer(metric_for_best_model=metric)
        with pytest.raises(KeyError, match=fix) as raised:
            refused.train()
        assert isinstance(raised.value, ConfigError)
        assert refused.nio_result is None
    allowed = trainer(metric_for_best_model="second_loss")
    allowed.train()
    assert allowed.state.best_model_checkpoint is not None


def test_output_that_cannot_be_written_is_found_before_nio_starts(tmp_path):
    trainer = NIOTrainer(model=build("vit"), args=arguments(tmp_path / "out"), train_dataset=ToyImages())
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    before = snapshot(trainer.model)
    with pytest.raises(OutputError, match="Choose an output_dir"):
        trainer.run_nio()
    assert unchanged(before, snapshot(trainer.model))


def _count_runs(trainer):
    runs = []
    original = trainer.run_nio

    def run_nio(**kwargs):
        runs.append(1)
        return original()

    trainer.run_nio = run_nio
    return runs


def _refused(model, data, args, error, message):
    before = snapshot(model)
    trainer = NIOTrainer(model=model, args=args, train_dataset=data)
    with pytest.raises(error, match=message):
        trainer.run_nio()
    assert unchanged(before, snapshot(model))
    assert trainer.nio_result is None
