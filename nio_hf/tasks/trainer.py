"""Trainer of a recipe, whatever its task."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel

from nio_hf.catalog import recipe_name
from nio_hf.errors import ConfigError, DataError, Problem
from nio_hf.files import output_errors
from nio_hf.recipe.loading import Recipe, recipe_yaml
from nio_hf.report.run import Facts
from nio_hf.tasks.ema import EMACallback
from nio_hf.tasks.optimizers import decayed_parameters, optimizer_options
from nio_hf.trainer import NIOTrainer, NIOTrainingArguments
from nio_hf.trainer.arguments import order_seed
from nio_hf.trainer.sampling import EpochSampler, SeededDataset, SeededStream

logger = logging.getLogger(__name__)


class RecipeTrainer(NIOTrainer):
    """A [`NIOTrainer`] with the optimisation of a recipe, and an order of the samples by seed and epoch alone.

    Args:
        recipe: Recipe, whose training arguments are the arguments of Trainer.
        model: Model to train.
        samples: Word for samples in messages, e.g. "images".
        train_dataset: Samples to train on. Their random draws depend on seed, epoch and sample alone.
        about_data: Description of the data set beside its name; None for the name of its configuration.
        **arguments: Other arguments of Trainer.

    Raises:
        ConfigError: Average of the weights, or Muon, with weights that are sharded over devices.
        ModelError: Name in `no_weight_decay` that no parameter has.
    """

    args: NIOTrainingArguments

    def __init__(
        self,
        *,
        recipe: Recipe,
        model: PreTrainedModel,
        samples: str,
        train_dataset: Any,
        about_data: str | None = None,
        **arguments: Any,
    ) -> None:
        self.recipe = recipe
        self._samples = samples
        self._about_data = about_data or recipe.data.dataset_config_name
        args, asked = recipe.training, recipe.optimization
        if hasattr(train_dataset, "__len__"):
            train_dataset = SeededDataset(train_dataset, order_seed(args))
        else:
            train_dataset = SeededStream(train_dataset, order_seed(args), endless=True)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            optimizer_cls_and_kwargs=optimizer_options(asked.optimizer, args, model),
            **arguments,
        )
        self._warn_of_short_epochs()
        self.get_decay_parameter_names(model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            refused = {"ema_decay": asked.ema_decay, "optimizer": "muon" if asked.optimizer == "muon" else None}
            for name, value in refused.items():
                if value is not None:
                    found = f"{value} with weights that are sharded over devices"
                    raise ConfigError(Problem(name, found, "Leave it out, or train with plain data parallelism"))
        self._ema = None if asked.ema_decay is None else EMACallback(self, asked.ema_decay)
        if self._ema is not None:
            self.add_callback(self._ema)

    def _warn_of_short_epochs(self) -> None:
        """Warn where an epoch is one step, as with the recipe of a larger data set."""
        size = self.get_total_train_batch_size(self.args)
        data: Any = self.train_dataset
        if self.args.max_steps > 0 or not hasattr(data, "__len__") or len(data) > size:
            return
        told = "An epoch is one step: %d %s for batches of %d. Lower the batch size (global_batch_size), or train for "
        self._tell(logger, f"{told}more epochs.", len(data), self._samples, size, level=logging.WARNING)

    @property
    def recipe_text(self) -> str:
        """Recipe as YAML, with the overrides of the run."""
        return recipe_yaml(self.recipe)

    def run_facts(self) -> Facts:
        """Facts as in [`NIOTrainer`], with recipe and data set."""
        data = self.recipe.data
        return dataclasses.replace(
            super().run_facts(),
            recipe=recipe_name(self.recipe.path),
            dataset=data.dataset_name,
            dataset_config=self._about_data,
            dataset_split=data.eval_split,
        )

    def summary_rows(self) -> list[tuple[str, str, str]]:
        """Further rows of the summary of a run, as (quantity, before, after)."""
        return []

    def sample(self) -> str | None:
        """Text that the trained model writes; None for other models."""
        return None

    def evaluate_average(self, directory: Path) -> dict[str, float]:
        """Evaluate the average of the weights, if there is one, as `eval_ema_*`, and save it in a directory.

        Without one, what an earlier run has saved there is removed.
        """
        if self._ema is None:
            if self.args.should_save:
                shutil.rmtree(directory, ignore_errors=True)
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

    # Overrides of Trainer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Make the loader as in Trainer.

        Raises:
            DataError: Data set without samples, or whose samples fill no batch.
        """
        loader: DataLoader[Any] = super().get_train_dataloader()
        data: Any = self.train_dataset
        if hasattr(data, "__len__") and len(loader) == 0:
            found = f"true, and {len(data)} {self._samples} fill no batch of {self.args.train_batch_size}"
            fix = "Leave it out, or lower per_device_train_batch_size"
            raise DataError(Problem("dataloader_drop_last", found, fix))
        return loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay."""
        without = self.recipe.optimization.no_weight_decay
        if without is not None:
            return decayed_parameters(model, without)
        names: list[str] = super().get_decay_parameter_names(model)
        return names

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        data: Any = self.train_dataset
        if not hasattr(data, "__len__"):
            return None
        return EpochSampler(len(data), order_seed(self.args), self.recipe.augmentation.repeated_augmentation)
