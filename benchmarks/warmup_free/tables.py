"""What the trainings of the study say: tables and a picture.

python -m benchmarks.warmup_free.tables

Differences are paired by seed, with intervals of 90% by Student's t, Holm-corrected over each family. "images" is the
standard error of a difference that comes from the test images, which all seeds share.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.warmup_free import search
from benchmarks.warmup_free.images import unpacked
from benchmarks.warmup_free.lab import RESULTS, Row, score
from benchmarks.warmup_free.study import HELD, SEARCHED_BY, grid, replayed, rows
from benchmarks.warmup_free.texts import unpacked_losses
from nio_hf.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, figure
from nio_hf.report.tables import markdown_table
from nio_hf.study.intervals import Interval, corrected, interval

TEST_IMAGES = 10_000
MODELS = {"rivals-vit": "ViT", "rivals-swin": "Swin"}
"""{part that holds all rivals against each other on images: its model}."""
TEXTS = {"text-gpt2": "GPT-2", "text-llama": "Llama", "text-bert": "BERT"}
"""The same for text."""
LENGTHS = {
    "ViT": {500: "rivals-vit", 2500: "length-2500", 10_000: "length-10000"},
    **{title: {500: part, 5000: f"{part}-5000"} for part, title in TEXTS.items()},
}
"""{model: {steps: part that trained so long}}."""
PLACES = {"where-width192": "width 192", "where-depth12": "12 layers", "where-imagenette64": "Imagenette, 64 pixels"}
"""{part that trained under other conditions: what is different}."""
COLORS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
RACED = ("nio", "x4", "class")
RACE_WINDOW = slice(4, 5)
"""Of the kept mean losses of a training of 500 steps: those of steps 100 to 125, about the end of a race of 120."""
WARMUPS = ("warmup2", "warmup5", "warmup10", "warmup30")
COMMON = ("x2", "x4", "width")
AIM = 0.8
"""Share of the head-room that NIO is to reach."""
WITHOUT = {
    "nio_half": "nio",
    "nio_warmup10": "nio",
    "nio_seeded": "nio",
    "nio_muon": "muon",
    "xavier_nio": "xavier",
    "mimetic_nio": "mimetic",
}
"""{arm with NIO: what it is held against}."""
NAMES = {
    "class": "the class's own, no warmup",
    "warmup2": "warmup 2%",
    "warmup5": "warmup 5%",
    "warmup10": "warmup 10%",
    "warmup30": "warmup 30%",
    "x2": "`initializer_range` x2",
    "x4": "`initializer_range` x4",
    "width": "1 / sqrt(width)",
    "residual": "GPT-2's residual scaling",
    "xavier": "Xavier",
    "mimetic": "mimetic",
    "structured": "structured",
    "lsuv": "LSUV",
    "positions8": "x4, positions x8",
    "positions32": "x4, positions x32",
    "searched": "direct search",
    "gi_adam": "GI-Adam",
    "radam": "RAdam",
    "schedule_free": "schedule-free RAdam",
    "muon": "Muon",
    "nio": "NIO",
    "nio_half": "NIO, strength 0.5",
    "nio_warmup10": "NIO, warmup 10%",
    "nio_seeded": "NIO, GI-Adam",
    "nio_muon": "NIO, Muon",
    "xavier_nio": "NIO on Xavier",
    "mimetic_nio": "NIO on mimetic",
}
Family = Mapping[tuple[str, str], Interval]
"""{(part, arm): difference}."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """The trainings of an arm that judge.

    Attributes:
        rate: Learning rate that was chosen.
        chosen: Its mean score on the samples that chose.
        lines: One for each seed.
    """

    rate: float
    chosen: float
    lines: Sequence[Row]

    @property
    def scores(self) -> list[float]:
        """Accuracy on the test images in %, or minus the loss on the test blocks."""
        return [score(line) for line in self.lines]

    @property
    def digits(self) -> int:
        """Digits behind the point that a score is told with."""
        return 2 if "accuracy" in self.lines[0] else 3

    @property
    def text(self) -> str:
        """The mean of the accuracy or the loss, with its standard deviation over seeds."""
        spread = statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan
        return f"{abs(statistics.fmean(self.scores)):.{self.digits}f} ± {spread:.{self.digits}f}"

    @property
    def cost(self) -> float:
        """Mean cost in training steps."""
        return statistics.fmean(line["cost"] for line in self.lines)

    @property
    def by_sample(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """(test samples,) the score of each, a mean over the seeds."""
        if "accuracy" in self.lines[0]:
            return 100 * np.mean([unpacked(line["right"], TEST_IMAGES) for line in self.lines], axis=0)
        return -np.mean([unpacked_losses(line["right"]).astype(np.float64) for line in self.lines], axis=0)


def judged(part: str) -> dict[str, Judged]:
    """{arm: its trainings that judge}, of the arms that have all of them."""
    found, lines, held = {}, rows(part), HELD[part]
    for arm in held.arms:
        _, rate = grid(part, arm, lines)
        own = {line["seed"]: line for line in lines if line["arm"] == arm and not line["choosing"]}
        if rate is not None and own.keys() >= set(held.judging):
            choosing = [
                score(line)
                for line in lines
                if (line["arm"], line["choosing"], line["learning_rate"]) == (arm, True, rate)
            ]
            chosen = statistics.fmean(choosing) if choosing else math.nan
            found[arm] = Judged(rate, chosen, [own[seed] for seed in held.judging])
    return found


def difference(own: Judged, other: Judged) -> list[float]:
    """Of the scores, seed by seed."""
    return [a - b for a, b in zip(own.scores, other.scores, strict=True)]


def samples_error(own: Judged, other: Judged) -> float:
    """Standard error of the mean difference that comes from the choice of the test samples."""
    each = own.by_sample - other.by_sample
    return float(each.std(ddof=1) / math.sqrt(len(each)))


def best(arms: Mapping[str, Judged], names: Sequence[str]) -> str:
    """The one of some arms that is best on the samples that chose."""
    return max((name for name in names if name in arms), key=lambda name: arms[name].chosen)


def rivals(parts: Iterable[str]) -> Family:
    """NIO minus each arm without NIO, in some parts, corrected together; of warmup, the length that was chosen."""
    return others(parts, lambda arms: arms.keys() - ({*WITHOUT, *WARMUPS} - {best(arms, WARMUPS)}))


def others(parts: Iterable[str], of: Callable[[Mapping[str, Judged]], Collection[str]] = lambda arms: arms) -> Family:
    """NIO minus each of the other arms, or of those that `of` chooses, in parts that have NIO, corrected together."""
    found = {part: arms for part in parts if "nio" in (arms := judged(part))}
    return corrected(
        {
            (part, arm): difference(arms["nio"], arms[arm])
            for part, arms in found.items()
            for arm in arms
            if arm != "nio" and arm in of(arms)
        }
    )


def by_length(model: str) -> Family:
    """NIO minus each of the arms of the longer trainings of a model, where done; Holm-corrected by length."""
    parts = LENGTHS[model]
    done = complete(dict.fromkeys(parts.values(), ""))
    arms = {arm for steps, part in parts.items() if part in done and steps > min(parts) for arm in HELD[part].arms}
    families = [others([part], lambda judged_arms: judged_arms.keys() & arms) for part in done]
    return {key: found for family in families for key, found in family.items()}


def additions(parts: Iterable[str]) -> Family:
    """Each arm with NIO minus what it is held against, in some parts, corrected together."""
    samples = {}
    for part in parts:
        arms = judged(part)
        for arm, other in WITHOUT.items():
            if arm in arms:
                samples[part, arm] = difference(arms[arm], arms[other])
    return corrected(samples)


def arms_table(part: str, title: str) -> str:
    """Each arm: learning rate, cost, accuracy or loss; the best first."""
    arms = judged(part)
    order = sorted(arms, key=lambda arm: -statistics.fmean(arms[arm].scores))
    is_accuracy = "accuracy" in arms[order[0]].lines[0]
    lines = [(NAMES[arm], f"{arms[arm].rate:g}", f"{arms[arm].cost:.0f}", arms[arm].text) for arm in order]
    return markdown_table((title, "learning rate", "cost, steps", "accuracy, %" if is_accuracy else "loss"), lines)


def family_table(family: Family, label: str, other: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """Differences with their corrected intervals and the error that comes from the test samples.

    Args:
        family: Differences.
        label: Head of the column of arms.
        other: {arm: what it is held against}; NIO is held against an arm that is not in it.
        parts: {part: its title}.
    """
    lines, arms = [], {part: judged(part) for part in parts}
    for name in NAMES:
        cells = []
        for part in parts:
            found = family.get((part, name))
            cells += ["", ""] if found is None else _cells(found, arms[part], name, other)
        if any(cells):
            against = f", minus {NAMES[other[name]]}" if name in other else ""
            lines.append((f"{NAMES[name]}{against}", *cells))
    return markdown_table((label, *(cell for title in parts.values() for cell in (title, "samples"))), lines)


def rows_table(family: Family, label: str, parts: Mapping[str, str]) -> str:
    """A row for each part that is done: what NIO ends at, its cost, and its differences from the others.

    Args:
        family: Differences of NIO from the others.
        label: Head of the column of parts.
        parts: {part: its title}.
    """
    names = [name for name in NAMES if any(arm == name for _, arm in family)]
    lines = []
    for part, title in parts.items():
        arms = judged(part)
        if "nio" in arms:
            own = arms["nio"]
            cells = [_with_ends(family[part, name], own) if (part, name) in family else "" for name in names]
            lines.append((title, own.text, f"{own.cost:.0f}", *cells))
    return markdown_table((label, "NIO", "cost, steps", *(f"minus {NAMES[name]}" for name in names)), lines)


def race_table(part: str, title: str) -> str:
    """What a race of NIO, x4 and the class's own would have chosen, at each learning rate that all of them have.

    The winner is the one with the lowest loss about step 120, on each seed that chooses; its cost is not paid.
    """
    ended: dict[float, dict[int, dict[str, Row]]] = {}
    for row in rows(part):
        if row["choosing"] and row["arm"] in RACED:
            ended.setdefault(row["learning_rate"], {}).setdefault(row["seed"], {})[row["arm"]] = row
    lines = []
    for rate, seeds in sorted(ended.items()):
        full = [arms for arms in seeds.values() if set(arms) == set(RACED)]
        if full:
            winners = [min(RACED, key=lambda arm, arms=arms: _raced_loss(arms[arm])) for arms in full]
            means = [statistics.fmean(score(arms[arm]) for arms in full) for arm in RACED]
            won = statistics.fmean(score(arms[winner]) for arms, winner in zip(full, winners, strict=True))
            best_of_all = statistics.fmean(max(map(score, arms.values())) for arms in full)
            counts = ", ".join(f"{NAMES[arm]} {winners.count(arm)}" for arm in RACED if arm in winners)
            lines.append((f"{rate:g}", counts, *(f"{value:.1f}" for value in (*means, won, best_of_all))))
    head = (f"{title}: learning rate", "winners", *(NAMES[arm] for arm in RACED), "the winner", "the best in the end")
    return markdown_table(head, lines)


def _raced_loss(row: Row) -> float:
    """Loss at the end of a race; infinite for a training that had failed by then."""
    return min(row["losses"][RACE_WINDOW], default=math.inf)


def _cells(found: Interval, arms: Mapping[str, Judged], name: str, other: Mapping[str, str]) -> list[str]:
    own, against = (arms[name], arms[other[name]]) if name in other else (arms["nio"], arms[name])
    return [_with_ends(found, own), f"{samples_error(own, against):.{own.digits}f}"]


def _with_ends(found: Interval, of: Judged) -> str:
    return f"{found.mean:+.{of.digits}f} ({found.low:+.{of.digits}f} to {found.high:+.{of.digits}f})"


def head_room(search_part: str) -> str:
    """How much a direct search finds over the best common factor, and NIO's share of it, in a sentence."""
    part = SEARCHED_BY[search_part]
    arms = judged(part)
    common = best(arms, COMMON)
    room = interval(difference(arms["searched"], arms[common]))
    gain = interval(difference(arms["nio"], arms[common]))
    tested = interval([own - AIM * most for own, most in zip(gain.values, room.values, strict=True)])
    found = replayed(search_part)
    said = (
        f"{MODELS[part]}: the direct search over {len(found.tried)} configurations finds {room} points over "
        f"{NAMES[common]} ({', '.join(search.named(found.best))}). NIO, with its cost paid, gains {gain}"
    )
    if room.low <= 0:
        return f"{said}. So there is no head-room that these seeds can tell."
    words = {True: "reached", False: "missed"}
    aim = words[tested.low > 0] if tested.low > 0 or tested.high < 0 else "neither reached nor missed for certain"
    return f"{said}, {gain.mean / room.mean:.0%} of it; the aim of {AIM:.0%} is {aim} ({tested} points beyond it)."


