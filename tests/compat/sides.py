"""The sides of the comparison, and the list of behaviours that each of them shows."""

import dataclasses
import enum
from collections.abc import Callable

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from nio_hf import NIOTrainer, NIOTrainerMixin, NIOTrainingArguments
from tests.compat.toys import Texts, bert
from tests.trainer.toys import TRAINER_TAKES


class NIOSeq2SeqTrainer(NIOTrainerMixin, Seq2SeqTrainer):
    """A Trainer of sequences to sequences with NIO."""


@dataclasses.dataclass
class NIOSeq2SeqTrainingArguments(NIOTrainingArguments, Seq2SeqTrainingArguments):
    """Its arguments."""


_ARGUMENTS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
}
_NIO_ARGUMENTS = {"nio_batch_size": 8, "nio_sub_batches": 2, "nio_report_batches": 2, "nio_groups": "model"}


@dataclasses.dataclass
class Side:
    """The classes that a script uses, and short ways to make a Trainer of them."""

    name: str
    Trainer: type
    Seq2SeqTrainer: type
    arguments_class: type
    seq2seq_arguments_class: type
    settings: dict
    trainers: list = dataclasses.field(default_factory=list)

    def arguments(self, folder, arguments_class=None, **changes):
        """Arguments for a training of six steps."""
        settings = {"output_dir": str(folder), **_ARGUMENTS, **self.settings, **changes}
        return (arguments_class or self.arguments_class)(**settings)

    def with_nio(self, own):
        """The user's own class of arguments; on the sides of NIO a class that has the settings of NIO, too."""
        if self.arguments_class is TrainingArguments:
            return own
        bases = (NIOTrainingArguments, own)
        return dataclasses.dataclass(type(f"NIO{own.__name__}", bases, {"__module__": own.__module__}))

    def trainer(self, folder, trainer_class=None, args=None, **given):
        """A Trainer of a small classifier; it takes what Trainer knows of what is given, its arguments the rest."""
        taken = {name: given.pop(name) for name in list(given) if name in TRAINER_TAKES}
        if "model" not in taken and "model_init" not in taken:
            taken["model"] = bert()
        taken.setdefault("train_dataset", Texts())
        taken.setdefault("eval_dataset", Texts(10))
        made = (trainer_class or self.Trainer)(args=args or self.arguments(folder, **given), **taken)
        self.trainers.append(made)
        return made

    def trained(self, folder, **given):
        made = self.trainer(folder, **given)
        made.train()
        return made


def plain():
    return Side("plain", Trainer, Seq2SeqTrainer, TrainingArguments, Seq2SeqTrainingArguments, {})


def without_nio():
    return _nio_side("without NIO", {"nio": False})


def with_nio():
    return _nio_side("with NIO", _NIO_ARGUMENTS)


def _nio_side(name, settings):
    classes = (NIOTrainer, NIOSeq2SeqTrainer, NIOTrainingArguments, NIOSeq2SeqTrainingArguments)
    return Side(name, *classes, settings)


class Nio(enum.Enum):
    """What is asked of a behaviour when NIO is on."""

    SAME = "the same value"
    ALIKE = "the same value but for the numbers that other weights lead to"
    NOT_RUN = "nothing: NIO has no part in it, refuses it, or shows it in another case"


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Something that a script does with a Trainer, and what it sees."""

    name: str
    show: Callable
    nio: Nio


BEHAVIOURS = []


def behaviour(nio=Nio.ALIKE, cases=None, nio_cases=None):
    """Put a function of a side and a folder on the list.

    With cases, which a mapping gives names, it has a third argument, and each is a behaviour of its own. `nio_cases`
    names those that are shown with NIO on, where a few stand for all.
    """

    def enter(function):
        named = cases if isinstance(cases, dict) else {str(case): case for case in cases or ()}
        shown = set(named) if nio_cases is None else set(nio_cases)
        assert shown <= set(named), f"{shown - set(named)} of {function.__name__} is no case"
        for name, case in named.items():
            asked = nio if name in shown else Nio.NOT_RUN
            show = lambda side, folder, case=case: function(side, folder, case)  # noqa: E731
            BEHAVIOURS.append(Behaviour(f"{function.__name__}[{name}]", show, asked))
        if not named:
            BEHAVIOURS.append(Behaviour(function.__name__, function, nio))
        return function

    return enter


def caught(action, *kinds):
    """The name of the first of the kinds by which `except` catches what the action raises.

    What none of them catches goes on its way.
    """
    try:
        action()
    except kinds as error:
        return next(kind.__name__ for kind in kinds if isinstance(error, kind))
    return "nothing is raised"
