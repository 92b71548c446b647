"""Arguments of every kind, and what becomes of them."""

import contextlib
import copy
import dataclasses
import json
import pickle

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from tests.compat.sides import Nio, behaviour
from tests.compat.toys import Prose, Texts, checkpoints, history, outcome, t5

MANY = 400
"""Samples enough for the default settings of NIO."""


@dataclasses.dataclass
class OwnArguments(TrainingArguments):
    """Arguments with fields of the user's, and other defaults."""

    temperature: float = 0.7
    words: list[str] = dataclasses.field(default_factory=lambda: ["one", "two"])
    learning_rate: float = 0.02
    logging_steps: float = 3
    per_device_train_batch_size: int = 4
    weight_decay: float = 0.25


@dataclasses.dataclass
class CheckedArguments(OwnArguments):
    """Arguments that check what they are given."""

    def __post_init__(self):
        super().__post_init__()
        self.doubled = 2 * self.temperature


QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def _plain_arguments(folder, arguments_class=TrainingArguments, **changes):
    settings = {"max_steps": 4, "logging_steps": 1, **QUIET, **changes}
    return arguments_class(output_dir=str(folder), **settings)


@behaviour()
def arguments_of_trainer(side, folder):
    """TrainingArguments themselves will do."""
    trainer = side.trained(folder, args=_plain_arguments(folder), train_dataset=Texts(MANY))
    return [isinstance(trainer.args, TrainingArguments), trainer.state.global_step, len(history(trainer))]


@behaviour()
def arguments_are_the_script_s_own(side, folder):
    """What a script sets on its own object later is honoured."""
    args = _plain_arguments(folder)
    trainer = side.trainer(folder, args=args, train_dataset=Texts(MANY))
    args.max_steps = 2
    args.learning_rate = 0.125
    args.save_strategy = "steps"
    trainer.train()
    rates = [entry["learning_rate"] for entry in history(trainer) if "learning_rate" in entry]
    return [trainer.state.global_step, [str(rate) for rate in rates], checkpoints(folder)]


@behaviour()
def arguments_of_the_trainer_are_those_of_the_script(side, folder):
    """What is set on `trainer.args` is seen by the script, and the other way round."""
    args = _plain_arguments(folder)
    trainer = side.trainer(folder, args=args, train_dataset=Texts(MANY))
    trainer.args.max_grad_norm = 0.5
    args.run_name = "mine"
    return [args.max_grad_norm, trainer.args.run_name, trainer.args is args]


@behaviour(nio=Nio.SAME)
def arguments_are_not_changed(side, folder):
    """Two Trainers of one object of arguments begin with the same ones."""
    args = side.arguments(folder, max_steps=2)
    before = args.to_dict()
    side.trained(folder, args=args)
    after = args.to_dict()
    side.trained(folder, args=args)
    changed = [name for name in before if before[name] != after[name]]
    return [args.max_steps, changed]


@behaviour()
def arguments_are_set_between_trainings(side, folder):
    """What is set between Trainer and training, and between two trainings, is honoured."""
    trainer = side.trainer(folder)
    trainer.args.max_steps = 2
    trainer.train()
    first = outcome(trainer)
    trainer.args.max_steps, trainer.args.learning_rate, trainer.args.logging_steps = 4, 1e-3, 2
    trainer.train()
    return [first, outcome(trainer)]


@behaviour()
def no_arguments(side, folder):
    """Without arguments the Trainer writes into `tmp_trainer`."""
    with contextlib.chdir(folder):
        trainer = side.Trainer(model=t5(), train_dataset=Prose(4))
        trainer.save_model()
        return [trainer.args.output_dir, (folder / "tmp_trainer" / "model.safetensors").is_file()]


@behaviour(nio=Nio.SAME, cases={"own": OwnArguments, "checked": CheckedArguments})
def own_arguments(side, folder, own):
    """Arguments of the user's, with NIO's beside them, keep their fields and their defaults."""
    settings = {"nio": False} if side.settings else {}
    args = side.with_nio(own)(output_dir=str(folder), words=["three"], **settings)
    names = ("temperature", "words", "learning_rate", "logging_steps", "per_device_train_batch_size", "weight_decay")
    return [{name: getattr(args, name) for name in names}, getattr(args, "doubled", None), isinstance(args, own)]


