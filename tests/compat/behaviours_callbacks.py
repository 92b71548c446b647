"""What callbacks are told, and what they decide."""

from transformers import DefaultFlowCallback, PrinterCallback, ProgressCallback, TrainerCallback

from tests.compat.sides import Nio, behaviour, caught
from tests.compat.toys import Texts, checkpoints, history, outcome

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
)
EVENTFUL = {
    "steps": {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 4},
    "evaluation first": {"eval_on_start": True, "max_steps": 2},
    "nothing": {"max_steps": 2, "logging_strategy": "no"},
}


class Recorder(TrainerCallback):
    """Records each event with its step, but for what NIO logs."""

    def __init__(self):
        self.events = []
        self.given = {}


def _record(event):
    def note(self, args, state, control, **kwargs):
        if event == "on_log" and any(name.startswith("nio") for name in kwargs["logs"]):
            return
        self.events.append((event, state.global_step))
        self.given[event] = sorted(name for name, value in kwargs.items() if value is not None)

    return note


for _event in EVENTS:
    setattr(Recorder, _event, _record(_event))


@behaviour(nio=Nio.SAME, cases=EVENTFUL, nio_cases=("steps", "accumulation"))
def events(side, folder, changes):
    """All events in their order, and what comes with each of them."""
    recorder = Recorder()
    trainer = side.trained(folder, callbacks=[recorder], **changes)
    trainer.evaluate()
    trainer.predict(Texts(6))
    return [recorder.events, recorder.given]


@behaviour(nio=Nio.SAME)
def events_of_a_second_training(side, folder):
    """The events of two trainings by one Trainer."""
    recorder = Recorder()
    trainer = side.trained(folder, callbacks=[recorder], max_steps=2)
    trainer.train()
    return recorder.events


@behaviour(nio=Nio.SAME)
def logs_that_callbacks_are_told(side, folder):
    """The names of the values that `on_log` and `on_evaluate` are told."""
    told = []

    class Listen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if not any(name.startswith("nio") for name in logs):
                told.append(sorted(logs))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            told.append(sorted(metrics))

    side.trained(folder, callbacks=[Listen()], eval_strategy="steps", eval_steps=3, logging_steps=2)
    return told


@behaviour(nio=Nio.SAME)
def default_callbacks(side, folder):
    """The callbacks that scripts look for are there, with and without progress bars."""
    found = []
    for disabled in (True, False):
        trainer = side.trainer(folder, disable_tqdm=disabled)
        kinds = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
        found.append([trainer.pop_callback(kind) is not None for kind in kinds])
    return found


class EveryThird(DefaultFlowCallback):
    """Saves, evaluates and logs at every third step."""

    def on_step_end(self, args, state, control, **kwargs):
        control = super().on_step_end(args, state, control, **kwargs)
        control.should_log = control.should_save = control.should_evaluate = state.global_step % 3 == 0
        return control


@behaviour()
def flow_is_replaced(side, folder):
    """A flow of the user's takes the place of the default one."""
    trainer = side.trainer(folder)
    trainer.remove_callback(DefaultFlowCallback)
    trainer.add_callback(EveryThird)
    trainer.train()
    return [outcome(trainer), checkpoints(folder)]


class SetFlag(TrainerCallback):
    """Sets a flag of the control at the end of a step, or at an event."""

    def __init__(self, flag, step, event="on_step_end"):
        self.flag, self.step, self.event = flag, step, event

    def _set(self, event, state, control):
        if event == self.event and state.global_step == self.step:
            setattr(control, self.flag, True)
        return control

    def on_step_end(self, args, state, control, **kwargs):
        return self._set("on_step_end", state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        return self._set("on_evaluate", state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        return self._set("on_epoch_end", state, control)


FLAGS = {
    "stop": ("should_training_stop", 3),
    "stop the epoch": ("should_epoch_stop", 3),
    "evaluate": ("should_evaluate", 3),
    "save": ("should_save", 3),
    "log": ("should_log", 3),
    "stop when evaluated": ("should_training_stop", 4, "on_evaluate"),
    "save when evaluated": ("should_save", 4, "on_evaluate"),
    "save at the end of an epoch": ("should_save", 8, "on_epoch_end"),
}


@behaviour(cases=FLAGS, nio_cases=("stop", "save"))
def flags(side, folder, case):
    """What a flag that a callback sets leads to."""
    changes = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 5}
    trainer = side.trained(folder, callbacks=[SetFlag(*case)], **changes)
    return [outcome(trainer), checkpoints(folder)]


@behaviour()
def callback_resumes_what_it_stopped(side, folder):
    """A checkpoint that a flag asked for is gone on from."""
    flags = [SetFlag("should_save", 3), SetFlag("should_training_stop", 3)]
    side.trained(folder, callbacks=flags)
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    return [outcome(trainer), checkpoints(folder)]


@behaviour()
def callback_changes_the_training(side, folder):
    """A callback halves the learning rate, and changes a gradient before the optimizer sees it."""

    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.classifier.bias.grad.zero_()

    return outcome(side.trained(folder, callbacks=[Change()]))


class StopError(Exception):
    """An error of the user's."""


@behaviour(
    cases={"error": StopError, "interrupt": KeyboardInterrupt, "end of iteration": StopIteration}, nio_cases=("error",)
)
def callback_raises(side, folder, kind):
    """What a callback raises reaches the script, which can train again."""

    class Raise(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise kind

    callback = Raise()
    trainer = side.trainer(folder, callbacks=[callback])
    raised = caught(trainer.train, kind)
    step, logged = trainer.state.global_step, len(history(trainer))
    trainer.remove_callback(callback)
    trainer.train()
    return [raised, step, logged, outcome(trainer)]


@behaviour(nio=Nio.SAME)
def callback_sees_the_gradients(side, folder):
    """There are gradients before the step of the optimizer, and none at the end of it."""
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.before = all(p.grad is not None for p in model.parameters())

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((self.before, all(p.grad is None for p in model.parameters())))

    side.trained(folder, callbacks=[Look()])
    return seen
