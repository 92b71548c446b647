"""A race: the weights that an initialisation proposes train for some steps, and the best ones are kept.

What is measured at the start does not tell for certain how a training goes on. The loss after some hundred steps tells
more (benchmarks/layer_scales). A lane is a training of a copy of the model, by a copy of the Trainer, with the same
batches, random numbers, optimizer and schedule as the training itself, that stops after n steps. Lanes are held
against each other by their mean loss over the last quarter of their steps. One that is behind halfway, by more than two
standard errors of the paired differences, is stopped there.

Then the training begins from the weights that won. It takes the first steps of the winner again: so nothing of a lane
is left in it, and its logs, callbacks and checkpoints are those of a training without a race.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from nio_hf.core import Collective, InitResult
from nio_hf.core.memory import is_out_of_memory
from nio_hf.core.result import Lane, Race, last_quarter
from nio_hf.durable.isolation import isolated_random_state
from nio_hf.errors import ConfigError, DataError, NIOMemoryError, Problem, StoppedError, one_line
from nio_hf.trainer.apart import copy_apart
from nio_hf.trainer.checkpoints import describe_state, save_initialised
from nio_hf.trainer.digests import batch_digest
from nio_hf.trainer.replica import unpatch_forward

if TYPE_CHECKING:
    from nio_hf.trainer.trainer import NIOTrainerMixin

logger = logging.getLogger(__name__)

START = "start"
RACE_STEPS = 120
"""Steps of a lane where the settings leave them open: from there on losses rank configurations of the small ViT and
Swin of benchmarks/layer_scales as their accuracies do (Spearman's correlation 0.84 to 0.93)."""
CANDIDATES = 2
"""Lanes of a race: the weights that were found, and the start."""
LARGEST_SHARE = 0.02
"""Share of the training that a race may take where the settings leave it open."""
_ERRORS_BEHIND = 2.0
_SETTING = "nio_race_steps"
Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The weights of a race.

    Attributes:
        start: {name: tensor} of the parameters before the initialisation.
        result: Result of the initialisation, whose weights the model has.
    """

    start: Weights
    result: InitResult

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates: the weights that were found, and the start; one where they are the same."""
        found = self.result
        if found.method in ("nio", "none") and all(tensor.omega == 1 for tensor in found.tensors):
            return (found.title,)
        return (found.title, START)

    @torch.no_grad()
    def place(self, name: str, model: nn.Module) -> None:
        """Give a model that has the weights that were found those of a candidate, in place."""
        if name == START:
            for key, parameter in model.named_parameters():
                parameter.data.copy_(self.start[key])


def planned_steps(trainer: NIOTrainerMixin, max_steps: int) -> int:
    """Steps of a lane, as the settings ask for them; 0 for no race.

    Args:
        trainer: Trainer that would hold the race.
        max_steps: Steps of the training.

    Raises:
        ConfigError: Where the settings ask for a race that cannot be held.
    """
    asked = trainer.nio_args.nio_race_steps
    if asked == 0 or not trainer.nio_args.nio:
        return 0
    problem = _obstacle(trainer)
    if asked is None:
        worth_it = LARGEST_SHARE * max_steps >= CANDIDATES * RACE_STEPS
        is_stream = not hasattr(trainer.train_dataset, "__len__")
        return RACE_STEPS if worth_it and problem is None and not is_stream else 0
    if problem is None and asked >= max_steps:
        fix = f"Give fewer, or 0 for no race; {RACE_STEPS} are enough for most"
        problem = Problem(_SETTING, f"{asked}, and the training has {max_steps} steps", fix)
    if problem is not None:
        raise ConfigError(problem)
    return asked


def steps_of_training(trainer: Trainer) -> int:
    """Steps of the training as the arguments say; 0 where only the data can tell."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        return 0
    steps_of_epoch = len(trainer.train_dataset) // trainer.get_total_train_batch_size(args)
    return math.ceil(args.num_train_epochs * max(steps_of_epoch, 1))


def _obstacle(trainer: NIOTrainerMixin) -> Problem | None:
    """Why a Trainer cannot hold a race; None where it can."""
    without = "Leave it out, or set it to 0"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return Problem(_SETTING, "given with FSDP or DeepSpeed, and a race trains copies of the whole model", without)
    if trainer.has_own_optimizer:
        found = "given with optimizers=, and each lane of a race needs an optimizer of its own"
        return Problem(_SETTING, found, "Give optim= or optimizer_cls_and_kwargs= instead, or leave it out")
    if isinstance(trainer.train_dataset, Iterator):
        found = "given with a stream that can be read only once, and each lane of a race reads the same data"
        return Problem(_SETTING, found, "Give a data set that can be read again, or leave it out")
    return None


def hold_race(trainer: NIOTrainerMixin, candidates: Candidates, steps: int) -> InitResult:
    """Hold a race, and give the model the weights that won it.

    Returns:
        The result of the initialisation, with the race, and with the scales and measurements of the winner.

    Raises:
        NIOMemoryError: Where the settings ask for a race, and memory does not suffice.
        StoppedError, DataError: As in [`Lanes.run`].
    """
    started = time.perf_counter()
    try:
        race = Lanes(trainer, candidates, steps).run()
    except (RuntimeError, DataError) as error:
        if isinstance(error, StoppedError) or not (isinstance(error, DataError) or is_out_of_memory(error)):
            raise
        fix = f"Set {_SETTING}=0, or make the training smaller"
        problem = Problem("the race", f"out of memory ({one_line(error)})", fix)
        raised = error if isinstance(error, DataError) else NIOMemoryError(problem)
        if trainer.nio_args.nio_race_steps is not None:
            raise raised from error
        # Nobody has asked for this race.
        trainer._tell(logger, "There is no race. %s", raised, level=logging.WARNING)
        return candidates.result
    model = trainer.unwrapped_model
    candidates.place(race.winner, model)
    result = _of_winner(candidates.result, race)
    result = dataclasses.replace(result, seconds=result.seconds + time.perf_counter() - started)
    trainer._tell(logger, "%s", race.message)
    with Collective.current().together():
        if trainer.nio_state is not None and trainer.args.should_save:
            trainer.nio_state = describe_state(model, result, trainer.nio_state["task"])
            if trainer.nio_args.nio_save_init:
                describe = trainer.describe
                save_initialised(model, trainer.nio_state, trainer.nio_init_dir, trainer.processing_class, describe)
    return result


def _of_winner(found: InitResult, race: Race) -> InitResult:
    """The result with the race, and with scales of 1 where the start has won."""
    if race.winner != START:
        return dataclasses.replace(found, race=race, message=f"{found.message} {race.message}")
    groups = tuple(dataclasses.replace(group, omega=1.0) for group in found.groups)
    tensors = tuple(dataclasses.replace(tensor, omega=1.0) for tensor in found.tensors)
    kept = dataclasses.replace(found, race=race, groups=groups, tensors=tensors, after=found.before)
    return dataclasses.replace(kept, status="unchanged", message=race.message)


class Lanes:
    """The lanes of one race.

    Args:
        trainer: Trainer of the training that the lanes begin.
        candidates: Candidates of the race.
        steps: N, of each lane.
    """

    def __init__(self, trainer: NIOTrainerMixin, candidates: Candidates, steps: int) -> None:
        self._trainer = trainer
        self._candidates = candidates
        self._steps = steps
        self._first_batch: str | None = None

    def run(self) -> Race:
        """Run the lanes, and choose.

        Raises:
            StoppedError: Where SIGTERM asked for it.
            DataError: Where a lane is given other batches than the one before.
        """
        names, lanes = self._candidates.names, list[Lane]()
        total = len(names) * self._steps
        with tqdm(total=total, desc="Race", unit="step", disable=self._trainer._hides_progress) as bar:
            for name in names:
                bar.set_description_str(f"Race: {name}")
                lanes.append(self._lane(name, leader(lanes, self._steps), bar))
        best = leader(lanes, self._steps)
        return Race(self._steps, tuple(lanes), names[0] if best is None else best.name)

    def _lane(self, name: str, best: Lane | None, bar: Any) -> Lane:
        trainer = self._trainer
        with isolated_random_state(trainer.args.device, trainer.train_dataset, trainer.data_collator):
            model, chosen = _copied(trainer)
            self._candidates.place(name, model)
            watch = _Watch(self._steps, best, trainer, bar)
            lane = _lane_trainer(trainer, model, chosen, watch)
            Trainer.train(lane)
        if watch.stopped:
            raise StoppedError(Problem("the race", f"stopped after {len(watch.losses)} steps", "Start again"))
        self._check_batches(name, watch)
        return Lane(name, tuple(watch.losses))

    def _check_batches(self, name: str, watch: _Watch) -> None:
        first = watch.first_batch
        if self._first_batch not in (None, first):
            found = f"the lane of {name} was given other batches than the one before it"
            raise DataError(Problem("train_dataset", found, f"Give data that can be read twice, or {_SETTING}=0"))
        self._first_batch = first


def leader(lanes: Iterable[Lane], steps: int) -> Lane | None:
    """The lane with the lowest loss at the end, the first of equals, of those that came so far; None without one."""
    finished = [lane for lane in lanes if len(lane.losses) == steps]
    return min(finished, key=lambda lane: lane.loss, default=None)


def is_behind(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether losses are above those of another lane at the same steps by more than chance has it."""
    judged = last_quarter(losses)
    differences = [own - other for own, other in zip(losses[judged], best[judged], strict=False)]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) > _ERRORS_BEHIND * error


