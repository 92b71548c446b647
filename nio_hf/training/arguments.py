"""`TrainingArguments` with the settings of NIO beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainingArguments

from nio_hf.core.batches import too_many_sub_batches
from nio_hf.core.config import NIOConfig, refuse_replaced
from nio_hf.core.tensors import check_storage
from nio_hf.errors import ConfigError, Problem
from nio_hf.training.methods import method_problems, parsed_mapping
from nio_hf.training.naming import in_arguments, named_as_arguments
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
        "Method of initialisation: nio, or to compare it with: none, gradinit, lsuv, emergence or architecture_aware.",
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
    nio_search_batches: int = _option(NIOConfig.search_batches, "NIO batches that scan and gradient judge by.")
    nio_report_batches: int = _option(NIOConfig.report_batches, "Other NIO batches, for the report before and after.")
    nio_seed: int | None = _option(None, "Seed of the NIO data order; default: data_seed, else seed.")

    # What is searched
    nio_search: str = _option(
        NIOConfig.search, "scan (first gradients), gradient (second derivatives) or published (the paper's algorithm)."
    )
    # HfArgumentParser takes the second of three types.
    nio_groups: dict[str, str] | str | None = dataclasses.field(
        default="additive",
        metadata={
            "help": "Tensors that share a scale: model, additive, kind, tensor, or a mapping from names of groups to "
            'regular expressions of parameter names, e.g. {"positions": "position_embeddings"}.'
        },
    )
    nio_scaled_tensors: str = _option(
        NIOConfig.scaled_tensors, "What is scaled: all tensors, or weights (matrices, tables and tokens)."
    )
    nio_objective: str = _option(
        NIOConfig.objective,
        "auto, gc, gc_norm, gc_sum_norm (as published), variance, or, for scan only, balance or gc_sign.",
    )
    nio_loss_bound: float | None = _option(
        NIOConfig.loss_bound, "Share by which the loss of the search batches may rise; none for no such bound."
    )
    nio_norm_band: list[float] | None = dataclasses.field(
        default_factory=lambda: list(NIOConfig.norm_band or ()),
        metadata={"help": "Least and largest gradient norm, relative to that at the common factor; none for no bound."},
    )
    nio_scale_range: list[float] = dataclasses.field(
        default_factory=lambda: list(NIOConfig.scale_range), metadata={"help": "Least and largest scale."}
    )
    nio_budget: float = _option(
        NIOConfig.budget, "Training steps of a NIO batch beyond which scan tries no further group."
    )
    nio_iterations: int | None = _option(None, "Steps of gradient (default: 20) and published (100).")
    nio_lr: float | None = _option(None, "Learning rate of gradient (default: 0.25) and published (0.003).")
    nio_gamma: float | None = _option(None, "Bound on the gradient norm of published.")
    nio_overlap: float = _option(NIOConfig.overlap, "Overlap of neighbouring sub-batches of published, in [0, 1).")

    # Computation
    nio_curvature: str = _option(NIOConfig.curvature, "Second derivatives: auto, exact or finite_difference.")
    nio_micro_batch_size: int | None = _option(None, "Samples of a sub-batch computed at once; default: all.")
    nio_precision: str = _option(NIOConfig.precision, "fp32, or bf16 for the loss under bfloat16 autocast.")

    def __new__(cls, *args: Any, **settings: Any) -> NIOTrainingArguments:
        """Refuse former settings of NIO by name.

        Raises:
            ConfigError: names each, with what replaces it.
        """
        refuse_replaced(settings, "nio_")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the settings of NIO together, beside what TrainingArguments checks.

        Raises:
            ConfigError: lists every `nio_*` setting that is out of range.
        """
        super().__post_init__()
        self.nio_method_kwargs = parsed_mapping(self.nio_method_kwargs)
        self.nio_groups = parsed_mapping(self.nio_groups)
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
            with named_as_arguments():
                config = self._nio_config()
        except ConfigError as error:
            raise ConfigError(*problems, *error.problems) from None
        if problems:
            raise ConfigError(*problems)
        return config

    def _batch_size_problems(self) -> Iterator[Problem]:
        size = self.nio_batch_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 2:
            yield Problem("nio_batch_size", f"{size!r}", "Give a whole number of at least 2")
        elif isinstance(self.nio_sub_batches, int) and self.nio_sub_batches > size:
            yield in_arguments(too_many_sub_batches(self.nio_sub_batches, size))

    def _save_steps_problems(self) -> Iterator[Problem]:
        steps = self.nio_save_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            yield Problem("nio_save_steps", f"{steps!r}", "Give a whole number, 0 for none")

    def _seed_optimizer_problems(self) -> Iterator[Problem]:
        if self.nio_seed_optimizer is not None and self.nio_seed_optimizer not in SEED_MODES:
            fix = f"Choose one of {', '.join(SEED_MODES)}, or None"
            yield Problem("nio_seed_optimizer", f"{self.nio_seed_optimizer!r}", fix)

    def _nio_config(self) -> NIOConfig:
        names = [field.name for field in dataclasses.fields(NIOConfig) if field.name != "seed"]
        settings = {name: getattr(self, f"nio_{name}") for name in names}
        return NIOConfig(**settings, seed=self.order_seed if self.nio_seed is None else self.nio_seed)


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
    for field in dataclasses.fields(NIOTrainingArguments):
        factory = field.default_factory
        args.__dict__[field.name] = field.default if factory is dataclasses.MISSING else factory()
    args.__dict__.update(state)
    return args
