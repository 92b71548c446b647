"""What the command lines of trials have in common."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nio_hf.durable.preemption import sigterm_handled_by
from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.loading import Recipe
from nio_hf.recipe.strict_yaml import read_overrides

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a command that SIGTERM ended, as shells count it."""
GO_ON = "The runs that have ended are kept: the same command goes on."
"""How to go on after Ctrl-C."""


@contextlib.contextmanager
def cleaned_up_at_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is within the context as an exit does, so that nothing temporary is left behind."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    with sigterm_handled_by(end):
        yield


def check_overrides(overrides: Sequence[str], decided: Mapping[str, str]) -> None:
    """Refuse settings that a command decides itself.

    Args:
        overrides: settings as command line options.
        decided: {setting: what to do instead}.

    Raises:
        RecipeError: lists all of them.
    """
    problems = [
        Problem(setting.where, "is decided by this command", decided[owner])
        for key, setting in read_overrides(overrides).items()
        if (owner := key.partition(".")[0]) in decided
    ]
    if problems:
        raise RecipeError(*problems)


def read_numbers(option: str, text: str | None, problems: list[Problem], example: str) -> list[float]:
    """The numbers between the commas of an option; anything else there becomes a problem.

    Args:
        option: name of the option, for the message.
        text: its value.
        problems: list to add to.
        example: a value, for the message.
    """
    found = []
    for part in (text or "").split(","):
        try:
            if part.strip():
                found.append(float(part))
        except ValueError:
            problems.append(Problem(option, f"{part!r} is no number", f"Give numbers between commas, e.g. {example}"))
    return found


def merge_problems(problems: Sequence[Problem], more: Sequence[Problem]) -> list[Problem]:
    """Problems, and more of them except for options that have one already."""
    places = {problem.where for problem in problems}
    return [*problems, *(problem for problem in more if problem.where not in places)]


def steps_of(recipe: Recipe, given: int | None, problems: list[Problem]) -> int:
    """Steps of a whole training: those given, or those of the recipe; 1 and a problem where there are none."""
    steps = recipe.training.max_steps if given is None else given
    if steps >= 1:
        return steps
    found = "nothing, and the recipe counts in epochs" if given is None else f"{given}"
    problems.append(Problem("--steps", found, "Give the training steps of a run, at least 1"))
    return 1


def directory_beside(recipe: Recipe, purpose: str) -> Path:
    """Where the trials of a recipe are kept, where no directory is given: beside what it trains."""
    output_dir = Path(str(recipe.training.output_dir)).absolute()
    return output_dir.with_name(f"{output_dir.name}-{purpose}")
