"""What a training does: losses, optimizers, schedules, batches, and what it leaves."""

import torch
from torch import nn
from transformers import BertModel, TrainerCallback

from tests.compat.sides import Nio, behaviour, caught
from tests.compat.toys import (
    MODELS,
    AtBegin,
    Draws,
    Images,
    Prose,
    SizedStream,
    Stream,
    Texts,
    bert,
    gpt2,
    history,
    outcome,
    perceptron,
    t5,
    vit,
    weights,
    without_clocks,
)
from tests.versions import CHECKPOINTING

# Weights and logs


@behaviour(cases=MODELS)
def final_weights(side, folder, case):
    """The weights and logs of a training of each model."""
    model, data = case
    return outcome(side.trained(folder, model=model(), train_dataset=data()))


@behaviour(cases=MODELS, nio_cases=("gpt2", "swinv2"))
def gradient_accumulation(side, folder, case):
    """The weights and logs of a training of each model that accumulates gradients."""
    model, data = case
    return outcome(
        side.trained(folder, model=model(), train_dataset=data(), gradient_accumulation_steps=3, max_steps=4)
    )


@behaviour()
def sequence_to_sequence(side, folder):
    """The weights and logs of a Seq2SeqTrainer that accumulates gradients."""
    args = side.arguments(folder, side.seq2seq_arguments_class, gradient_accumulation_steps=2)
    return outcome(
        side.trained(folder, trainer_class=side.Seq2SeqTrainer, args=args, model=t5(), train_dataset=Prose())
    )


@behaviour()
def train_output(side, folder):
    """The steps, the mean loss and the metrics that `train` returns."""
    output = side.trainer(folder).train()
    return [output.global_step, output.training_loss, without_clocks(output.metrics)]


@behaviour()
def log_is_overridden(side, folder):
    """A `log` of the user's sees all values, and may add its own."""

    class Logging(side.Trainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "added": 1.5}, start_time)

    return history(side.trained(folder, trainer_class=Logging))


@behaviour(nio=Nio.SAME)
def random_numbers_of_the_steps(side, folder):
    """The random numbers that the training draws."""
    draws = Draws()
    side.trained(folder, callbacks=[draws])
    return draws.drawn


@behaviour(nio=Nio.SAME)
def parameters_stay_the_same_objects(side, folder):
    """A script that holds on to a parameter holds on to the trained one, without a gradient."""
    model = bert()
    before = dict(model.named_parameters())
    trainer = side.trained(folder, model=model)
    return [trainer.model is model, all(p is before[n] and p.grad is None for n, p in model.named_parameters())]