def draw(family: Family, parts: Mapping[str, str], unit: str, target: Path) -> None:
    """The differences of NIO from its rivals, with their intervals."""
    names = sorted({name for _, name in family}, key=lambda name: -family[next(k for k in family if k[1] == name)].mean)
    with figure(target, width=2.5 + 2.5 * len(parts), height=1.2 + 0.3 * len(names)) as drawn:
        panels = drawn.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (part, title) in zip(panels, parts.items(), strict=True):
            known = [(place, family[part, name]) for place, name in enumerate(names) if (part, name) in family]
            axes.axvline(0, color=GREY, linewidth=1)
            axes.errorbar(
                [found.mean for _, found in known],
                [place for place, _ in known],
                xerr=[found.half_width for _, found in known],
                color=BLUE,
                marker="o",
                markersize=5,
                linestyle="none",
                capsize=3,
            )
            axes.set_title(title)
            axes.set_yticks(range(len(names)), [NAMES[name].replace("`", "") for name in names])
        panels[len(parts) // 2].set_xlabel(unit)
        panels[0].invert_yaxis()


def draw_lengths(models: Sequence[str], target: Path) -> None:
    """The differences of NIO from the others by length of training, with their intervals."""
    with figure(target, width=4.2 * len(models), height=3.4) as drawn:
        for axes, model in zip(drawn.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            family, steps_of = by_length(model), {part: steps for steps, part in LENGTHS[model].items()}
            names = [name for name in NAMES if any(arm == name for _, arm in family)]
            axes.axhline(0, color=GREY, linewidth=1)
            for number, (name, color) in enumerate(zip(names, itertools.cycle(COLORS))):
                known = [(steps_of[part], found) for (part, arm), found in family.items() if arm == name]
                axes.errorbar(
                    # A little apart, so that no interval covers another.
                    [steps * 1.04 ** (number - len(names) / 2) for steps, _ in known],
                    [found.mean for _, found in known],
                    yerr=[found.half_width for _, found in known],
                    color=color,
                    marker="o",
                    markersize=4,
                    capsize=3,
                    label=NAMES[name].replace("`", ""),
                )
            axes.set_xscale("log")
            axes.set_xticks(list(LENGTHS[model]), [f"{steps:,}" for steps in LENGTHS[model]])
            axes.minorticks_off()
            axes.set_title(model)
            axes.set_xlabel("steps of the training")
            axes.legend(fontsize="small")
        drawn.axes[0].set_ylabel("points of accuracy, NIO minus the other" if models == ["ViT"] else "NIO's gain")


def page(parts: Mapping[str, str], searches: Sequence[str]) -> list[str]:
    """All tables of some parts, and what direct searches say."""
    return [
        *(f"- {head_room(search_part)}" for search_part in searches),
        family_table(rivals(parts), "NIO minus", {}, parts),
        family_table(additions(parts), "with NIO", WITHOUT, parts),
        *(arms_table(part, title) for part, title in parts.items()),
    ]


def complete(parts: Mapping[str, str]) -> dict[str, str]:
    """The parts whose trainings are all made."""
    return {part: title for part, title in parts.items() if judged(part).keys() == set(HELD[part].arms)}


def blocks() -> list[str]:
    """The tables and sentences of all parts that are complete."""
    found = []
    for parts in (MODELS, TEXTS):
        if done := complete(parts):
            searches = [name for name, part in SEARCHED_BY.items() if part in done]
            found += page(done, searches)
    for model, lengths in LENGTHS.items():
        done = complete({part: f"{steps:,}" for steps, part in lengths.items()})
        if len(done) > 1:
            found.append(rows_table(by_length(model), f"{model}, steps", done))
    if done := complete(PLACES):
        found.append(rows_table(others(done), "where", done))
    return [*found, *(race_table(part, title) for part, title in complete(MODELS).items())]


def main() -> int:
    """Print the tables and draw; returns the exit status."""
    sys.stdout.write("\n\n".join(blocks()) + "\n")
    for parts, unit, target in (
        (MODELS, "points of accuracy, NIO minus the rival", "rivals.png"),
        (TEXTS, "loss, the rival minus NIO", "texts.png"),
    ):
        if done := complete(parts):
            draw(rivals(done), done, unit, RESULTS / target)
    for models, target in ((["ViT"], "lengths.png"), (list(TEXTS.values()), "text-lengths.png")):
        shown = [model for model in models if len(complete(dict.fromkeys(LENGTHS[model].values(), ""))) > 1]
        if shown:
            draw_lengths(shown, RESULTS / target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
