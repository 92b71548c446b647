"""The arms of `nio-hf compare`, each a change to the initialisation or the first steps of the same training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.strict_yaml import parse_scalar
from nio_hf.study.plan import DECIDED, QUIET, WITH_NIO, Arm

NO_WARMUP, WARMUP = "no_warmup", "warmup"
_OWN_OF_ARMS = {
    **dict.fromkeys(("nio", "nio_method", "nio_seed_optimizer", "optimizer"), "Use --arms"),
    "nio_method_kwargs": "Use --arm, e.g. --arm long=gradinit,nio_method_kwargs.iterations=60",
}
CONTROLLED = {**DECIDED, **_OWN_OF_ARMS, "learning_rate": "Use --learning_rates", "warmup_steps": "Use --warmup_ratios"}
"""{setting of the recipe that a comparison decides itself: advice}."""


def _arm(name: str, description: str, **settings: Any) -> Arm:
    plain = {"nio": False, "nio_seed_optimizer": None, "optimizer": None}
    return Arm(name, description, {**plain, **settings}, has_warmup=name == WARMUP)


def _method(name: str, description: str, method: str | None = None, **options: float) -> Arm:
    settings = {"nio_method": method or name, "nio_method_kwargs": options or None}
    return _arm(name, f"{description}, no warmup", nio=True, **settings)


_SCHEDULE_FREE = {"optim": "schedule_free_radam", "lr_scheduler_type": "constant"}
_POSITIONS = "four times the standard deviation, positions and tokens 128 times"
_SEEDED = {"nio_seed_optimizer": "gi_adam"}
_KNOWN = (
    _arm(NO_WARMUP, "the model's own initialisation, no warmup"),
    _arm(WARMUP, "linear warmup of the learning rate"),
    _method("nio", "NIO"),
    _arm("gi_adam", "Adam's second moment seeded (GI-Adam), no warmup", **_SEEDED),
    _arm("nio_seeded", "NIO and the second moment seeded, no warmup", **WITH_NIO, **_SEEDED),
    _arm("uncorrected", "second moment seeded without bias correction", nio_seed_optimizer="uncorrected"),
    _arm("radam", "RAdam, no warmup", optimizer="radam"),
    _arm("muon", "Muon for the matrices of the trunk, no warmup", optimizer="muon"),
    _arm("schedule_free", "schedule-free RAdam, neither warmup nor schedule", **_SCHEDULE_FREE),
    _method("x4", "four times the standard deviation", "range", factor=4.0),
    _method("width", "standard deviation 1 / sqrt(width)", "range"),
    _method("x4_positions", _POSITIONS, "range", factor=4.0, additive=32.0),
    _method("xavier", "Xavier initialisation"),
    _method("mimetic", "mimetic initialisation"),
    _method("structured", "structured initialisation"),
    _method("gradinit", "GradInit", iterations=30, lr=0.03),
    _method("lsuv", "LSUV"),
    _method("emergence", "emergence-promoting initialisation"),
    _method("architecture_aware", "architecture-aware initialisation"),
)
ARMS = {arm.name: arm for arm in _KNOWN}
"""{name: arm} of the known arms."""


def choose_arms(names: Sequence[str], definitions: Sequence[str] = ()) -> tuple[Arm, ...]:
    """Return the arms of a comparison.

    Args:
        names: Names of known arms.
        definitions: Further arms, each `NAME=ARM,key=value,...`: a known arm with other settings of the recipe.

    Raises:
        RecipeError: All unknown names, repeated names, and definitions that cannot be read.
    """
    problems = []
    arms: dict[str, Arm] = {}
    for name in filter(None, map(str.strip, names)):
        if name not in ARMS:
            problems.append(Problem("--arms", f"{name!r} is no known arm", f"Choose from {', '.join(ARMS)}"))
        elif name in arms:
            problems.append(Problem("--arms", f"{name!r} stands twice", "Name each arm once"))
        else:
            arms[name] = ARMS[name]
    for definition in definitions:
        try:
            arm = _define(definition)
        except RecipeError as error:
            problems += error.problems
            continue
        if arm.name in arms or arm.name in ARMS:
            problems.append(Problem("--arm", f"{arm.name!r} is taken", "Give it another name"))
        arms[arm.name] = arm
    if not arms and not problems:
        problems.append(Problem("--arms", "none", f"Name some of {', '.join(ARMS)}"))
    if problems:
        raise RecipeError(*problems)
    return tuple(arms.values())


def _define(definition: str) -> Arm:
    """Return the arm that a text `NAME=ARM,key=value,...` defines."""
    head, *settings = _split(definition)
    name, _, base = head.partition("=")
    fix = "Write NAME=ARM,key=value,... e.g. strict=nio,nio_loss_bound=0.05"
    if not name.isidentifier():
        raise RecipeError(Problem("--arm", f"{definition!r}, whose name is not made of letters, digits and _", fix))
    if base not in ARMS:
        fix = f"Name one of {', '.join(ARMS)} behind the first ="
        raise RecipeError(Problem("--arm", f"{definition!r}, and {base!r} is no arm", fix))
    changes: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if not value or key in changes:
            raise RecipeError(Problem("--arm", f"{setting!r} in {definition!r}", fix))
        if key in {*CONTROLLED, *QUIET, "output_dir"} and key not in _OWN_OF_ARMS:
            fix = CONTROLLED.get(key, "Leave it out")
            raise RecipeError(Problem(f"--arm {name}, {key}", "is decided by this command", fix))
        changes[key] = parse_scalar(value, f"--arm {name}, {key}")
    known = ARMS[base]
    return Arm(name, f"{known.description}; {', '.join(settings)}", {**known.settings, **changes}, known.has_warmup)


def _split(definition: str) -> list[str]:
    """Return what stands between the commas, except those of lists and mappings."""
    parts, depth = [""], 0
    for character in definition:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
