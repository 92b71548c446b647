"""Subclasses of a user that keep books of their own, and searches for hyper-parameters."""

import importlib.util

import torch
from torch import nn

from tests.compat.sides import Nio, behaviour
from tests.compat.toys import Images, Perceptron, Texts, bert, checkpoints, history, resnet

# Side effects


def _bookkeeping(side):
    """A Trainer that keeps books in its loss, as SFTTrainer does."""

    class Bookkeeping(side.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = 0
            self.tokens = torch.zeros(())
            self.sizes = []
            self.seen = {"train": [], "eval": []}

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.calls += 1
            self.tokens += inputs["input_ids"].numel()
            self.sizes.append(len(inputs["labels"]))
            self.seen["train" if model.training else "eval"].append(self.state.global_step)
            self.log({"calls": self.calls, "tokens": self.tokens.item()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Bookkeeping


@behaviour(nio=Nio.SAME)
def calls_of_the_loss_are_counted(side, folder):
    """A counter, a sum, a list and a dictionary that a loss keeps are those of the training."""
    changes = {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 2}
    trainer = side.trained(folder, trainer_class=_bookkeeping(side), **changes)
    return [trainer.calls, trainer.tokens, trainer.sizes, trainer.seen]


@behaviour(nio=Nio.SAME)
def logs_of_the_loss(side, folder):
    """What a loss logs is what the training logs."""
    trainer = side.trained(folder, trainer_class=_bookkeeping(side))
    return [entry for entry in history(trainer) if "calls" in entry]


@behaviour(nio=Nio.SAME)
def calls_of_a_loss_function_are_counted(side, folder):
    """A `compute_loss_func` with an attribute of its own."""

    class Counted:
        calls = 0

        def __call__(self, outputs, labels, num_items_in_batch=None):
            self.calls += 1
            return nn.functional.cross_entropy(outputs["logits"], labels)

    counted = Counted()
    side.trained(folder, compute_loss_func=counted)
    return counted.calls


@behaviour(nio=Nio.SAME)
def steps_of_a_subclass_are_counted(side, folder):
    """A `training_step` and a `_prepare_inputs` of the user's that count."""

    class Counting(side.Trainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    return side.trained(folder, trainer_class=Counting, gradient_accumulation_steps=2, max_steps=4).steps


@behaviour(nio=Nio.SAME)
def metrics_that_a_loss_collects(side, folder):
    """Metrics that a loss collects, and that `log` averages and empties, as in trl."""

    class Collecting(side.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.collected = {}

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.collected.setdefault("size", []).append(float(len(inputs["labels"])))
            return super().compute_loss(model, inputs, *args, **kwargs)

        def log(self, logs, start_time=None):
            means = {name: sum(values) / len(values) for name, values in self.collected.items()}
            count = {name + "_count": len(values) for name, values in self.collected.items()}
            self.collected.clear()
            super().log({**logs, **means, **count}, start_time)

    trainer = side.trained(folder, trainer_class=Collecting, logging_steps=2)
    return [{name: entry[name] for name in entry if name.startswith("size")} for entry in history(trainer)]


@behaviour(nio=Nio.SAME)
def statistics_of_batches_are_counted(side, folder):
    """Batch normalisation counts the batches of the training."""
    trainer = side.trained(folder, model=resnet(), train_dataset=Images())
    return {n: int(t) for n, t in trainer.model.state_dict().items() if n.endswith("num_batches_tracked")}


class Counter(Perceptron):
    """A model that counts in a buffer how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, input_ids, labels=None):
        self.calls += 1
        return super().forward(input_ids, labels)


@behaviour(nio=Nio.SAME)
def calls_of_the_model_are_counted(side, folder):
    """A buffer that a model counts in has the calls of the training."""
    return int(side.trained(folder, model=Counter()).model.calls)


@behaviour(nio=Nio.SAME)
def samples_that_a_data_set_draws(side, folder):
    """The random numbers of a data set are those of the training."""
    drawn = []

    class Random(Texts):
        def __getitem__(self, index):
            drawn.append(float(torch.rand(())))
            return super().__getitem__(index)

    side.trained(folder, train_dataset=Random())
    return drawn[-24:]


# Searches


if importlib.util.find_spec("optuna"):

    @behaviour(nio=Nio.ALIKE)
    def search(side, folder):
        """A search for a learning rate, its best trial and the folders of all."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        trainer = side.trainer(folder, model_init=lambda: bert(), max_steps=2, **changes)
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
            compute_objective=lambda metrics: abs(trainer.args.learning_rate - 1e-2),
            n_trials=3,
            direction="minimize",
            sampler=optuna.samplers.RandomSampler(seed=0),
        )
        found = {path.name: checkpoints(path) for path in sorted(folder.glob("run-*"))}
        return [best.run_id, str(best.hyperparameters), str(best.objective), found]

    @behaviour(nio=Nio.ALIKE)
    def search_over_models(side, folder):
        """A search in which the trial decides the model, with names of its own for the folders."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)

        def model(trial):
            return bert(num_hidden_layers=1 if trial is None else trial.suggest_int("layers", 1, 3))

        trainer = side.trainer(folder, model_init=model, max_steps=2, eval_strategy="steps", eval_steps=2)
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"seed": trial.number},
            compute_objective=lambda metrics: float(trainer.model.config.num_hidden_layers),
            hp_name=lambda trial: f"trial-{trial.number}",
            n_trials=2,
            direction="maximize",
            sampler=optuna.samplers.GridSampler({"layers": [1, 3]}, seed=0),
        )
        return [best.run_id, str(best.hyperparameters), str(best.objective)]
