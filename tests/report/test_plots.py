"""Plots and tables of runs of any size."""

import contextlib
import dataclasses
import io
import math

import pytest
from PIL import Image

from nio_hf.core import NIOConfig
from nio_hf.errors import OutputError
from nio_hf.report import history, plot_history, plot_scales, plot_training, plots, style, summary_rows
from nio_hf.report.tables import MOST_GROUPS, markdown_table, scale_table
from tests.report.runs import KINDS, measured, result


@pytest.mark.parametrize(
    "drawn",
    [
        result(),
        result(1, 1, 1),
        result(4, 24, groups=4),
        result(50, 200, groups=600),
        result(4, 3, groups=MOST_GROUPS, config=NIOConfig(loss_bound=None, least_norm=None)),
        result(4, 0, status="unchanged"),
        result(4, 60, groups=48, config=NIOConfig.published()),
        result(1, 9, config=NIOConfig.published(gamma=None, overlap=0.0)),
    ],
    ids=["few", "one", "named", "many", "unbounded", "no candidate", "published", "without gamma"],
)
def test_results_of_any_size_and_search_are_drawn(drawn, tmp_path):
    for draw in (plot_scales, plot_history):
        path = tmp_path / "plots" / f"{draw.__name__}.png"
        draw(drawn, path)
        with Image.open(path) as image:
            assert min(image.size) > 400
            assert len(image.convert("L").resize((64, 64)).getcolors()) > 5, "nothing is drawn"


@pytest.fixture
def figures(monkeypatch):
    kept = []

    @contextlib.contextmanager
    def figure(*args, **kwargs):
        with style.figure(*args, **kwargs) as drawn:
            kept.append(drawn)
            yield drawn

    for module in (history, plots):
        monkeypatch.setattr(module, "figure", figure)
    return kept


def points(axes, label):
    """The x of all points with a label."""
    return [float(x) for line in axes.lines if line.get_label() == label for x in line.get_xdata()]


def test_refused_trials_stand_between_before_and_after_with_the_bounds(figures):
    drawn = result(4, 5, groups=4)
    plot_history(drawn, io.BytesIO())
    cosine, norm, loss = figures[0].axes
    refused = "refused: broke a bound"
    assert points(cosine, refused) == points(norm, refused) == [1, 3, 4]
    assert points(loss, refused) == [1, 2, 3, 4], "the loss of the second is NaN: no point, and room on the axis"
    most, least = 1.5 * drawn.before.loss, 0.6 * drawn.before.grad_norm
    assert points(loss, f"loss bound: {most:.4g}") == points(norm, f"least norm: {least:.4g}") == [0, 1]
    assert [line.get_ydata()[0] for line in loss.lines if "bound:" in str(line.get_label())] == [most]
    assert [line.get_ydata()[0] for line in norm.lines if "least" in str(line.get_label())] == [least]
    for axes in (cosine, norm, loss):
        assert axes.get_legend_handles_labels()[1][-2:] == [
            f"report batches {when} (± standard error)" for when in ("before", "after")
        ]
    ticks = [tick.get_text() for tick in loss.get_xticklabels()]
    assert ticks == ["before", *(record.tried for record in drawn.history[:-1]), "after"]


def test_what_is_accepted_at_once_is_before_and_after_alone(figures):
    plot_history(result(4, 1, config=NIOConfig(loss_bound=None, least_norm=None)), io.BytesIO())
    loss = figures[0].axes[-1]
    assert [tick.get_text() for tick in loss.get_xticklabels()] == ["before", "after"]
    assert not any("bound" in label or "norm" in label for label in loss.get_legend_handles_labels()[1])


def test_steps_are_curves_with_a_rug_where_they_lower_the_norm(figures):
    plot_history(result(4, 60, groups=48, config=NIOConfig.published()), io.BytesIO())
    cosine, norm, loss = figures[0].axes
    assert len(points(cosine, "batch of the iteration")) == 60
    assert points(norm, "steps that lower the norm (6 of 60)") == [9, 18, 27, 36, 45, 54]
    assert points(norm, "gamma = 10") == [0, 1]
    assert loss.get_xlabel() == "NIO iteration"


