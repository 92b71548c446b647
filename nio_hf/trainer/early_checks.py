"""What can be known to fail before NIO is paid for."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from nio_hf.errors import MetricError, Problem

_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second")


def check_best_metric(trainer: Trainer) -> None:
    """Refuse a metric for the best model that no evaluation is going to have, as far as that is known.

    Raises:
        MetricError: which is a KeyError, as what Trainer raises after the first evaluation.
    """
    args: Any = trainer.args
    chooses = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    if not chooses or not args.metric_for_best_model or _evaluates_by_itself(trainer):
        return
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    sets = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else None
    where = "metric_for_best_model"
    if sets is not None and not any(metric.startswith(f"{name}_") for name in sets):
        choices = ", ".join(f"{name}_{metric}" for name in sets)
        found = f"{metric!r}, with evaluation sets of the names {', '.join(map(str, sets))}"
        raise MetricError(Problem(where, found, f"Name the set as well: {choices}"))
    own = metric if sets is None else next(metric.removeprefix(f"{n}_") for n in sets if metric.startswith(f"{n}_"))
    if trainer.compute_metrics is None and own not in _ALWAYS:
        found = f"{metric!r}, without compute_metrics evaluations have {', '.join(_ALWAYS)}"
        raise MetricError(Problem(where, found, "Choose one of these, or give compute_metrics"))


def _evaluates_by_itself(trainer: Trainer) -> bool:
    """Whether something outside of transformers and this package says how models are evaluated."""
    owners = [base for base in type(trainer).__mro__ for name in ("evaluate", "evaluation_loop") if name in vars(base)]
    is_replaced = "evaluate" in vars(trainer)
    return is_replaced or any(not base.__module__.startswith(("transformers.", "nio_hf.")) for base in owners)
