"""What the trainings of the study say: tables and a picture.

python -m benchmarks.warmup_free.tables

Differences are paired by seed, with intervals of 90% by Student's t, Holm-corrected over each family. "images" is the
standard error of a difference that comes from the test images, which all seeds share.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.warmup_free import search
from benchmarks.warmup_free.lab import RESULTS, Row, unpacked
from benchmarks.warmup_free.study import HELD, grid, replayed, rows
from nio_hf.report.style import BLUE, GREY, figure
from nio_hf.report.tables import markdown_table
from nio_hf.trials.interval import Interval, corrected, interval

TEST_IMAGES = 10_000
MODELS = {"vit": "ViT", "swin": "Swin"}
WARMUPS = ("warmup10", "warmup30")
COMMON = ("x2", "x4", "width")
AIM = 0.8
"""Share of the head-room that NIO is to reach."""
WITHOUT = {
    "nio_warmup10": "nio",
    "nio_seeded": "nio",
    "nio_muon": "muon",
    "xavier_nio": "xavier",
    "mimetic_nio": "mimetic",
}
"""{arm with NIO: what it is held against}."""
NAMES = {
    "class": "the class's own, no warmup",
    "warmup10": "warmup 10%",
    "warmup30": "warmup 30%",
    "x2": "`initializer_range` x2",
    "x4": "`initializer_range` x4",
    "width": "1 / sqrt(width)",
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
    "nio_warmup10": "NIO, warmup 10%",
    "nio_seeded": "NIO, GI-Adam",
    "nio_muon": "NIO, Muon",
    "xavier_nio": "NIO on Xavier",
    "mimetic_nio": "NIO on mimetic",
}
Family = Mapping[tuple[str, str], Interval]


@dataclasses.dataclass(frozen=True)
class Judged:
    """The trainings of an arm that judge.

    Attributes:
        rate: learning rate that was chosen.
        chosen: its mean accuracy on the images that chose, in %.
        lines: one for each seed.
    """

    rate: float
    chosen: float
    lines: Sequence[Row]

    @property
    def accuracies(self) -> list[float]:
        """On the test images, in %."""
        return [line["accuracy"] for line in self.lines]

    @property
    def cost(self) -> float:
        """Mean cost in training steps."""
        return statistics.fmean(line["cost"] for line in self.lines)

    @property
    def right(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """(images,) share of the seeds that tell each image rightly."""
        return np.mean([unpacked(line["right"], TEST_IMAGES) for line in self.lines], axis=0)


def judged(task: str) -> dict[str, Judged]:
    """{arm: its trainings that judge}, of the arms that have all of them."""
    name = f"rivals-{task}"
    found, lines = {}, rows(name)
    for arm in HELD[name].arms:
        _, rate = grid(name, arm, lines)
        own = {line["seed"]: line for line in lines if line["arm"] == arm and not line["choosing"]}
        if rate is not None and own.keys() >= set(HELD[name].judging):
            choosing = [
                line["accuracy"]
                for line in lines
                if line["arm"] == arm and line["choosing"] and line["learning_rate"] == rate
            ]
            found[arm] = Judged(rate, statistics.fmean(choosing), [own[seed] for seed in HELD[name].judging])
    return found


def difference(own: Judged, other: Judged) -> list[float]:
    """Points of accuracy, seed by seed."""
    return [a - b for a, b in zip(own.accuracies, other.accuracies, strict=True)]


def images_error(own: Judged, other: Judged) -> float:
    """Standard error of the mean difference that comes from the choice of the test images, in points."""
    each = 100 * (own.right - other.right)
    return float(each.std(ddof=1) / math.sqrt(len(each)))


def best(arms: Mapping[str, Judged], names: Sequence[str]) -> str:
    """The one of some arms with the best accuracy on the images that chose."""
    return max((name for name in names if name in arms), key=lambda name: arms[name].chosen)


def rivals() -> Family:
    """NIO minus each arm without NIO, in both models, corrected together; of warmup, the better length."""
    samples = {}
    for task in MODELS:
        arms = judged(task)
        left_out = {"nio", *WITHOUT, *WARMUPS} - {best(arms, WARMUPS)}
        for arm in arms.keys() - left_out:
            samples[task, arm] = difference(arms["nio"], arms[arm])
    return corrected(samples)


def additions() -> Family:
    """Each arm with NIO minus what it is held against, in both models, corrected together."""
    samples = {}
    for task in MODELS:
        arms = judged(task)
        for arm, other in WITHOUT.items():
            if arm in arms:
                samples[task, arm] = difference(arms[arm], arms[other])
    return corrected(samples)


def arms_table(task: str) -> str:
    """Each arm: learning rate, cost, accuracy; the best first."""
    arms = judged(task)
    order = sorted(arms, key=lambda arm: -statistics.fmean(arms[arm].accuracies))
    lines = [
        (
            NAMES[arm],
            f"{arms[arm].rate:g}",
            f"{arms[arm].cost:.0f}",
            f"{statistics.fmean(arms[arm].accuracies):.2f} ± {statistics.stdev(arms[arm].accuracies):.2f}",
        )
        for arm in order
    ]
    return markdown_table((MODELS[task], "learning rate", "cost, steps", "accuracy, %"), lines)


def family_table(family: Family, label: str, other: Mapping[str, str]) -> str:
    """Differences with their corrected intervals and the error of the test images; `other`: what arms are held against.

    An arm that is not in `other` is itself held against NIO.
    """
    lines, arms = [], {task: judged(task) for task in MODELS}
    for name in NAMES:
        cells = []
        for task in MODELS:
            found = family.get((task, name))
            cells += ["", ""] if found is None else [_cell(found), f"{_error(arms[task], name, other):.2f}"]
        if any(cells):
            against = f", minus {NAMES[other[name]]}" if name in other else ""
            lines.append((f"{NAMES[name]}{against}", *cells))
    return markdown_table((label, *(cell for task in MODELS.values() for cell in (task, "images"))), lines)


def _cell(found: Interval) -> str:
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _error(arms: Mapping[str, Judged], name: str, other: Mapping[str, str]) -> float:
    return images_error(arms[name], arms[other[name]]) if name in other else images_error(arms["nio"], arms[name])


def head_room(task: str) -> str:
    """How much a direct search finds over the best common factor, and NIO's share of it, in a sentence."""
    arms = judged(task)
    common = best(arms, COMMON)
    room = interval(difference(arms["searched"], arms[common]))
    gain = interval(difference(arms["nio"], arms[common]))
    tested = interval([own - AIM * most for own, most in zip(gain.values, room.values, strict=True)])
    found = replayed(f"search-{task}")
    said = (
        f"{MODELS[task]}: the direct search over {len(found.tried)} configurations finds {room} points over "
        f"{NAMES[common]} ({', '.join(search.named(found.best))}). NIO, with its cost paid, gains {gain}"
    )
    if room.low <= 0:
        return f"{said}. So there is no head-room that these seeds can tell."
    words = {True: "reached", False: "missed"}
    aim = words[tested.low > 0] if tested.low > 0 or tested.high < 0 else "neither reached nor missed for certain"
    return f"{said}, {gain.mean / room.mean:.0%} of it; the aim of {AIM:.0%} is {aim} ({tested} points beyond it)."


