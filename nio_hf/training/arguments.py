"""`TrainingArguments` with the settings of NIO beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainingArguments

from nio_hf.baselines import defaults_of
from nio_hf.core.batches import too_many_sub_batches
from nio_hf.core.config import NIOConfig
from nio_hf.core.scales import check_storage
from nio_hf.errors import ConfigError, Problem
from nio_hf.training.methods import method_problems, parsed_options
from nio_hf.training.seeding import SEED_MODES


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class NIOTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] plus flat `nio_*` settings; no inherited default is changed.

    Each `nio_*` setting is described, with its equation, under the same name in [`NIOConfig`].
    """

    # When NIO runs
    nio: bool = _option(True, "Run NIO before training. It is skipped on resume and for an initialised model.")
    nio_method: str = _option(
        "nio",
        "Method of initialisation: nio, or to compare it with: none, gradinit, metainit, lsuv, emergence or "
        "architecture_aware.",
    )
    nio_method_kwargs: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": 'Settings that such a method has of its own, e.g. {"optimizer": "sgd"}.'}
    )
    nio_save_init: bool = _option(True, "Save the initialised checkpoint in OUTPUT_DIR/_nio_init.")
    nio_save_steps: int = _option(
        10, "Iterations from one saved state of NIO to the next, from which an interrupted run goes on; 0 for none."
    )

    nio_seed_optimizer: str | None = _option(
        None,
        "Start Adam's second moment from the squared gradient at the initialisation: gi_adam (with bias correction, an "
        "implicit warmup) or uncorrected; default: Adam as it is.",
    )

    # Data
    nio_batch_size: int = _option(64, "B, samples of a NIO batch over all devices.")
    nio_sub_batches: int = _option(NIOConfig.sub_batches, "D, sub-batches that a NIO batch is split into.")
    nio_overlap: float = _option(NIOConfig.overlap, "Overlap of neighbouring sub-batches, in [0, 1).")
    nio_holdout_batches: int = _option(NIOConfig.holdout_batches, "NIO batches set aside for before and after.")
    nio_seed: int | None = _option(None, "Seed of the NIO data order; default: data_seed, else seed.")

    # Optimisation of the scales
    nio_iterations: int | None = _option(
        None, f"Steps on the scales, at most; default: {NIOConfig.iterations}, of gradinit and metainit 100."
    )
    nio_objective: str = _option(NIOConfig.objective, "gc, gc_norm, gc_sum_norm (as published) or variance.")
    nio_beta: float = _option(NIOConfig.beta, "Weight of the gradient norm in the objective gc_norm.")
    nio_gamma: float | None = _option(None, "Absolute bound on the gradient norm; it replaces nio_gamma_relative.")
    nio_gamma_relative: float | None = _option(
        NIOConfig.gamma_relative, "Bound on the gradient norm as a multiple of the gradient norm before NIO."
    )
    nio_max_loss_rise: float | None = _option(
        NIOConfig.max_loss_rise, "End once scaling has raised the loss of a batch by more than this share."
    )
    nio_lr: float | None = _option(
        None, f"Learning rate of the scales; default: {NIOConfig.lr}, of gradinit 0.01, of metainit 0.1."
    )
    nio_scaled_tensors: str = _option(
        NIOConfig.scaled_tensors, "What is scaled: all tensors, or weights (two or more dimensions)."
    )
    nio_scaled_names: str | None = _option(
        None, 'Regular expression that the name of a scaled tensor contains, e.g. "attention"; default: any name.'
    )
    nio_scale_sharing: str = _option(NIOConfig.scale_sharing, "One scale for each tensor, kind, or the whole model.")
    nio_min_scale: float | None = _option(
        NIOConfig.min_scale, "Lower clamp of the scales; none for 1 with one scale for the whole model, else 0.01."
    )
    nio_max_scale: float = _option(NIOConfig.max_scale, "Upper clamp of the scales.")

    # Computation
    nio_curvature: str = _option(
        NIOConfig.curvature, "auto, exact, exact_kept, finite_difference or finite_difference_kept."
    )
    nio_micro_batch_size: int | None = _option(None, "Samples of a sub-batch computed at once; default: all.")
    nio_precision: str = _option(NIOConfig.precision, "fp32, or bf16 for the loss under bfloat16 autocast.")
    nio_batch_norm: str = _option(NIOConfig.batch_norm, "Batch normalisation statistics: batch or frozen.")

    def __post_init__(self) -> None:
        """Check the settings of NIO together, beside what TrainingArguments checks.

        Raises:
            ConfigError: lists every `nio_*` setting that is out of range.
        """
        super().__post_init__()
        self.nio_method_kwargs = parsed_options(self.nio_method_kwargs)
        self.to_nio_config()

    @property
    def order_seed(self) -> int:
        """Seed of the order of the training data: `data_seed`, else `seed`."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_nio_config(self) -> NIOConfig:
        """The settings of NIO.

        Raises:
            ConfigError: lists every `nio_*` setting that is out of range.
        """
        problems = [*self._batch_size_problems(), *self._save_steps_problems(), *self._seed_optimizer_problems()]
        problems += method_problems(self.nio_method, self.nio_method_kwargs)
        try:
            config = self._nio_config()
        except ConfigError as error:
            renamed = [dataclasses.replace(problem, where=_own_name(problem.where)) for problem in error.problems]
            raise ConfigError(*problems, *renamed) from None
        if problems:
            raise ConfigError(*problems)
        return config

    def _batch_size_problems(self) -> Iterator[Problem]:
        size = self.nio_batch_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 2:
            yield Problem("nio_batch_size", f"{size!r}", "Give a whole number of at least 2")
        elif isinstance(self.nio_sub_batches, int) and self.nio_sub_batches > size:
            yield dataclasses.replace(too_many_sub_batches(self.nio_sub_batches, size), where="nio_sub_batches")

    def _save_steps_problems(self) -> Iterator[Problem]:
        steps = self.nio_save_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            yield Problem("nio_save_steps", f"{steps!r}", "Give a whole number, 0 for none")

    def _seed_optimizer_problems(self) -> Iterator[Problem]:
        if self.nio_seed_optimizer is not None and self.nio_seed_optimizer not in SEED_MODES:
            fix = f"Choose one of {', '.join(SEED_MODES)}, or None"
            yield Problem("nio_seed_optimizer", f"{self.nio_seed_optimizer!r}", fix)

    def _nio_config(self) -> NIOConfig:
        seed = self.order_seed if self.nio_seed is None else self.nio_seed
        defaults = defaults_of(self.nio_method)
        return NIOConfig(
            iterations=defaults.iterations if self.nio_iterations is None else self.nio_iterations,
            sub_batches=self.nio_sub_batches,
            overlap=self.nio_overlap,
            gamma=self.nio_gamma,
            gamma_relative=self.nio_gamma_relative,
            max_loss_rise=self.nio_max_loss_rise,
            lr=defaults.lr if self.nio_lr is None else self.nio_lr,
            scaled_tensors=self.nio_scaled_tensors,  # type: ignore[arg-type]
            scaled_names=self.nio_scaled_names,
            scale_sharing=self.nio_scale_sharing,  # type: ignore[arg-type]
            min_scale=self.nio_min_scale,
            max_scale=self.nio_max_scale,
            objective=self.nio_objective,  # type: ignore[arg-type]
            beta=self.nio_beta,
            curvature=self.nio_curvature,  # type: ignore[arg-type]
            micro_batch_size=self.nio_micro_batch_size,
            precision=self.nio_precision,  # type: ignore[arg-type]
            batch_norm=self.nio_batch_norm,  # type: ignore[arg-type]
            holdout_batches=self.nio_holdout_batches,
            seed=seed,
        )


def checked_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of Trainer, its `args` with the settings of NIO beside them.

    Raises:
        ConfigError: where `args` are no TrainingArguments.
        ModelError: for a model without data, on the meta device.
    """
    model = args[0] if args else kwargs.get("model")
    if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
        check_storage(model)
    given = args[1] if len(args) > 1 else kwargs.get("args")
    settings = with_nio_settings(TrainingArguments(output_dir="tmp_trainer") if given is None else given)
    if len(args) > 1:
        return (args[0], settings, *args[2:]), kwargs
    return args, {**kwargs, "args": settings}


