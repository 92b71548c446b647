"""Plots of a comparison."""

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from nio_hf.metrics import ACCURACY, LOSS
from nio_hf.study.findings import Findings
from nio_hf.study.plots import plot_first_steps, plot_learning_rates
from tests.study.outcomes import outcome, plan

VALUES = {"no_warmup": 30.0, "warmup": 40.0, "nio": 50.0}


@pytest.mark.parametrize("rates", [(1e-3, 2e-3), (1e-3,)])
@pytest.mark.parametrize(("metric", "values"), [(ACCURACY, [31, 40.9, 51]), (LOSS, [31, 40.7, 51])])
def test_arms_are_lines_over_learning_rates_and_rows_of_a_single_one(metric, values, rates, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    made = plan(verdict_seeds=0, learning_rates=rates)
    known = {run: outcome(VALUES[run.arm] - run.warmup_ratio + run.seed) for run in made.selection()}
    found = Findings("recipe", made, known, metric, 10.0)
    plot_learning_rates(found, tmp_path / "rates.png")
    plot_first_steps(found, tmp_path / "steps.png")
    judged, loss = drawn[0].axes
    label = "accuracy (%)" if metric is ACCURACY else "evaluation loss (nats)"
    bars = judged.containers
    if len(rates) > 1:
        assert [list(container[0].get_xdata()) for container in bars] == [list(rates)] * 3
        assert [container[0].get_ydata()[0] for container in bars] == pytest.approx(values)
        assert judged.get_ylabel() == label
    else:
        length = "10%" if metric is ACCURACY else "30%"
        names = [text.get_text() for text in judged.get_yticklabels()]
        assert names == ["no_warmup", f"warmup ({length})", "nio"]
        assert list(bars[0][0].get_xdata()) == pytest.approx(values)
        assert len(list(loss.lines[0].get_xdata())) == 3
        assert judged.get_xlabel() == label
    words = [text.get_text() for figure in drawn for text in figure.findobj(Text)]
    assert any("accuracy" in text for text in words) == (metric is ACCURACY)
