"""NIO in TensorBoard and Weights & Biases: the right run, against the NIO iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nio_hf import NIOTrainer
from tests.training.toys import ToyImages, arguments, build


def test_tensorboard_gets_the_curves_in_the_run_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path / "out", report_to=["tensorboard"], logging_steps=1, nio_iterations=3)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    trainer.train()
    assert not (tmp_path / "runs").exists()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    curve = events.Scalars("nio/grad_cosine")
    assert [event.step for event in curve] == [1, 2, 3]
    assert [event.value for event in curve] == pytest.approx(
        [record.grad_cosine for record in trainer.nio_result.history]
    )
    assert {"nio/grad_norm", "nio/loss", "train/loss", "train/nio_grad_cosine_after"} <= set(events.Tags()["scalars"])


def test_wandb_gets_the_curves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, float]] = []
    metrics: list[tuple[str, str | None]] = []
    args = arguments(tmp_path / "out", report_to=["wandb"], nio_iterations=3)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    log, define = wandb.Run.log, wandb.Run.define_metric

    def recorded_log(run: wandb.Run, row: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logged.append(dict(row))
        log(run, row, *args, **kwargs)

    def recorded_define(run: wandb.Run, name: str, *args: Any, **kwargs: Any) -> Any:
        metrics.append((name, kwargs.get("step_metric")))
        return define(run, name, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", recorded_log)
    monkeypatch.setattr(wandb.Run, "define_metric", recorded_define)
    trainer.train()
    wandb.finish()
    curve = [row["nio/iteration"] for row in logged if "nio/grad_cosine" in row]
    assert curve == [1, 2, 3]
    assert ("nio/*", "nio/iteration") in metrics
    assert list((tmp_path / "wandb").glob("offline-run-*"))
