"""NIO in TensorBoard, Weights & Biases and MLflow: the right run, against the NIO iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nio_hf import NIOTrainer
from tests.training.toys import ToyImages, arguments, build

IMAGES = {"nio/history_plot", "nio/scales_plot"}


def trained(output_dir: Path, tracker: str) -> NIOTrainer:
    args = arguments(output_dir, report_to=[tracker], logging_steps=1, nio_iterations=3)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    trainer.train()
    return trainer


def cosines(trainer: NIOTrainer) -> Any:
    return pytest.approx([record.grad_cosine for record in trainer.nio_result.history])


def test_tensorboard_gets_curves_scales_and_plots_in_the_run_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    trainer = trained(tmp_path / "out", "tensorboard")
    assert not (tmp_path / "runs").exists()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    curve = events.Scalars("nio/grad_cosine")
    assert [event.step for event in curve] == [1, 2, 3]
    assert [event.value for event in curve] == cosines(trainer)
    assert {"nio/grad_norm", "nio/loss", "train/loss", "train/nio_grad_cosine_after"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")][:2] == [1, 2]
    (histogram,) = events.Histograms("nio/scales")
    scales = trainer.nio_result.scales.values()
    assert (histogram.step, histogram.histogram_value.num) == (3, len(scales))
    assert histogram.histogram_value.max == pytest.approx(max(scales))
    assert set(events.Tags()["images"]) == IMAGES
    assert [event.step for name in IMAGES for event in events.Images(name)] == [3, 3]


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
    assert list(curve) == [1, 2, 3]
    assert list(curve.values()) == cosines(trainer)
    assert ("nio/*", "nio/iteration") in metrics
    (media,) = [row for row in logged if "nio/scales" in row]
    assert media["nio/iteration"] == 3
    assert sum(media["nio/scales"].histogram) == len(trainer.nio_result.scales)
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
    assert [point.step for point in curve] == [1, 2, 3]
    assert [point.value for point in curve] == cosines(trainer)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    folder = Path(client.download_artifacts(run.info.run_id, "nio", str(tmp_path)))
    assert {f"nio/{path.stem}" for path in folder.glob("*.png")} == IMAGES
    assert json.loads((folder / "scales.json").read_text())["scales"] == list(trainer.nio_result.scales.values())
    with Image.open(folder / "scales_plot.png") as image:
        assert min(image.size) > 400


def test_a_second_training_reports_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    trainer = trained(tmp_path / "out", "tensorboard")
    trainer.train()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("nio/loss")] == [1, 2, 3]
    assert len(events.Histograms("nio/scales")) == 1
