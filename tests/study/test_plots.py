"""Plots of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from nio_hf.metrics import ACCURACY, LOSS
from nio_hf.study.findings import Findings
from nio_hf.study.plots import plot_first_steps, plot_learning_rates
from tests.study.outcomes import outcome, plan


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    written: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        written.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return written


def _draw(target: Path, **changes: Any) -> None:
    made = plan(verdict_seeds=0, **changes)
    by_arm = {"no_warmup": 30.0, "warmup": 40.0, "nio": 50.0}
    known = {run: outcome(by_arm[run.arm] - run.warmup_ratio + run.seed) for run in made.selection()}
    plot_learning_rates(Findings("recipe", made, known, ACCURACY, 10.0), target)


def test_arms_are_lines_over_learning_rates(drawn: list[Figure], tmp_path: Path) -> None:
    _draw(tmp_path / "plot.png")
    accuracy, _ = drawn[0].axes
    assert [list(container[0].get_xdata()) for container in accuracy.containers] == [[1e-3, 2e-3]] * 3
    assert [container[0].get_ydata()[0] for container in accuracy.containers] == pytest.approx([31, 40.9, 51])
    assert accuracy.get_ylabel() == "accuracy (%)"


def test_arms_stand_beneath_each_other_at_a_single_learning_rate(drawn: list[Figure], tmp_path: Path) -> None:
    _draw(tmp_path / "plot.png", learning_rates=(1e-3,))
    accuracy, loss = drawn[0].axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["no_warmup", "warmup (10%)", "nio"]
    assert list(accuracy.containers[0][0].get_xdata()) == pytest.approx([31, 40.9, 51])
    assert len(loss.lines[0].get_xdata()) == 3
    assert accuracy.get_xlabel() == "accuracy (%)"


@pytest.mark.parametrize("rates", [(1e-3, 2e-3), (1e-3,)])
def test_an_evaluation_loss_is_drawn_at_the_length_of_warmup_where_it_is_lowest(
    drawn: list[Figure], tmp_path: Path, rates: tuple[float, ...]
) -> None:
    made = plan(verdict_seeds=0, learning_rates=rates)
    known = {run: outcome(3.0 - run.warmup_ratio) for run in made.selection()}
    findings = Findings("recipe", made, known, LOSS, LOSS.worst(100))
    plot_learning_rates(findings, tmp_path / "rates.png")
    plot_first_steps(findings, tmp_path / "steps.png")
    axes, _ = drawn[0].axes
    if len(rates) > 1:
        assert axes.get_ylabel() == "evaluation loss (nats)"
        assert [container[0].get_ydata()[0] for container in axes.containers] == pytest.approx([3.0, 2.7, 3.0])
    else:
        assert axes.get_xlabel() == "evaluation loss (nats)"
        assert list(axes.containers[0][0].get_xdata()) == pytest.approx([3.0, 2.7, 3.0])
    words = [text.get_text() for figure in drawn for text in figure.findobj(Text)]
    assert not [text for text in words if "accuracy" in text or "(%)" in text]


def test_one_seed_has_no_bars(drawn: list[Figure], tmp_path: Path) -> None:
    _draw(tmp_path / "plot.png", learning_rates=(1e-3,), seeds=1)
    bars = drawn[0].axes[0].containers[0][2][0].get_segments()
    assert all(start[0] == end[0] for start, end in bars)