class _Watch(TrainerCallback):
    """Keeps the loss of each step of a lane, and ends it."""

    def __init__(self, steps: int, best: Lane | None, trainer: NIOTrainerMixin, bar: Any) -> None:
        self._steps = steps
        self._best = best
        self._trainer = trainer
        self._bar = bar
        self._collective = Collective.current()
        self._parts: list[Tensor] = []
        self.losses: list[float] = []
        self.first_batch: str | None = None
        self.stopped = False

    def watched(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`training_step`, with its losses and the first batch kept."""

        def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.first_batch is None:
                self.first_batch = batch_digest(inputs)
            loss = step(model, inputs, *args, **kwargs)
            self._parts.append(loss.detach())
            return loss

        return training_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the loss, the mean over processes; end a lane that is through, behind, or not finite."""
        total = torch.stack(self._parts).sum().double()
        self._parts.clear()
        self._collective.sum_(total)
        loss = float(total) / self._collective.size
        if not math.isfinite(loss):
            control.should_training_stop = True
            return
        self.losses.append(loss)
        self._bar.update()
        done, preemption = len(self.losses), self._trainer.preemption
        (self.stopped,) = self._collective.any(preemption is not None and preemption.requested)
        halfway = self._best is not None and done == self._steps // 2
        lost = halfway and is_behind(self.losses, self._best.losses if self._best else ())
        if done == self._steps or lost or self.stopped:
            control.should_training_stop = True


def _copied(trainer: NIOTrainerMixin) -> tuple[nn.Module, Any]:
    """A copy of the model, and of the choice of the optimizer, which may name parameters of it."""
    model, chosen = copy.deepcopy((trainer.unwrapped_model, trainer.optimizer_cls_and_kwargs))
    unpatch_forward(model)
    return model, chosen


def _lane_trainer(trainer: NIOTrainerMixin, model: nn.Module, chosen: Any, watch: _Watch) -> Trainer:
    """A copy of a Trainer that trains a copy of its model, and saves, evaluates, logs and calls nothing."""
    lane: Any = copy_apart(trainer)
    lane.is_lane = True
    lane.args = _quiet(trainer.args)
    lane.model = lane.model_wrapped = model
    lane.model_init = lane.optimizer = lane.lr_scheduler = lane.preemption = None
    lane.optimizer_cls_and_kwargs = chosen
    handler = CallbackHandler([DefaultFlowCallback(), watch], model, trainer.processing_class, None, None)
    lane.callback_handler = handler
    lane.create_accelerator_and_postprocess()
    lane.training_step = watch.watched(lane.training_step)
    return lane  # type: ignore[no-any-return]


def _quiet(args: TrainingArguments) -> TrainingArguments:
    """The arguments of a lane."""
    own = copy.copy(args)
    own.eval_strategy, own.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    own.eval_on_start = own.load_best_model_at_end = own.push_to_hub = own.auto_find_batch_size = False
    own.disable_tqdm = own.skip_memory_metrics = True
    return own
