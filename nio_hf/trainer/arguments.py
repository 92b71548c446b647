"""`TrainingArguments` with the settings of NIO beside them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, Self, cast

from torch import nn
from transformers import TrainingArguments

from nio_hf.core.batches import too_many_sub_batches
from nio_hf.core.config import NIOConfig, is_whole, refuse_replaced
from nio_hf.core.tensors import check_storage
from nio_hf.errors import ConfigError, Problem
from nio_hf.trainer.methods import method_problems, parsed_mapping
from nio_hf.trainer.naming import in_arguments, named_as_arguments
from nio_hf.trainer.seeding import SEED_MODES


def _describe(documented: type) -> dict[str, str]:
    """{argument: its description} of a docstring; empty where Python runs without docstrings."""
    section = (inspect.getdoc(documented) or "").partition("Args:\n")[2].partition("\n\nRaises:")[0]
    found = re.findall(r"^    (\w+): (.+?)(?=^    \w|\Z)", section, flags=re.DOTALL | re.MULTILINE)
    return {name: re.sub(r"\[(`.+?`)\]", r"\1", " ".join(text.split())) for name, text in found}


_DESCRIPTIONS = _describe(NIOConfig)
_OWN_DEFAULTS = {field.name: field.default for field in dataclasses.fields(NIOConfig)}


def _option(default: Any, text: str) -> Any:
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def _of_core(name: str) -> Any:
    """A setting with the default and the description that it has in [`NIOConfig`], which checks it."""
    return _option(_OWN_DEFAULTS[name], _DESCRIPTIONS.get(name, ""))


@dataclasses.dataclass
class NIOSettings:
    """The settings of NIO in the Trainer, flat, each with the prefix `nio_`.

    To have them beside the arguments of another trainer: `@dataclass class MyConfig(NIOSettings, SFTConfig)`. The
    settings of core have the defaults and meanings that they have in [`NIOConfig`].
    """

    # When NIO runs
    nio: bool = _option(True, "Run NIO before training. It is skipped on resume and for an initialised model.")
    nio_method: str = _option(
        "nio",
        "Method of initialisation: nio, or one to compare it with: none, range, xavier, mimetic, structured, lsuv, "
        "gradinit, emergence or architecture_aware.",
    )
    nio_method_kwargs: dict[str, Any] | str | None = _option(
        None, 'Options of the method, e.g. {"optimizer": "sgd"} of gradinit.'
    )
    nio_save_init: bool = _option(True, "Save the initialised checkpoint in OUTPUT_DIR/_nio_init.")
    nio_race_steps: int | None = _option(
        None,
        "Training steps of a race: the weights that NIO found and those of the start train so long, and the training "
        "begins from the better ones. 0: no race. Default: 120 where the race is at most 2% of the training, else 0.",
    )
    nio_seed_optimizer: str | None = _option(
        None,
        "Start Adam's second moment from the squared gradient at the initialisation: gi_adam (with bias correction, an "
        "implicit warmup) or uncorrected. Default: Adam as it is.",
    )

    # Data
    nio_batch_size: int = _option(64, "Number B of samples in a batch of NIO, over all devices.")
    nio_seed: int | None = _option(None, "Seed of the order of NIO's data. Default: data_seed, else seed.")

    # Settings of NIOConfig; HfArgumentParser takes the second of three types
    nio_search: str = _of_core("search")
    nio_strength: float = _of_core("strength")
    nio_groups: dict[str, str] | str | None = _of_core("groups")
    nio_scaled_tensors: str = _of_core("scaled_tensors")
    nio_sub_batches: int = _of_core("sub_batches")
    nio_report_batches: int = _of_core("report_batches")
    nio_loss_bound: float | None = _of_core("loss_bound")
    nio_least_norm: float | None = _of_core("least_norm")
    nio_scale_range: list[float] = _of_core("scale_range")
    nio_objective: str = _of_core("objective")
    nio_iterations: int = _of_core("iterations")
    nio_lr: float = _of_core("lr")
    nio_gamma: float | None = _of_core("gamma")
    nio_overlap: float = _of_core("overlap")
    nio_curvature: str = _of_core("curvature")
    nio_micro_batch_size: int | None = _of_core("micro_batch_size")
    nio_precision: str = _of_core("precision")

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse former settings of NIO by name.

        Raises:
            ConfigError: Names each, with what replaces it.
        """
        refuse_replaced(settings, "nio_")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the settings together.

        Raises:
            ConfigError: Lists every `nio_*` setting that is out of range.
        """
        following: Any = super()
        if hasattr(following, "__post_init__"):
            following.__post_init__()
        self.nio_method_kwargs = parsed_mapping(self.nio_method_kwargs)
        self.nio_groups = parsed_mapping(self.nio_groups)
        self.nio_config()

    def nio_config(self, order_seed: int = 0) -> NIOConfig:
        """The settings as those of core.

        Args:
            order_seed: Seed where `nio_seed` is not given.

        Raises:
            ConfigError: Lists every `nio_*` setting that is out of range.
        """
        problems = [*self._problems(), *method_problems(self.nio_method, self.nio_method_kwargs)]
        settings = {name: getattr(self, f"nio_{name}") for name in _OWN_DEFAULTS if name != "seed"}
        try:
            with named_as_arguments():
                config = NIOConfig(**settings, seed=order_seed if self.nio_seed is None else self.nio_seed)
        except ConfigError as error:
            raise ConfigError(*problems, *error.problems) from None
        if problems:
            raise ConfigError(*problems)
        return config

    @property
    def nio_method_options(self) -> dict[str, Any]:
        """`nio_method_kwargs` as a mapping, empty where none are given."""
        return cast(dict[str, Any], self.nio_method_kwargs or {})

    def _problems(self) -> Iterator[Problem]:
        """The problems of the settings that are none of core."""
        size = self.nio_batch_size
        if not is_whole(size) or size < 2:
            yield Problem("nio_batch_size", f"{size!r}", "Give a whole number of at least 2")
        elif is_whole(self.nio_sub_batches) and self.nio_sub_batches > size:
            yield in_arguments(too_many_sub_batches(self.nio_sub_batches, size))
        steps = self.nio_race_steps
        if steps is not None and not (is_whole(steps) and steps >= 0):
            yield Problem("nio_race_steps", f"{steps!r}", "Give a whole number, 0 for none")
        if self.nio_seed_optimizer not in (None, *SEED_MODES):
            fix = f"Choose one of {', '.join(SEED_MODES)}, or leave it out"
            yield Problem("nio_seed_optimizer", f"{self.nio_seed_optimizer!r}", fix)


@dataclasses.dataclass
class NIOTrainingArguments(NIOSettings, TrainingArguments):
    """[`~transformers.TrainingArguments`] plus the settings of NIO; no inherited default is changed.

    In a class with other arguments, `class MyConfig(NIOTrainingArguments, SFTConfig)`, the defaults of the others hold.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let the defaults of other arguments hold, which a data class would take from this one."""
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[1 : cls.__mro__.index(TrainingArguments)]:
            if issubclass(base, TrainingArguments) and not issubclass(base, NIOTrainingArguments):
                for field in dataclasses.fields(base):
                    if field.init and field.name not in vars(cls):
                        cls.__annotations__[field.name] = field.type
                        setattr(cls, field.name, copy.copy(field))

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Make a data class of a class of arguments that is none yet."""
        if "__dataclass_fields__" not in vars(cls):
            dataclasses.dataclass(cls)
        return super().__new__(cls, *args, **settings)

    def to_nio_config(self) -> NIOConfig:
        """As [`NIOSettings.nio_config`], with the seed of the order of the training data."""
        return self.nio_config(order_seed(self))


def order_seed(args: TrainingArguments) -> int:
    """Seed of the order of the training data: `data_seed`, else `seed`."""
    return args.seed if args.data_seed is None else args.data_seed


def check_arguments(model: Any, args: Any) -> None:
    """Refuse what Trainer would fail at without saying why.

    Raises:
        ConfigError: Where `args` are no TrainingArguments.
        ModelError: A model without data, on the meta device.
    """
    if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
        check_storage(model)
    if args is not None and not isinstance(args, TrainingArguments):
        raise ConfigError(Problem("args", f"a {type(args).__name__}", "Give NIOTrainingArguments"))
