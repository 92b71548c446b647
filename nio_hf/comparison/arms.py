"""What is compared: arms, each a change to the initialisation or the first steps of the same training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.strict_yaml import parse_scalar
from nio_hf.trials.bench import QUIET
from nio_hf.trials.run import WITH_NIO, Arm

NO_WARMUP, WARMUP = "no_warmup", "warmup"
CONTROLLED = {
    "learning_rate": "Use --learning_rates",
    "warmup_steps": "Use --warmup_ratios",
    "max_steps": "Use --steps",
    "num_train_epochs": "Use --steps",
    "seed": "Use --seeds",
    "data_seed": "Use --seeds",
    "nio_seed": "Use --seeds",
    "nio": "Use --arms",
    "nio_method": "Use --arms",
    "nio_method_kwargs": "Use --arm, e.g. --arm long=gradinit,nio_method_kwargs.iterations=60",
    "nio_seed_optimizer": "Use --arms",
    "optimizer": "Use --arms",
    "eval_from_train": "Leave it out: a part of the training data chooses, the evaluation data judge",
    "resume_from_checkpoint": "Leave it out: the same command goes on",
    "push_to_hub": "Leave it out: a comparison is not pushed",
}
"""{setting of the recipe that a comparison decides itself: what to do instead}."""
_OWN_OF_ARMS = {"nio", "nio_method", "nio_method_kwargs", "nio_seed_optimizer", "optimizer"}
_DECIDED = {**dict.fromkeys([*QUIET, "output_dir"], "Leave it out"), **CONTROLLED}
_PLAIN: dict[str, Any] = {"nio": False, "nio_seed_optimizer": None, "optimizer": None}
_SEEDED = {"nio_seed_optimizer": "gi_adam"}
_COMMA = re.compile(r",(?![^\[{]*[\]}])")
"""A comma outside a list or mapping."""


def _arm(name: str, description: str, **settings: Any) -> Arm:
    return Arm(name, description, {**_PLAIN, **settings}, has_warmup=name == WARMUP)


def _method(name: str, description: str, options: dict[str, Any] | None = None, method: str | None = None) -> Arm:
    settings = {"nio_method": method or name, "nio_method_kwargs": options}
    return _arm(name, f"{description}, no warmup", nio=True, **settings)


ARMS = {
    arm.name: arm
    for arm in (
        _arm(NO_WARMUP, "the model's own initialisation, no warmup"),
        _arm(WARMUP, "linear warmup of the learning rate"),
        _method("nio", "NIO"),
        _arm("gi_adam", "Adam's second moment seeded (GI-Adam), no warmup", **_SEEDED),
        _arm("nio_seeded", "NIO and the second moment seeded, no warmup", **WITH_NIO, **_SEEDED),
        _arm("uncorrected", "second moment seeded without bias correction", nio_seed_optimizer="uncorrected"),
        _arm("radam", "RAdam, no warmup", optimizer="radam"),
        _arm("muon", "Muon for the matrices of the trunk, no warmup", optimizer="muon"),
        _arm(
            "schedule_free",
            "schedule-free RAdam, neither warmup nor schedule",
            optim="schedule_free_radam",
            lr_scheduler_type="constant",
        ),
        _method("x4", "four times the standard deviation", {"factor": 4.0}, method="range"),
        _method("width", "standard deviation 1 / sqrt(width)", method="range"),
        _method(
            "x4_positions",
            "four times the standard deviation, positions and tokens 128 times",
            {"factor": 4.0, "additive": 32.0},
            method="range",
        ),
        _method("xavier", "Xavier initialisation"),
        _method("mimetic", "mimetic initialisation"),
        _method("structured", "structured initialisation"),
        _method("gradinit", "GradInit", {"iterations": 30, "lr": 0.03}),
        _method("lsuv", "LSUV"),
        _method("emergence", "emergence-promoting initialisation"),
        _method("architecture_aware", "architecture-aware initialisation"),
    )
}
"""{name: arm} of those that are known by name."""


def choose_arms(names: Sequence[str], definitions: Sequence[str] = ()) -> tuple[Arm, ...]:
    """The arms of a comparison.

    Args:
        names: of known arms.
        definitions: of further ones, each `NAME=ARM,key=value,...`: a known arm with other settings of the recipe.

    Raises:
        RecipeError: for names that are unknown or stand twice, and definitions that cannot be read; lists all.
    """
    problems = []
    arms: dict[str, Arm] = {}
    for name in names:
        name = name.strip()
        if name not in ARMS:
            problems.append(Problem("--arms", f"{name!r} is no known arm", f"Choose from {', '.join(ARMS)}"))
        elif name in arms:
            problems.append(Problem("--arms", f"{name!r} stands twice", "Name each arm once"))
        else:
            arms[name] = ARMS[name]
    for definition in definitions:
        try:
            arm = _defined(definition)
        except RecipeError as error:
            problems += error.problems
            continue
        if arm.name in arms or arm.name in ARMS:
            problems.append(Problem("--arm", f"{arm.name!r} is taken", "Give it another name"))
        else:
            arms[arm.name] = arm
    if not arms and not problems:
        problems.append(Problem("--arms", "none", f"Name some of {', '.join(ARMS)}"))
    if problems:
        raise RecipeError(*problems)
    return tuple(arms.values())


def _defined(definition: str) -> Arm:
    """The arm of `NAME=ARM,key=value,...`."""
    head, *settings = _COMMA.split(definition)
    name, equals, base = head.partition("=")
    fix = "Write NAME=ARM,key=value,... e.g. strict=nio,nio_loss_bound=0.05"
    if not equals or not name.isidentifier() or base not in ARMS:
        raise RecipeError(Problem("--arm", f"{definition!r}", fix))
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not value or key in changes:
            raise RecipeError(Problem("--arm", f"{setting!r} in {definition!r}", fix))
        if key in _DECIDED and key not in _OWN_OF_ARMS:
            raise RecipeError(Problem(f"--arm {name}, {key}", "is decided by this command", _DECIDED[key]))
        changes[key] = parse_scalar(value, f"--arm {name}, {key}")
    known = ARMS[base]
    return Arm(name, f"{known.description}; {', '.join(settings)}", {**known.settings, **changes}, known.has_warmup)