@behaviour(cases={"own": OwnArguments, "checked": CheckedArguments})
def own_arguments_without_those_of_nio(side, folder, own):
    """Arguments of the user's, as they are, keep their fields and their defaults."""
    args = _plain_arguments(folder, own, logging_steps=2)
    trainer = side.trained(folder, args=args, train_dataset=Texts(MANY))
    seen = trainer.args
    return [isinstance(seen, own), seen.words, str(seen.weight_decay), getattr(seen, "doubled", None), len(seen.words)]


@behaviour(nio=Nio.SAME, cases={"of the side": False, "of the user": True})
def arguments_are_read_back(side, folder, own):
    """`training_args.bin` has the arguments of the training."""
    args = _plain_arguments(folder, OwnArguments) if own else side.arguments(folder)
    trainer = side.trainer(folder, args=args, train_dataset=Texts(MANY))
    trainer.args.learning_rate = 0.5
    trainer.save_model()
    read = torch.load(folder / "training_args.bin", weights_only=False)
    kinds = [isinstance(read, kind) for kind in (TrainingArguments, OwnArguments)]
    return [kinds, read.learning_rate, read.max_steps, getattr(read, "words", None), read.output_dir == str(folder)]


@behaviour(nio=Nio.SAME)
def arguments_are_read_back_by_trainer(side, folder):
    """Trainer itself trains with the arguments that `training_args.bin` has."""
    side.trained(folder, max_steps=2, save_strategy="steps")
    read = torch.load(folder / "checkpoint-2" / "training_args.bin", weights_only=False)
    trainer = Trainer(model=t5(), args=read, train_dataset=Prose())
    trainer.train()
    return [trainer.state.global_step, read.logging_steps, str(read.save_strategy)]


@behaviour(nio=Nio.SAME)
def arguments_are_copied(side, folder):
    """Arguments can be copied, pickled and replaced."""
    args = side.arguments(folder)
    copies = [copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))]
    copies.append(dataclasses.replace(args, max_steps=3))
    return [[c.max_steps, c.learning_rate, type(c) is type(args), c == args] for c in copies]


@behaviour(nio=Nio.SAME)
def arguments_are_written_out(side, folder):
    """Arguments become a dictionary, JSON and values for trackers."""
    args = side.arguments(folder)
    whole, text, tidy = args.to_dict(), json.loads(args.to_json_string()), args.to_sanitized_dict()
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    forms = [{name: form.get(name) for name in names - {"output_dir"}} for form in (whole, text)]
    kinds = {name: type(tidy[name]).__name__ for name in names & tidy.keys()}
    return [*forms, kinds, "max_steps=6" in str(args)]


@behaviour(nio=Nio.SAME, cases=("command line", "dictionary", "json", "yaml"))
def arguments_are_parsed(side, folder, source):
    """HfArgumentParser makes arguments of each source."""
    given = {"output_dir": "there", "max_steps": 7, "learning_rate": 0.25, "use_cpu": True, "eval_strategy": "no"}
    parser = HfArgumentParser(side.arguments_class)
    if source == "command line":
        (args,) = parser.parse_args_into_dataclasses([f"--{name}={value}" for name, value in given.items()])
    elif source == "dictionary":
        (args,) = parser.parse_dict(given)
    else:
        (folder / f"args.{source}").write_text(json.dumps(given))
        parse = parser.parse_json_file if source == "json" else parser.parse_yaml_file
        (args,) = parse(folder / f"args.{source}")
    return {name: getattr(args, name) for name in given}


@behaviour(nio=Nio.SAME)
def defaults_of_arguments(side, folder):
    """The defaults of all arguments of Trainer."""
    args = side.arguments_class(output_dir="there", use_cpu=True)
    names = sorted(field.name for field in dataclasses.fields(TrainingArguments))
    return {name: str(getattr(args, name)) for name in names}


@behaviour()
def sequence_arguments_of_trainer(side, folder):
    """Seq2SeqTrainingArguments themselves will do for a Seq2SeqTrainer."""
    settings = {"max_steps": 2, "logging_steps": 1, "predict_with_generate": True, "generation_max_length": 4, **QUIET}
    args = Seq2SeqTrainingArguments(output_dir=str(folder), **settings)
    given = {"model": t5(), "train_dataset": Prose(MANY), "eval_dataset": Prose(4)}
    trainer = side.trained(folder, trainer_class=side.Seq2SeqTrainer, args=args, **given)
    return [trainer.state.global_step, list(trainer.predict(Prose(4)).predictions.shape)]
