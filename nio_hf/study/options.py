"""Options and reports of the commands of studies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nio_hf.catalog import split_arguments
from nio_hf.console import print_results
from nio_hf.errors import Problem, RecipeError
from nio_hf.files import output_errors, write_atomically
from nio_hf.recipe.loading import load_recipe
from nio_hf.recipe.strict_yaml import read_overrides
from nio_hf.report.tables import markdown_table

GO_ON = "The runs that have ended are kept: the same command goes on."
"""How to go on after Ctrl-C."""
T = TypeVar("T")
TableOf = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Columns and rows."""


class Options:
    """The recipe of a command line, and the problems of its options.

    Args:
        arguments: Recipe and settings that override it.
        decided: {setting that the command decides itself: advice}.

    Raises:
        RecipeError: Settings that the command decides itself, or that the recipe cannot have.
    """

    def __init__(self, arguments: Sequence[str], decided: Mapping[str, str]) -> None:
        name, overrides = split_arguments(arguments)
        owners = {setting.where: key.partition(".")[0] for key, setting in read_overrides(overrides).items()}
        self._problems = [
            Problem(where, "is decided by this command", decided[owner])
            for where, owner in owners.items()
            if owner in decided
        ]
        self.check()
        self.recipe = load_recipe(name, overrides)

    def add(self, problems: Iterable[Problem]) -> None:
        """Add problems, except of options that have one already."""
        places = {problem.where for problem in self._problems}
        self._problems += [problem for problem in problems if problem.where not in places]

    def check(self) -> None:
        """Raise RecipeError if there are problems, with all of them."""
        if self._problems:
            raise RecipeError(*self._problems)

    def attempt(self, make: Callable[[], T], default: T) -> T:
        """Return the result of a function; if it raises problems, add them and return the default."""
        try:
            return make()
        except RecipeError as error:
            self.add(error.problems)
            return default

    def numbers(self, option: str, text: str, example: str) -> tuple[float, ...]:
        """Return the numbers between the commas of an option, rising; any other text there is a problem."""
        found: list[float] = []
        for part in filter(str.strip, text.split(",")):
            try:
                found.append(float(part))
            except ValueError:
                fix = f"Give numbers between commas, e.g. {example}"
                self.add([Problem(option, f"{part!r} is no number", fix)])
        return tuple(sorted(found))

    def steps(self, given: int | None) -> int:
        """Return the training steps of a run: those given, or those of the recipe; 1 with a problem without any."""
        steps = self.recipe.training.max_steps if given is None else given
        if steps < 1:
            found = "not given, and the recipe counts in epochs" if given is None else f"{given}"
            self.add([Problem("--steps", found, "Give the training steps of a run, at least 1")])
        return max(steps, 1)

    def directory(self, given: Path | None, purpose: str) -> Path:
        """Return the directory of a study: the one given, or one beside the `output_dir` of the recipe."""
        output_dir = Path(str(self.recipe.training.output_dir)).absolute()
        return given or output_dir.with_name(f"{output_dir.name}-{purpose}")


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a study.

    Attributes:
        title: Name of the recipe.
        question: Question that the study answers.
        words: Conclusions as sentences.
        sections: {heading: (text, table or None)}.
        numbers: All findings in plain values.
        plots: {description: (name of a file, function that draws it)}.
        more: {description: (name of a further file, its text)}.
    """

    title: str
    question: str
    words: Sequence[str]
    sections: Mapping[str, tuple[str, TableOf | None]]
    numbers: Mapping[str, Any]
    plots: Mapping[str, tuple[str, Callable[[Path], None]]]
    more: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def markdown(self) -> str:
        """Return the report as a page of Markdown."""
        parts = [f"# {self.title}: {self.question}", "\n".join(f"- {sentence}" for sentence in self.words)]
        for heading, (text, table) in self.sections.items():
            parts += [f"## {heading}", text] + ([] if table is None else [markdown_table(*table)])
        return "\n\n".join(parts) + "\n"

    def publish(self, directory: Path, name: str) -> None:
        """Write NAME.md, NAME.json and the other files into a directory, and print the report.

        Raises:
            OutputError: A file that cannot be written.
        """
        numbers = json.dumps(self.numbers, indent=1) + "\n"
        texts = {**self.more, "Table": (f"{name}.md", self.markdown()), "Numbers": (f"{name}.json", numbers)}
        with output_errors(directory, trained=False):
            for file, text in texts.values():
                write_atomically(directory / file, text)
        for file, draw in self.plots.values():
            draw(directory / file)
        tables = {heading: table for heading, (_, table) in self.sections.items() if table is not None}
        written = {what: directory / file for what, (file, _) in {**texts, **self.plots}.items()}
        print_results(self.title, tables, self.words, written)