@behaviour()
def frozen_parameters(side, folder):
    """What is frozen does not take part in the training."""
    model = bert()
    model.bert.requires_grad_(False)
    trainer = side.trained(folder, model=model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    return [outcome(trainer), trained]


# Losses


@behaviour()
def loss_is_overridden(side, folder):
    """A `compute_loss` of the user's that is a mean over a batch, with accumulation."""

    class Squared(side.Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = (outputs["logits"].softmax(-1) - nn.functional.one_hot(labels, 3)).square().mean()
            return (loss, outputs) if return_outputs else loss

    return outcome(
        side.trained(folder, trainer_class=Squared, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3)
    )


@behaviour(cases={"bert": (bert, Texts), "perceptron": (perceptron, Texts)})
def loss_function(side, folder, case):
    """`compute_loss_func` gets outputs, labels and the number of items of all accumulated batches."""
    counts = []

    def loss(outputs, labels, num_items_in_batch=None):
        counts.append(None if num_items_in_batch is None else int(num_items_in_batch))
        total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum", label_smoothing=0.2)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    model, data = case
    begin = AtBegin(counts.clear)
    changes = {"gradient_accumulation_steps": 2, "compute_loss_func": loss, "callbacks": [begin]}
    return [outcome(side.trained(folder, model=model(), train_dataset=data(), **changes)), counts]


@behaviour(cases={"bert": (bert, Texts), "gpt2": (gpt2, Prose), "vit": (vit, Images)}, nio_cases=("gpt2",))
def label_smoothing(side, folder, case):
    """The smoothed loss of classifiers and of language models, with accumulation."""
    model, data = case
    changes = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}
    return outcome(side.trained(folder, model=model(), train_dataset=data(), **changes))


@behaviour()
def training_step_is_overridden(side, folder):
    """A `training_step` of the user's is what trains."""

    class Noted(side.Trainer):
        sizes: tuple[int, ...] = ()

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.sizes = (*self.sizes, len(inputs["labels"]))
            return super().training_step(model, inputs, num_items_in_batch) * 0.5

    trainer = side.trained(folder, trainer_class=Noted)
    return [outcome(trainer), trainer.sizes]


class Tuples(nn.Module):
    """A model that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = perceptron()

    def forward(self, input_ids, labels=None):
        return tuple(self.inner(input_ids, labels).values())


@behaviour()
def model_that_returns_a_tuple(side, folder):
    """The first item of a tuple is the loss."""
    return outcome(side.trained(folder, model=Tuples(), eval_strategy="steps", eval_steps=3))


# Optimizers and schedules


SCHEDULES = {
    "linear": {"warmup_steps": 2},
    "cosine": {"warmup_steps": 0.5},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
    "inverse_sqrt": {"warmup_steps": 1},
    "constant_with_warmup": {"warmup_steps": 3},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}, "warmup_steps": 1},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
}


@behaviour(cases=SCHEDULES, nio=Nio.ALIKE, nio_cases=("linear",))
def schedules(side, folder, changes):
    """The learning rates of each schedule, and the weights that they lead to."""
    name = next(name for name, settings in SCHEDULES.items() if settings is changes)
    return outcome(side.trained(folder, lr_scheduler_type=name, **changes))


@behaviour()
def optimizer_and_schedule_are_passed_in(side, folder):
    """An optimizer and a schedule of the script's own are the ones that are used."""
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = side.trained(folder, model=model, optimizers=(optimizer, schedule))
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return [outcome(trainer), inner is optimizer, len(optimizer.state)]


@behaviour()
def optimizer_is_created_by_a_subclass(side, folder):
    """A `create_optimizer` of the user's makes the optimizer, once, when the training begins."""

    class Own(side.Trainer):
        created = 0

        def create_optimizer(self, *args, **kwargs):
            self.created += 1
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2)
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.asked_for = num_training_steps
            return super().create_scheduler(num_training_steps, optimizer)

    trainer = side.trained(folder, trainer_class=Own)
    return [outcome(trainer), trainer.created, trainer.asked_for]


@behaviour(cases={"bert": (bert, Texts), "gpt2": (gpt2, Prose)}, nio_cases=("gpt2",))
def embedding_noise(side, folder, case):
    """NEFTune adds noise to embeddings while training, and none afterwards."""
    model, data = case
    trainer = side.trained(folder, model=model(), train_dataset=data(), eval_dataset=data(8), neftune_noise_alpha=5.0)
    hooks = len(trainer.model.get_input_embeddings()._forward_hooks)
    return [outcome(trainer), hooks, trainer.evaluate()["eval_loss"]]


