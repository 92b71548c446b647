"""Table, JSON, plot and recipe settings of a search, and what it says in words."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from nio_hf.files import output_errors, write_atomically
from nio_hf.report.style import BLUE, GREY, figure
from nio_hf.report.tables import markdown_table
from nio_hf.trials.interval import gain_text
from nio_hf.trials.run import Arm
from nio_hf.tuning.plan import OWN, tuned_settings
from nio_hf.tuning.tuning import Tuned

COLUMNS = ("settings", "rounds", "loss", "against own", "cost (steps)", "GradCosine", "gradient norm")


def sentences(tuned: Tuned) -> list[str]:
    """What a search says, in words."""
    plan, chosen = tuned.plan, tuned.chosen
    probes = [outcome for run, outcome in tuned.outcomes.items() if run.stage == "probe"]
    cost = sum(outcome.cost_steps for outcome in probes)
    said = [
        f"{len(probes)} probes of {plan.probe_steps} steps took {plan.spent(tuned.outcomes):,.0f} training steps, "
        f"{cost:,.0f} of them for initialisations."
    ]
    if tuned.rounds < plan.seeds:
        said.append(f"The budget ended the search after {tuned.rounds} of {plan.seeds} rounds.")
    if chosen is OWN:
        return [*said, "No candidate does better than the recipe's own settings."]
    own, losses = plan.losses(OWN, tuned.outcomes), plan.losses(chosen, tuned.outcomes)
    said.append(
        f"Chosen: {chosen.description}. Loss {statistics.fmean(losses):.4f} after {plan.probe_steps} steps, "
        f"{statistics.fmean(own):.4f} with the recipe's own settings (mean of {tuned.rounds} seeds)."
    )
    if tuned.difference is None:
        return [*said, "It was not judged: a short training chose it, a long one may not agree."]
    word = {"better": "better than", "worse": "worse than", "undecided": "not significantly different from"}[tuned.word]
    advice = "" if tuned.word == "better" else ": keep those"
    said.append(
        f"On {plan.verdict_seeds} fresh seeds and {plan.steps:,} steps it is {word} {OWN.description} "
        f"(a gain of {gain_text(tuned.metric, tuned.difference)}, 90% paired interval){advice}."
    )
    return said


def rows(tuned: Tuned) -> list[tuple[str, ...]]:
    """One row for each candidate, the best first, as `COLUMNS`."""
    return [_row(tuned, arm) for arm in tuned.candidates]


def _row(tuned: Tuned, arm: Arm) -> tuple[str, ...]:
    plan = tuned.plan
    losses, own = plan.losses(arm, tuned.outcomes), plan.losses(OWN, tuned.outcomes)
    mean, difference = statistics.fmean(losses), statistics.fmean(losses) - statistics.fmean(own[: len(losses)])
    known = [outcome for run, outcome in tuned.outcomes.items() if (run.stage, run.arm) == ("probe", arm.name)]
    measured = [outcome.initialisation for outcome in known if outcome.initialisation is not None]
    return (
        arm.description,
        f"{len(losses)}",
        f"{mean:.4f}" if math.isfinite(mean) else "failed",
        f"{difference:+.4f}" if arm is not OWN and math.isfinite(difference) else "-",
        f"{statistics.fmean(outcome.cost_steps for outcome in known):.1f}",
        _after([entry["grad_cosine"] for entry in measured]),
        _after([entry["grad_norm"] for entry in measured]),
    )


def _after(pairs: list[list[float]]) -> str:
    """Mean before -> mean after."""
    if not pairs:
        return "-"
    before, after = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return f"{before:.3g} -> {after:.3g}"


def write_report(tuned: Tuned, directory: Path) -> dict[str, Path]:
    """Write table, JSON, plot and the settings that were chosen into a directory.

    Returns:
        {what: file}.

    Raises:
        OutputError: where a file cannot be written.
    """
    written = {
        "Settings": directory / "tuned.yaml",
        "Table": directory / "tuning.md",
        "Numbers": directory / "tuning.json",
        "Plot": directory / "probes.png",
    }
    with output_errors(directory, trained=False):
        write_atomically(written["Settings"], settings_yaml(tuned))
        write_atomically(written["Table"], markdown(tuned))
        write_atomically(written["Numbers"], json.dumps(to_dict(tuned), indent=1) + "\n")
    plot_probes(tuned, written["Plot"])
    return written


def settings_yaml(tuned: Tuned) -> str:
    """The settings to put into a recipe: commented out where its own were judged to be as good or better."""
    comments = [f"# {sentence}" for sentence in sentences(tuned)]
    advised = tuned.difference is None or tuned.word == "better"
    settings = [
        f"{'' if advised else '# '}{key}: {json.dumps(value)}" for key, value in tuned_settings(tuned.chosen).items()
    ]
    return "\n".join([f"# {tuned.title}", *comments, *settings]) + "\n"


def to_dict(tuned: Tuned) -> dict[str, Any]:
    """The search in plain values."""
    return {
        "recipe": tuned.title,
        "metric": dataclasses.asdict(tuned.metric),
        "plan": dataclasses.asdict(tuned.plan),
        "candidates": [
            {
                "name": arm.name,
                "settings": tuned_settings(arm),
                "losses": [loss if math.isfinite(loss) else None for loss in tuned.plan.losses(arm, tuned.outcomes)],
            }
            for arm in tuned.candidates
        ],
        "rounds": tuned.rounds,
        "spent_steps": tuned.plan.spent(tuned.outcomes),
        "chosen": tuned.chosen.name,
        "difference": None if tuned.difference is None else dataclasses.asdict(tuned.difference),
        "word": tuned.word,
        "words": sentences(tuned),
    }


def markdown(tuned: Tuned) -> str:
    """The search as a page of Markdown."""
    parts = [
        f"# {tuned.title}: settings of NIO",
        "\n".join(f"- {sentence}" for sentence in sentences(tuned)),
        f"## Probes of {tuned.plan.probe_steps} steps at learning rate {tuned.plan.learning_rate:g}, without warmup",
        "Mean loss on a part of the training data; after each round the better half is left.",
        markdown_table(COLUMNS, rows(tuned)),
    ]
    return "\n\n".join(parts) + "\n"


def plot_probes(tuned: Tuned, target: Path) -> None:
    """Draw the loss of each probe, a line for each candidate, the best on top.

    Raises:
        OutputError: where the file cannot be written.
    """
    with figure(target, width=8.5, height=1.6 + 0.28 * len(tuned.candidates)) as drawn:
        axes = drawn.subplots()
        for place, arm in enumerate(tuned.candidates):
            losses = tuned.plan.losses(arm, tuned.outcomes)
            color = BLUE if arm in (tuned.chosen, OWN) else GREY
            axes.plot(losses, [place] * len(losses), "o", color=color, markersize=4, alpha=0.6)
            axes.plot([statistics.fmean(losses)], [place], "|", color=color, markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(tuned.candidates)), [arm.description for arm in tuned.candidates])
        axes.invert_yaxis()
        axes.set_xlabel(f"loss after {tuned.plan.probe_steps} steps (dots: seeds; bar: mean)")
        axes.set_title(f"{tuned.title}: probes")
