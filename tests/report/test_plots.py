"""Plots and tables of runs of any size."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from PIL import Image

from nio_hf.core import GradCosine, IterationRecord, NIOConfig, NIOResult, TensorScale
from nio_hf.errors import OutputError
from nio_hf.report import plot_history, plot_scales, plot_training, summary_rows


def _measured(value: float, parts: int) -> GradCosine:
    single = [GradCosine(value + 0.01 * index, 2.0, (1.0, 3.0), 2.3, 64) for index in range(parts)]
    return GradCosine.mean(single)


def _result(tensors: int = 12, iterations: int = 5, parts: int = 4, omega: float = 1.3) -> NIOResult:
    kinds = ["linear weight", "linear bias", "norm weight", "convolution weight", "embedding", "parameter", "other"]
    return NIOResult(
        config=NIOConfig(),
        tensors=tuple(
            TensorScale(f"t{i}", kinds[i % len(kinds)], i // 6, (4,), omega ** (i % 3 - 1)) for i in range(tensors)
        ),
        excluded=(),
        history=tuple(
            IterationRecord(i + 1, 0.1 * i, 2.0 + i, 2.3, "constraint" if i % 2 else "objective", 0.1, "exact", None)
            for i in range(iterations)
        ),
        before=_measured(0.1, parts),
        after=_measured(0.3, parts),
        gamma=4.0,
        curvature="exact",
        seconds=3.21,
        peak_memory=1,
        status="improved",
        message="Improved.",
    )


@pytest.mark.parametrize(
    "result", [_result(), _result(1, 1, 1), _result(600, 200), _result(omega=1.0), _result(omega=40)]
)
def test_results_of_any_size_are_drawn(result: NIOResult, tmp_path: Path) -> None:
    for draw in (plot_scales, plot_history):
        path = tmp_path / "plots" / f"{draw.__name__}.png"
        draw(result, path)
        with Image.open(path) as image:
            assert min(image.size) > 400
            assert len(set(image.convert("L").resize((64, 64)).get_flattened_data())) > 5, "nothing is drawn"


def test_an_unbounded_run_without_gamma_is_drawn(tmp_path: Path) -> None:
    plot_history(dataclasses.replace(_result(), gamma=None), tmp_path / "history.png")


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": i, "loss": 1 / i} for i in range(1, 90)] + [{"step": 9, "eval_loss": 1.0, "eval_accuracy": 0.5}],
        [{"step": 3, "eval_loss": 1.0}, {"step": 0, "nio_loss": 2.0}],
    ],
)
def test_training_is_drawn_from_whatever_was_logged(history: list[dict[str, float]], tmp_path: Path) -> None:
    plot_training(history, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 0


def test_a_plot_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Free space or choose another"):
        plot_scales(_result(), tmp_path / "file" / "plot.png")


def test_the_table_holds_what_is_known() -> None:
    rows = summary_rows(_result(), {"eval_accuracy": 0.9639, "eval_loss": 0.12, "train_runtime": 61.24})
    table = {name: (before, after) for name, before, after in rows}
    error = _measured(0.1, 4).standard_error
    assert table["GradCosine (D = 2, B/D = 32)"] == (f"0.1150 ± {error:.4f}", f"0.3150 ± {error:.4f}")
    assert table["Evaluation accuracy"] == ("", "96.39%")
    assert table["Seconds of NIO"] == ("", "3.2")
    assert table["Seconds of training"] == ("", "61.2")
    assert [name for name, *_ in summary_rows(None, {"eval_loss": 0.12})] == ["Evaluation loss"]
    assert math.isnan(_measured(0.1, 1).standard_error)
    assert "±" not in summary_rows(_result(parts=1), {})[0][1]
