"""NIO in TensorBoard, Weights & Biases and MLflow: the right run, against the iteration of NIO."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nio_hf import NIOTrainer
from nio_hf.core import IterationRecord
from tests.trainer.toys import ToyImages, arguments, build

IMAGES = {"nio/history_plot", "nio/scales_plot"}


def trained(output_dir: Path, tracker: str) -> NIOTrainer:
    args = arguments(output_dir, report_to=[tracker], logging_steps=1)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    trainer.train()
    return trainer


def cosines(trainer: NIOTrainer) -> dict[int, Any]:
    """{iteration: GC} of the iterations that have one."""
    known = {record.iteration: record.grad_cosine for record in trainer.nio_result.history}
    return {iteration: pytest.approx(value) for iteration, value in known.items() if value is not None}


def test_tensorboard_gets_curves_scales_and_plots_in_the_run_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    trainer = trained(tmp_path / "out", "tensorboard")
    assert not (tmp_path / "runs").exists()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    assert {event.step: event.value for event in events.Scalars("nio/grad_cosine")} == cosines(trainer)
    iterations = len(trainer.nio_result.history)
    assert [event.step for event in events.Scalars("nio/loss")] == list(range(1, iterations + 1))
    assert {"nio/grad_norm", "nio/loss", "train/loss", "train/nio_grad_cosine_after"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")][:2] == [1, 2]
    (table,) = events.Tensors("nio/scales/text_summary")
    assert table.step == iterations
    assert b"| additive | " in table.tensor_proto.string_val[0]
    assert set(events.Tags()["images"]) == IMAGES
    assert [event.step for name in IMAGES for event in events.Images(name)] == [iterations] * 2


def test_wandb_gets_curves_scales_and_plots_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, Any]] = []
    metrics: list[tuple[str, str | None]] = []
    log, define = wandb.Run.log, wandb.Run.define_metric

    def recorded_log(run: wandb.Run, row: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logged.append(dict(row))
        log(run, row, *args, **kwargs)

    def recorded_define(run: wandb.Run, name: str, *args: Any, **kwargs: Any) -> Any:
        metrics.append((name, kwargs.get("step_metric")))
        return define(run, name, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", recorded_log)
    monkeypatch.setattr(wandb.Run, "define_metric", recorded_define)
    trainer = trained(tmp_path / "out", "wandb")
    wandb.finish()
    curve = {row["nio/iteration"]: row["nio/grad_cosine"] for row in logged if "nio/grad_cosine" in row}
    assert curve == cosines(trainer)
    assert ("nio/*", "nio/iteration") in metrics
    (media,) = [row for row in logged if "nio/scales" in row]
    assert media["nio/iteration"] == len(trainer.nio_result.history)
    assert media["nio/scales"].columns[:4] == ["group", "tensors", "parameters", "scale"]
    assert [row[0] for row in media["nio/scales"].data] == ["additive", "others"]
    assert media.keys() >= IMAGES
    assert not [row for row in logged if any(key.startswith("nio/") for key in row) and "train/global_step" in row]
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(list(run.rglob("*_plot_*.png"))) == 2


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_mlflow_gets_curves_scales_and_plots_in_the_run_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "nio")
    trainer = trained(tmp_path / "out", "mlflow")
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("nio").experiment_id])
    curve = client.get_metric_history(run.info.run_id, "nio/grad_cosine")
    assert {point.step: point.value for point in curve} == cosines(trainer)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    folder = Path(client.download_artifacts(run.info.run_id, "nio", str(tmp_path)))
    assert {f"nio/{path.stem}" for path in folder.glob("*.png")} == IMAGES
    scales = {group.name: group.omega for group in trainer.nio_result.groups}
    assert json.loads((folder / "scales.json").read_text()) == scales
    with Image.open(folder / "scales_plot.png") as image:
        assert min(image.size) > 400


def test_a_second_training_reports_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    trainer = trained(tmp_path / "out", "tensorboard")
    trainer.train()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    assert len(events.Scalars("nio/loss")) == len(trainer.nio_result.history)
    assert len(events.Tensors("nio/scales/text_summary")) == 1


def test_what_is_not_finite_is_left_out_of_log_and_tracker(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = arguments(tmp_path / "out", report_to=["tensorboard"])
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    result = trainer.run_nio()
    count = len(result.history)
    broken = IterationRecord(count + 1, "all x64", "loss_bound", math.nan)
    result = dataclasses.replace(result, history=(*result.history, broken))
    trainer._nio_report.report_later(result, trainer.model)
    trainer.train()
    json.dumps(trainer.state.log_history, allow_nan=False)
    (entry,) = (entry for entry in trainer.state.log_history if entry.get("nio_iteration") == count + 1)
    assert {name for name in entry if name.startswith("nio_")} == {
        *("nio_iteration", "nio_tried", "nio_outcome", "nio_cost", "nio_seconds")
    }
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    assert len(events.Scalars("nio/loss")) == count
