"""The cost of an initialisation: its maximum, known beforehand, and its count, when it is carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nio_hf.core import NIO, expected_cost
from nio_hf.tasks.trainer import RecipeTrainer
from nio_hf.trainer import NIOTrainingArguments
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.race import CANDIDATES

MANY_GROUPS = 8
"""Number of groups that the maximal cost assumes for settings with several groups."""


class OperationCount(TorchDispatchMode):
    """Counts floating point operations by the formulas of torch, as `torch.utils.flop_counter.FlopCounterMode` does.

    FlopCounterMode also tells modules apart and looks for a decomposition of every operation, which makes NIO on a
    small model several times slower; a sum needs neither.

    Attributes:
        formulas: {operation: number of floating point operations of a call}.
        operations: Number of operations so far.
    """

    formulas: Mapping[Any, Callable[..., int]] = flop_registry

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out an operation and count it."""
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        return result


def is_free(args: NIOTrainingArguments) -> bool:
    """Whether a method uses no data. Its report batches are for the reader, and no training pays for them.

    NIO is not free: it judges its scales by the report batches.
    """
    method = METHODS[args.nio_method]
    return method is not NIO and method.batches(args.to_nio_config(), method.checked(args.nio_method_options)) == 0


def most_steps(args: NIOTrainingArguments) -> float | None:
    """Return the maximal cost of an initialisation in training steps, reports included; None if it is not known."""
    if not args.nio:
        return 0.0
    raced = float(CANDIDATES * (args.nio_race_steps or 0))
    if is_free(args):
        return raced
    config = args.to_nio_config()
    number = 1 if config.groups == "model" else MANY_GROUPS
    batches = expected_cost(config, number, METHODS[args.nio_method], args.nio_method_options)
    return None if batches is None else raced + batches * args.nio_batch_size / _samples_of_step(args)


def initialise(trainer: RecipeTrainer) -> float:
    """Initialise the model, and return the cost in training steps, the seeding of the optimizer included.

    The floating point operations of the initialisation are counted, and divided by those of a training step.
    """
    args = trainer.args
    if not args.nio and args.nio_seed_optimizer is None:
        return 0.0
    with OperationCount() as one_pass:
        trainer.squared_gradients(batches=1)
    per_sample = one_pass.operations / args.nio_batch_size
    operations = 0.0
    if args.nio:
        with OperationCount() as initialisation:
            trainer.run_nio()
        if not is_free(args):
            operations += initialisation.operations
    if args.nio_seed_optimizer is not None:
        operations += per_sample * args.nio_batch_size * args.nio_report_batches
    return float(operations / (per_sample * _samples_of_step(args)))


def _samples_of_step(args: NIOTrainingArguments) -> int:
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