def with_nio_settings(args: Any) -> NIOTrainingArguments:
    """The arguments with the default settings of NIO beside them, nothing else changed.

    Args:
        args: `NIOTrainingArguments`, which are returned as they are, or `TrainingArguments` of any class.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(args, NIOTrainingArguments):
        return args
    if not isinstance(args, TrainingArguments):
        raise ConfigError(Problem("args", f"a {type(args).__name__}", "Give NIOTrainingArguments"))
    return _restore(type(args), vars(args))


class _WithNIO:
    """Lets arguments of a class that is made while running be pickled, as Trainer does when it saves."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self).__bases__[-1], vars(self))


def _restore(base: type[TrainingArguments], state: dict[str, Any]) -> NIOTrainingArguments:
    """Arguments of a class and of `NIOTrainingArguments` at once, with the attributes given and defaults of NIO."""
    combined: Any = NIOTrainingArguments
    if base is not TrainingArguments:
        bases = (_WithNIO, NIOTrainingArguments, base)
        combined = dataclasses.dataclass(type(f"NIO{base.__name__}", bases, {}))
    args: NIOTrainingArguments = combined.__new__(combined)
    args.__dict__.update({field.name: field.default for field in dataclasses.fields(NIOTrainingArguments)})
    args.__dict__.update(state)
    return args


def _own_name(where: str) -> str:
    """The argument that sets `NIOConfig.field`."""
    return f"nio_{where.removeprefix('NIOConfig.')}"