def test_an_objective_other_than_gradcosine_has_a_panel(figures):
    drawn = dataclasses.replace(result(config=NIOConfig.published()), method="gradinit")
    other = tuple(dataclasses.replace(record, objective=-2.0) for record in drawn.history)
    plot_history(dataclasses.replace(drawn, history=other), io.BytesIO())
    plot_history(drawn, io.BytesIO())
    assert [axes.get_ylabel() for axes in figures[0].axes][:2] == ["objective", "GradCosine"]
    assert [axes.get_ylabel() for axes in figures[1].axes][:2] == ["GradCosine", "gradient norm"]


def test_scales_are_told_apart_by_group_where_there_are_several(figures):
    by_kind = [*KINDS]
    for groups, labels in ((1, by_kind), (2, ["group 0: 1", "group 1: 1.3"]), (MOST_GROUPS + 1, by_kind)):
        plot_scales(result(4, groups=groups), io.BytesIO())
        assert figures[-1].axes[0].get_legend_handles_labels()[1] == labels
    plot_scales(result(4, groups=MOST_GROUPS), io.BytesIO())
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in figures[-1].axes[0].lines}
    assert len({look[1:] for look in looks}) == MOST_GROUPS + 1, "of the groups, and the line at 1"


@pytest.mark.parametrize(
    ("log", "labels"),
    [
        ([], [[]]),
        ([{"step": 1, "loss": 2.0}], [["training"]]),
        (
            [{"step": i, "loss": 1 / i} for i in range(1, 90)] + [{"step": 9, "eval_loss": 1.0, "eval_accuracy": 0.5}],
            [["training", "evaluation"], ["evaluation"]],
        ),
        ([{"step": 3, "eval_loss": 1.0}, {"step": 0, "nio_loss": 2.0}], [["evaluation"]]),
    ],
)
def test_training_is_drawn_from_whatever_was_logged(log, labels, figures):
    plot_training(log, io.BytesIO())
    assert [axes.get_legend_handles_labels()[1] for axes in figures[0].axes] == labels


def test_a_plot_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Free space or choose another"):
        plot_scales(result(), tmp_path / "file" / "plot.png")


def test_the_table_holds_what_is_known():
    rows = summary_rows(result(), {"eval_accuracy": 0.9639, "eval_loss": 0.12, "train_runtime": 61.24})
    table = {name: (before, after) for name, before, after in rows}
    error = measured(0.1).standard_error
    assert table["GradCosine (D = 4, B/D = 16)"] == (f"0.0123 ± {error:.4f}", f"0.2176 ± {error:.4f}")
    assert table["Evaluation accuracy"] == ("", "96.39%")
    assert table["Cost of NIO in training steps"] == ("", "33.5")
    assert table["Seconds of NIO"] == ("", "7.2")
    assert table["Seconds of training"] == ("", "61.2")
    assert [name for name, *_ in summary_rows(None, {"eval_loss": 0.12})] == ["Evaluation loss"]
    assert math.isnan(measured(0.1, 1).standard_error)
    assert "±" not in summary_rows(result(parts=1), {})[0][1]


def test_scales_are_listed_by_group_or_by_kind():
    table = scale_table(result())
    assert table.columns == ("group", "tensors", "parameters", "scale")
    assert table.rows == [("group 0", "24", "4,608", "1.000")]
    assert [row[0] for row in scale_table(result(groups=3)).rows] == ["group 0", "group 1", "group 2"]
    many = scale_table(result(4, groups=MOST_GROUPS + 1))
    assert many.caption == "Scales of 13 groups by kind of tensors"
    assert [row[0] for row in many.rows] == [*KINDS]
    assert all(row[1] == "12" and float(row[3]) <= float(row[4]) <= float(row[5]) for row in many.rows)


def test_a_bar_in_a_name_is_no_column():
    assert markdown_table(("a",), [("fc1|fc2",)]).splitlines()[-1] == r"| fc1\|fc2 |"
