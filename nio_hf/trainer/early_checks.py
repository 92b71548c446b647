"""Checks before NIO is paid for: settings that would fail later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from nio_hf.errors import MetricError, ModelError, Problem
from nio_hf.files import ensure_writable
from nio_hf.trainer.replica import replica_bytes

if TYPE_CHECKING:
    from nio_hf.trainer.trainer import NIOTrainerMixin

_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second")


def check_best_metric(trainer: Trainer) -> None:
    """Refuse a metric for the best model that no evaluation is going to have, as far as that is known.

    Raises:
        MetricError: Which is a KeyError, as what Trainer raises after the first evaluation.
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
    names = () if trainer.compute_metrics is None else getattr(trainer, "metric_names", None)
    if names is not None and own not in (*names, *_ALWAYS):
        found = f"{metric!r}, and evaluations have {', '.join((*names, *_ALWAYS))}"
        fix = "Choose one of these" if names else "Choose one of these, or give compute_metrics"
        raise MetricError(Problem(where, found, fix))


def check_before_nio(trainer: NIOTrainerMixin, model: nn.Module) -> None:
    """Refuse a run of NIO that cannot reach the model, or whose checkpoints have no room.

    Raises:
        ModelError: A model that DeepSpeed has taken.
        OutputError: Where there is too little room.
    """
    args = trainer.args
    if getattr(trainer, "deepspeed", None) is not None:
        fix = "Call run_nio() before train(), or leave it to train()"
        raise ModelError(Problem("model", "DeepSpeed holds a copy of its weights already", fix))
    if not args.should_save:
        return
    copies = float(trainer.nio_args.nio_save_init)
    if trainer.is_in_train and args.save_strategy != SaveStrategy.NO:
        copies += 1 if args.save_only_model or "adam" not in args.optim else 3
    ensure_writable(trainer.nio_init_dir.parent, round(copies * replica_bytes(model)))


def _evaluates_by_itself(trainer: Trainer) -> bool:
    """Whether something outside of transformers and this package says how models are evaluated."""
    owners = [base for base in type(trainer).__mro__ for name in ("evaluate", "evaluation_loop") if name in vars(base)]
    is_replaced = "evaluate" in vars(trainer)
    return is_replaced or any(not base.__module__.startswith(("transformers.", "nio_hf.")) for base in owners)