def draw(family: Family) -> None:
    """The differences of NIO from its rivals, with their intervals."""
    names = sorted({name for _, name in family}, key=lambda name: -family[next(k for k in family if k[1] == name)].mean)
    with figure(RESULTS / "rivals.png", width=7.5, height=1.2 + 0.3 * len(names)) as drawn:
        panels = drawn.subplots(1, len(MODELS), sharey=True, squeeze=False)[0]
        for axes, (task, title) in zip(panels, MODELS.items(), strict=True):
            known = [(place, family[task, name]) for place, name in enumerate(names) if (task, name) in family]
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
            axes.set_xlabel("points of accuracy, NIO minus the rival")
            axes.set_yticks(range(len(names)), [NAMES[name].replace("`", "") for name in names])
        panels[0].invert_yaxis()


def page() -> str:
    """All tables, and what the direct search says."""
    family = rivals()
    return "\n\n".join(
        [
            "\n".join(f"- {head_room(task)}" for task in MODELS),
            family_table(family, "NIO minus", {}),
            family_table(additions(), "with NIO", WITHOUT),
            *(arms_table(task) for task in MODELS),
        ]
    )


def main() -> int:
    """Print the tables and draw; returns the exit status."""
    sys.stdout.write(page() + "\n")
    draw(rivals())
    return 0


if __name__ == "__main__":
    sys.exit(main())
