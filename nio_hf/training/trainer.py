"""`RecipeTrainer`: what recipes ask of a Trainer beside its arguments, whatever the task."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel

from nio_hf.errors import ConfigError, DataError, Problem
from nio_hf.files import output_errors
from nio_hf.report.run import Facts
from nio_hf.trainer import NIOTrainer, NIOTrainingArguments
from nio_hf.trainer.arguments import order_seed
from nio_hf.trainer.sampling import EpochSampler, SeededDataset, SeededStream
from nio_hf.training.ema import EMACallback
from nio_hf.training.muon import MuonAndAdamW
from nio_hf.training.weight_decay import decayed_parameters

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a training is made from, by the names of [`Facts`].

    Attributes:
        recipe: Name of the recipe.
        recipe_text: The recipe as YAML, with the overrides of the run.
        dataset: Name of the data set, as it is loaded.
        dataset_config: Its configuration.
        dataset_split: Split that is evaluated on.
    """

    recipe: str
    recipe_text: str
    dataset: str
    dataset_config: str | None = None
    dataset_split: str | None = None


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a recipe asks of a Trainer beside its arguments.

    Attributes:
        no_weight_decay: Parameters without weight decay, see [`decayed_parameters`]; None for Trainer's choice.
        repeats: Times that an epoch draws each of its samples.
        source: What the training is made from, saved with the model.
        optimizer: Class and arguments of the optimizer; None for what `optim` says.
        ema_decay: Decay of the average of the weights that `evaluate_average` evaluates; None for no average.
    """

    no_weight_decay: list[str] | None = None
    repeats: int = 1
    source: Source | None = None
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None
    ema_decay: float | None = None


class RecipeTrainer(NIOTrainer):
    """A [`NIOTrainer`] with an order of the samples that depends on seed and epoch alone, and what [`Extras`] asks for.

    Args:
        model: As in Trainer.
        args: As in Trainer.
        extras: What the recipe asks for.
        samples: What samples are called in messages, e.g. "images".
        train_dataset: Samples to train on. What they draw at random depends on seed, epoch and sample alone.
        **given: Other arguments of Trainer.

    Raises:
        ConfigError: for an average, or Muon, of weights that are sharded over devices.
        ModelError: for a name in `no_weight_decay` that no parameter has.
    """

    args: NIOTrainingArguments

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: NIOTrainingArguments,
        extras: Extras,
        samples: str,
        train_dataset: Any,
        **given: Any,
    ) -> None:
        self._extras = extras
        self._samples = samples
        super().__init__(
            model=model,
            args=args,
            train_dataset=_seeded(train_dataset, order_seed(args)),
            optimizer_cls_and_kwargs=extras.optimizer,
            **given,
        )
        self._warn_of_short_epochs()
        self.get_decay_parameter_names(model)
        self._ema = None if extras.ema_decay is None else EMACallback(self, extras.ema_decay)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            is_muon = extras.optimizer is not None and extras.optimizer[0] is MuonAndAdamW
            for name, asked in (("ema_decay", extras.ema_decay), ("optimizer", "muon" if is_muon else None)):
                if asked is not None:
                    found = f"{asked} with weights that are sharded over devices"
                    raise ConfigError(Problem(name, found, "Leave it out, or train with plain data parallelism"))
        if self._ema is not None:
            self.add_callback(self._ema)

    def _warn_of_short_epochs(self) -> None:
        """Say that an epoch is one step, as recipes for larger data sets make it."""
        size = self.get_total_train_batch_size(self.args)
        data: Any = self.train_dataset
        if self.args.max_steps > 0 or not hasattr(data, "__len__") or len(data) > size:
            return
        self._tell(
            logger,
            f"An epoch is one step: %d {self._samples} for batches of %d. Lower the batch size (global_batch_size), or "
            "train for more epochs.",
            len(data),
            size,
            level=logging.WARNING,
        )

    @property
    def recipe_text(self) -> str | None:
        """The recipe as YAML."""
        return None if self._extras.source is None else self._extras.source.recipe_text

    def run_facts(self) -> Facts:
        """As in [`NIOTrainer`], with recipe and data set."""
        facts = super().run_facts()
        if self._extras.source is None:
            return facts
        known = {name: value for name, value in vars(self._extras.source).items() if name != "recipe_text"}
        return dataclasses.replace(facts, **known)

    def summary_rows(self) -> list[tuple[str, str, str]]:
        """Further rows of the summary of a run, as (quantity, before, after)."""
        return []

    def sample(self) -> str | None:
        """Text that the trained model writes; None for a model that writes none."""
        return None

    def evaluate_average(self, directory: Path) -> dict[str, float]:
        """Evaluate the average of the weights, as `eval_ema_*`, and save it; nothing where there is none.

        Args:
            directory: Where the model with its averaged weights is saved.
        """
        if self._ema is None:
            return {}
        with self._ema.swapped_in():
            metrics: dict[str, float] = self.evaluate(metric_key_prefix="eval_ema")
            if self.args.should_save:
                model: Any = self.unwrapped_model
                with output_errors(directory):
                    model.save_pretrained(directory)
                    if self.processing_class is not None:
                        self.processing_class.save_pretrained(directory)
        return metrics

    # What follows overrides Trainer.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer.

        Raises:
            DataError: for a data set without samples, and one whose samples fill no batch.
        """
        loader: DataLoader[Any] = super().get_train_dataloader()
        data: Any = self.train_dataset
        if hasattr(data, "__len__") and len(loader) == 0:
            found = f"true, and {len(data)} {self._samples} fill no batch of {self.args.train_batch_size}"
            raise DataError(
                Problem("dataloader_drop_last", found, "Leave it out, or lower per_device_train_batch_size")
            )
        return loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay."""
        if self._extras.no_weight_decay is None:
            names: list[str] = super().get_decay_parameter_names(model)
            return names
        return decayed_parameters(model, self._extras.no_weight_decay)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        data: Any = self.train_dataset
        if not hasattr(data, "__len__"):
            return None
        return EpochSampler(len(data), order_seed(self.args), self._extras.repeats)


def _seeded(samples: Any, seed: int) -> SeededStream | SeededDataset:
    if hasattr(samples, "__len__"):
        return SeededDataset(samples, seed)
    return SeededStream(samples, seed, endless=True)