@behaviour()
def full_determinism(side, folder):
    """Deterministic algorithms are on while training."""
    seen = []
    begin = AtBegin(lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    return [outcome(side.trained(folder, full_determinism=True, callbacks=[begin])), seen]


@behaviour()
def bfloat16(side, folder):
    """A training under bfloat16 autocast."""
    return outcome(side.trained(folder, bf16=True, model=vit(), train_dataset=Images()))


@behaviour()
def activation_checkpointing(side, folder):
    """Activations that are computed again lead to the same weights."""
    return outcome(side.trained(folder, **{CHECKPOINTING: True}))


# Sizes of batches, lengths of trainings


class OutOfMemory(TrainerCallback):
    """Runs out of memory at batches above a size, and notes the sizes that were tried."""

    def __init__(self, limit):
        self.limit = limit
        self.tried = []

    def on_step_begin(self, args, state, control, **kwargs):
        size = state.train_batch_size
        if size not in self.tried:
            self.tried.append(size)
        if size > self.limit:
            raise RuntimeError("CUDA out of memory.")


@behaviour()
def batch_size_is_found(side, folder):
    """`auto_find_batch_size` tries smaller batches after a lack of memory."""
    limit = OutOfMemory(8)
    changes = {"auto_find_batch_size": True, "per_device_train_batch_size": 16, "max_steps": 2}
    trainer = side.trained(folder, callbacks=[limit], **changes)
    return [limit.tried, outcome(trainer)]


@behaviour()
def model_is_made_by_a_function(side, folder):
    """`model_init` makes a new model for each training, which is thereby repeated."""
    trainer = side.trainer(folder, model_init=lambda: bert())
    trainer.train()
    first = outcome(trainer)
    trainer.train()
    again = weights(trainer)
    return [first, outcome(trainer), all(torch.equal(again[name], first["weights"][name]) for name in again)]


@behaviour()
def train_is_called_twice(side, folder):
    """A second training goes on from the weights of the first, with a new schedule and an empty log."""
    trainer = side.trained(folder, max_steps=3)
    first = outcome(trainer)
    trainer.train()
    return [first, outcome(trainer)]


LENGTHS = {
    "steps within an epoch": {"max_steps": 3},
    "steps beyond an epoch": {"max_steps": 11},
    "steps before epochs": {"max_steps": 2, "num_train_epochs": 5},
    "epochs": {"max_steps": -1, "num_train_epochs": 2},
    "a part of an epoch": {"max_steps": -1, "num_train_epochs": 1.5},
}


@behaviour(cases=LENGTHS, nio_cases=("steps beyond an epoch", "a part of an epoch"))
def lengths(side, folder, changes):
    """How long a training is that is given in steps or epochs."""
    trainer = side.trained(folder, **changes)
    return [outcome(trainer), trainer.state.max_steps, trainer.state.num_train_epochs]


STREAMS = {
    "without length": (Stream, {"max_steps": 5}),
    "without length, more than a pass": (Stream, {"max_steps": 11}),
    "with length": (SizedStream, {"max_steps": -1, "num_train_epochs": 2}),
    "with length and steps": (SizedStream, {"max_steps": 5}),
    "with accumulation": (Stream, {"max_steps": 3, "gradient_accumulation_steps": 3}),
}


@behaviour(cases=STREAMS, nio_cases=("without length, more than a pass", "with length"))
def streams(side, folder, case):
    """A training on a stream."""
    stream, changes = case
    trainer = side.trained(folder, train_dataset=stream(), **changes)
    return [outcome(trainer), trainer.state.max_steps]


# What cannot be


FAULTS = {
    "no model": (RuntimeError, {"model": None}),
    "model and function": (ValueError, {"model_init": lambda: bert(), "model": bert}),
    "model without head": (ValueError, {"model": lambda: BertModel(bert().config)}),
    "function with two arguments": (RuntimeError, {"model_init": lambda left, right: bert()}),
    "function that returns nothing": (RuntimeError, {"model_init": lambda: None}),
    "evaluation without data": (ValueError, {"eval_strategy": "steps", "eval_dataset": None}),
    "unknown optimizer": (ValueError, {"optim": "fastest"}),
    "best model at other steps": (
        ValueError,
        {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "epoch"},
    ),
    "best checkpoints without a metric": (ValueError, {"save_strategy": "best", "eval_strategy": "steps"}),
    "metrics of batches without a result": (
        ValueError,
        {"batch_eval_metrics": True, "compute_metrics": lambda prediction: {}},
    ),
    "unknown argument": (TypeError, {"learning_rat": 1.0}),
}


@behaviour(nio=Nio.SAME, cases=FAULTS)
def faults_that_are_found_at_once(side, folder, case):
    """What Trainer refuses when it is made is refused as an error of the same type."""
    kind, given = case
    model = given.get("model")
    made = {"model": model()} if callable(model) else {}
    return caught(lambda: side.trainer(folder, **given | made), kind)


@behaviour(nio=Nio.NOT_RUN)
def training_without_data(side, folder):
    """A training without data is refused when it begins."""
    return caught(side.trainer(folder, train_dataset=None).train, ValueError)


@behaviour(nio=Nio.SAME)
def optimizer_beside_a_function_for_the_model(side, folder):
    """An optimizer cannot belong to a model that is made anew."""
    optimizer = torch.optim.SGD(bert().parameters())
    return caught(lambda: side.trainer(folder, model_init=lambda: bert(), optimizers=(optimizer, None)), RuntimeError)


@behaviour(nio=Nio.SAME)
def properties_of_a_trainer(side, folder):
    """The numbers and objects that scripts read from a Trainer."""
    data = Texts()
    trainer = side.trained(folder, train_dataset=data, gradient_accumulation_steps=2)
    state = trainer.state
    return {
        "data": trainer.train_dataset is data,
        "labels": trainer.label_names,
        "process": [trainer.is_world_process_zero(), trainer.is_local_process_zero()],
        "in training": trainer.is_in_train,
        "wrapped": trainer.model_wrapped is trainer.model,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "samples": trainer.get_total_train_batch_size(trainer.args),
        "state": [state.max_steps, state.logging_steps, state.train_batch_size, state.total_flos],
        "accumulation": trainer.accelerator.gradient_accumulation_steps,
    }
