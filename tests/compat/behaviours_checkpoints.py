"""What a Trainer saves while it trains, and how it goes on from there."""

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from tests.compat.sides import Nio, behaviour, caught, plain
from tests.compat.toys import (
    Draws,
    Images,
    Prose,
    Scores,
    SizedStream,
    StopAt,
    Stream,
    Texts,
    bert,
    checkpoints,
    edited_configuration,
    files,
    gpt2,
    half_body,
    history,
    large_vocabulary,
    name_of,
    outcome,
    perceptron,
    resnet,
    two_layer_head,
    vit,
    weights,
    widened,
)

SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
BEST = SAVING | EVALUATING | {"load_best_model_at_end": True, "metric_for_best_model": "score"}
BEST["greater_is_better"] = True
UNLIKELY = {
    "another head": two_layer_head,
    "other embeddings": large_vocabulary,
    "a constructor with two arguments": widened,
    "an edited configuration": edited_configuration,
    "several dtypes": half_body,
    "no configuration": perceptron,
}
"""Models that are not what their configurations say."""


# Which checkpoints there are

STRATEGIES = {
    "steps": SAVING,
    "a share of the steps": {"save_strategy": "steps", "save_steps": 0.5},
    "epochs": {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "none": {"save_strategy": "no"},
    "last step": {"save_strategy": "steps", "save_steps": 4, "max_steps": 6},
    "limit of one": SAVING | {"save_total_limit": 1},
    "limit of two": SAVING | {"save_total_limit": 2, "save_steps": 1},
    "epochs, limit of one": {"save_strategy": "epoch", "save_total_limit": 1, "max_steps": -1, "num_train_epochs": 2},
}


@behaviour(nio=Nio.SAME, cases=STRATEGIES, nio_cases=("steps", "epochs, limit of one", "limit of two"))
def names_of_checkpoints(side, folder, changes):
    """Which checkpoints are there when the training has ended."""
    side.trained(folder, **changes)
    return [checkpoints(folder), files(folder)]


LIMITS = {
    "no limit": {},
    "limit of one": {"save_total_limit": 1},
    "limit of two": {"save_total_limit": 2},
    "best only": {"save_strategy": "best"},
    "best only, limit of one": {"save_strategy": "best", "save_total_limit": 1},
    "saved less often than evaluated": {"save_steps": 4},
    "lower is better": {"greater_is_better": False},
}


@behaviour(nio=Nio.SAME, cases=LIMITS, nio_cases=("limit of one", "best only"))
def best_checkpoint(side, folder, changes):
    """Which checkpoints are there when the best of them is kept, and which is the best."""
    scores = Scores(0.2, 0.9, 0.3, 0.5)
    trainer = side.trained(folder, compute_metrics=scores, max_steps=8, **BEST | changes)
    state = trainer.state
    best = [state.best_metric, state.best_global_step, name_of(state.best_model_checkpoint)]
    return [checkpoints(folder), best]


@behaviour(
    cases={"bert": bert, **UNLIKELY, "gpt2": gpt2, "resnet": resnet},
    nio_cases=("bert", "another head", "several dtypes", "gpt2"),
)
def best_model_is_loaded(side, folder, model):
    """The weights at the end are those of the best checkpoint."""
    data = {gpt2: Prose, resnet: Images}.get(model, Texts)
    best = []

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                best.append(weights(model))

    given = {"train_dataset": data(), "eval_dataset": data(4), "compute_metrics": Scores(0.9, 0.1, 0.2)}
    trainer = side.trained(folder, model=model(), callbacks=[Keep()], **given, **BEST)
    final = weights(trainer)
    return [outcome(trainer), [torch.equal(final[name], best[0][name]) for name in final]]


# What is in a checkpoint


@behaviour(nio=Nio.SAME, cases=(True, False))
def files_of_a_checkpoint(side, folder, only_model):
    """The files of a checkpoint, with and without what a resume needs."""
    side.trained(folder, **SAVING, save_only_model=only_model)
    return files(folder / "checkpoint-4")


@behaviour(cases={"bert": bert, "vit": vit, "gpt2": gpt2, "perceptron": perceptron}, nio_cases=("vit",))
def tensors_of_a_checkpoint(side, folder, model):
    """The names and values of the weights in a checkpoint."""
    data = {vit: Images, gpt2: Prose}.get(model, Texts)
    side.trained(folder, model=model(), train_dataset=data(), **SAVING, max_steps=2)
    return safetensors.torch.load_file(folder / "checkpoint-2" / "model.safetensors")


@behaviour(nio=Nio.SAME)
def state_of_a_checkpoint(side, folder):
    """The fields of `trainer_state.json`, but for the log."""
    side.trained(folder, compute_metrics=Scores(0.5, 0.7, 0.1), **BEST)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = name_of(state["best_model_checkpoint"])
    del state["log_history"]
    return state


@behaviour(nio=Nio.SAME)
def optimizer_of_a_checkpoint(side, folder):
    """The files of optimizer, schedule and random numbers can be read by hand."""
    side.trained(folder, **SAVING)
    checkpoint = folder / "checkpoint-2"
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    schedule = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    random = torch.load(checkpoint / "rng_state.pth", weights_only=False)
    return [sorted(optimizer), len(optimizer["state"]), schedule, random["cpu"]]


# Resuming


def _interrupted(side, folder, step=4, **given):
    """A training that ended too early, its last checkpoint at a step."""
    side.trained(folder, callbacks=[StopAt(step)], **{"save_steps": step, "save_strategy": "steps", **given})


@behaviour(nio=Nio.NOT_RUN, cases=(True, False))
def resume_without_a_checkpoint(side, folder, as_true):
    """Where there is no checkpoint, a resume is a ValueError."""
    wanted = True if as_true else str(folder / "checkpoint-9")
    return caught(lambda: side.trainer(folder).train(resume_from_checkpoint=wanted), ValueError)


@behaviour()
def resume_if_possible(side, folder):
    """The idiom that resumes where it can and begins where it cannot."""
    trainer = side.trainer(folder, **SAVING)
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError:
        trainer.train()
    return outcome(trainer)


@behaviour(nio=Nio.NOT_RUN)
def resume_from_an_empty_folder(side, folder):
    """A folder without weights is a ValueError."""
    empty = folder / "checkpoint-3"
    empty.mkdir()
    return caught(lambda: side.trainer(folder).train(resume_from_checkpoint=str(empty)), ValueError)


@behaviour(nio=Nio.NOT_RUN)
def resume_without_a_state(side, folder):
    """A model without the state of a Trainer is a FileNotFoundError."""
    bert().save_pretrained(folder / "model")
    return caught(lambda: side.trainer(folder).train(resume_from_checkpoint=str(folder / "model")), FileNotFoundError)


@behaviour()
def resume_is_false(side, folder):
    """False begins anew, whatever checkpoints there are."""
    _interrupted(side, folder, step=2)
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=False)
    return outcome(trainer)


ENDS = {
    "in the middle of an epoch": {},
    "at the end of an epoch": {"step": 8, "max_steps": 12},
    "with accumulation": {"step": 3, "gradient_accumulation_steps": 2, "max_steps": 7},
    "in the second epoch, with accumulation": {"step": 5, "gradient_accumulation_steps": 3, "max_steps": 8},
    "by epochs": {"step": 5, "max_steps": -1, "num_train_epochs": 2},
    "with a last batch that is not full": {"step": 7, "train_dataset": 34, "max_steps": 12},
    "with another batch size": {"resumed": {"per_device_train_batch_size": 8}},
    "without skipping what was seen": {"resumed": {"ignore_data_skip": True}},
    "with more steps": {"resumed": {"max_steps": 9}},
    "with workers": {"dataloader_num_workers": 1, "max_steps": 5},
    "under another schedule": {"resumed": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine"}},
    "with noise in the embeddings": {"neftune_noise_alpha": 3.0},
}


@behaviour(
    cases=ENDS,
    nio_cases=("in the middle of an epoch", "with accumulation", "without skipping what was seen", "with more steps"),
)
def resume_by_path(side, folder, changes):
    """What a resumed training leaves, and whether it is what an uninterrupted one leaves."""
    given = dict(changes)
    step, resumed, samples = given.pop("step", 4), given.pop("resumed", {}), given.pop("train_dataset", 32)
    whole = outcome(side.trained(folder / "whole", train_dataset=Texts(samples), **given))
    _interrupted(side, folder, step, train_dataset=Texts(samples), **given)
    draws = Draws()
    trainer = side.trainer(folder, train_dataset=Texts(samples), callbacks=[draws], **given | resumed)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    after = outcome(trainer)
    same = all(torch.equal(whole["weights"][name], tensor) for name, tensor in after["weights"].items())
    return [after, same, len(draws.drawn)]


@behaviour(cases={"true": True, "path": False}, nio_cases=("true",))
def resume_of_the_last(side, folder, last):
    """True is the checkpoint of the highest step, a path is any."""
    side.trained(folder, **SAVING)
    trainer = side.trainer(folder, max_steps=9)
    trainer.train(resume_from_checkpoint=last or str(folder / "checkpoint-2"))
    return [outcome(trainer), len(history(trainer))]


@behaviour()
def resume_after_the_end(side, folder):
    """The resume of a training that had ended with an epoch makes no step."""
    changes = SAVING | {"max_steps": 8}
    side.trained(folder, **changes)
    draws = Draws()
    trainer = side.trainer(folder, callbacks=[draws], **changes)
    output = trainer.train(resume_from_checkpoint=True)
    return [output.global_step, output.training_loss, draws.drawn, outcome(trainer), checkpoints(folder)]


@behaviour(cases={"of unknown length": Stream, "of known length": SizedStream})
def resume_of_a_stream(side, folder, stream):
    """The resume of a training on a stream, in its first pass."""
    _interrupted(side, folder, train_dataset=stream())
    trainer = side.trainer(folder, train_dataset=stream())
    trainer.train(resume_from_checkpoint=True)
    return outcome(trainer)


@behaviour(
    cases={"bert": bert, **UNLIKELY, "gpt2": gpt2, "resnet": resnet},
    nio_cases=("bert", "another head", "several dtypes", "resnet"),
)
def resume_of_models(side, folder, model):
    """The resume of each model, also of those that are not what their configurations say."""
    data = {gpt2: Prose, resnet: Images}.get(model, Texts)
    _interrupted(side, folder, model=model(), train_dataset=data())
    trainer = side.trainer(folder, model=model(), train_dataset=data())
    trainer.train(resume_from_checkpoint=True)
    whole = weights(side.trained(folder / "whole", model=model(), train_dataset=data()))
    return [outcome(trainer), {name: torch.equal(whole[name], tensor) for name, tensor in weights(trainer).items()}]


@behaviour(nio=Nio.ALIKE)
def resume_in_the_same_trainer(side, folder):
    """The Trainer that was interrupted resumes itself."""
    stop = StopAt(4)
    trainer = side.trainer(folder, callbacks=[stop], **SAVING)
    trainer.train()
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    return outcome(trainer)


@behaviour()
def resume_with_a_function_for_the_model(side, folder):
    """The resume of a training whose model a function makes."""
    _interrupted(side, folder, model_init=lambda: bert())
    trainer = side.trainer(folder, model_init=lambda: bert())
    trainer.train(resume_from_checkpoint=True)
    return outcome(trainer)


@behaviour()
def resume_with_frozen_parameters(side, folder):
    """The resume of a training in which the body is frozen."""

    def frozen():
        model = bert()
        model.bert.requires_grad_(False)
        return model

    _interrupted(side, folder, model=frozen())
    trainer = side.trainer(folder, model=frozen())
    trainer.train(resume_from_checkpoint=True)
    return [outcome(trainer), sum(p.requires_grad for p in trainer.model.parameters())]


@behaviour()
def resume_with_a_found_batch_size(side, folder):
    """A batch size that was found is kept when the training is resumed."""
    _interrupted(side, folder, per_device_train_batch_size=2)
    trainer = side.trainer(folder, auto_find_batch_size=True, per_device_train_batch_size=4)
    trainer.train(resume_from_checkpoint=True)
    return [outcome(trainer), trainer.state.train_batch_size]


@behaviour(cases={"true": True, "path": False})
def resume_of_a_model_alone(side, folder, last):
    """The resume of a checkpoint without optimizer, schedule and random numbers."""
    _interrupted(side, folder, save_only_model=True)
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=last or str(folder / "checkpoint-4"))
    return outcome(trainer)


# From one Trainer to the other


@behaviour(nio=Nio.NOT_RUN, cases={"true": True, "path": False})
def resume_of_what_trainer_saved(side, folder, last):
    """A checkpoint of Trainer itself is gone on from."""
    _interrupted(plain(), folder)
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=last or str(folder / "checkpoint-4"))
    return outcome(trainer)


@behaviour(cases={"true": True, "path": False})
def resume_by_trainer(side, folder, last):
    """Trainer itself goes on from the checkpoint."""
    _interrupted(side, folder)
    trainer = plain().trainer(folder)
    trainer.train(resume_from_checkpoint=last or str(folder / "checkpoint-4"))
    return [weights(trainer), trainer.state.global_step]


@behaviour(nio=Nio.NOT_RUN)
def checkpoints_of_trainer_are_rotated(side, folder):
    """The limit counts the checkpoints that Trainer itself left, too."""
    _interrupted(plain(), folder, step=3, save_steps=1)
    trainer = side.trainer(folder, save_total_limit=2, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return [checkpoints(folder), outcome(trainer)]


@behaviour()
def one_folder_for_two_trainings(side, folder):
    """Two Trainers use one folder, one after the other, and the second writes over the first."""
    first = side.trained(folder, **SAVING, max_steps=4)
    second = side.trained(folder, **SAVING, max_steps=2, learning_rate=1e-3)
    saved = safetensors.torch.load_file(folder / "checkpoint-2" / "model.safetensors")
    return [checkpoints(folder), outcome(first), outcome(second), saved]


@behaviour(nio=Nio.SAME)
def folders_with_other_names(side, folder):
    """Folders whose names are not those of checkpoints are left alone."""
    for name in ("checkpoints", "my-checkpoint-1", "notes"):
        (folder / name).mkdir()
        (folder / name / "kept.txt").write_text("kept")
    side.trained(folder, **SAVING, save_total_limit=1)
    trainer = side.trainer(folder, max_steps=7)
    trainer.train(resume_from_checkpoint=True)
    return [checkpoints(folder), sorted(f for f in files(folder) if f.endswith("kept.txt")), trainer.state.global_step]


# Scripts that change checkpoints


class OnSave(TrainerCallback):
    """Does something to each checkpoint when it has been saved."""

    def __init__(self, action):
        self.action = action

    def on_save(self, args, state, control, **kwargs):
        self.action(Path(args.output_dir) / f"checkpoint-{state.global_step}")


@behaviour()
def callback_deletes_each_checkpoint(side, folder):
    """A callback uploads each checkpoint and deletes it; the training goes on."""
    trainer = side.trained(folder, callbacks=[OnSave(shutil.rmtree)], **SAVING)
    return [checkpoints(folder), outcome(trainer)]


@behaviour()
def callback_moves_each_checkpoint(side, folder):
    """A callback moves each checkpoint elsewhere, from where it is gone on from."""
    archive = folder / "archive"
    archive.mkdir()
    move = OnSave(lambda checkpoint: shutil.move(checkpoint, archive / checkpoint.name))
    run = folder / "run"
    side.trained(run, callbacks=[move, StopAt(4)], **SAVING)
    trainer = side.trainer(run)
    trainer.train(resume_from_checkpoint=str(archive / "checkpoint-4"))
    return [checkpoints(run), checkpoints(archive), outcome(trainer)]


@behaviour()
def callback_deletes_older_checkpoints(side, folder):
    """A callback keeps the newest checkpoint only, from which True goes on."""

    def keep(newest):
        for path in newest.parent.glob("checkpoint-*"):
            if path != newest:
                shutil.rmtree(path)

    side.trained(folder, callbacks=[OnSave(keep), StopAt(4)], **SAVING)
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    return [checkpoints(folder), outcome(trainer)]


def _thin_out(newest):
    for path in newest.parent.glob("checkpoint-*"):
        if path != newest:
            (path / "optimizer.pt").unlink(missing_ok=True)


@behaviour()
def callback_thins_out_older_checkpoints(side, folder):
    """A callback deletes the optimizer of older checkpoints; the best of them is loaded all the same."""
    scores = Scores(0.9, 0.1, 0.2)
    trainer = side.trained(folder, callbacks=[OnSave(_thin_out)], compute_metrics=scores, **BEST)
    return [files(folder), outcome(trainer)]


@behaviour()
def resume_of_a_thinned_out_checkpoint(side, folder):
    """A checkpoint without its optimizer is gone on from by its path."""
    side.trained(folder, callbacks=[OnSave(_thin_out)], **SAVING)
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return outcome(trainer)


@behaviour()
def callback_deletes_the_best_checkpoint(side, folder):
    """The best checkpoint is gone when it should be loaded: the last weights stay."""

    def drop(newest):
        if newest.name == "checkpoint-6":
            shutil.rmtree(newest.parent / "checkpoint-2")

    scores = Scores(0.9, 0.1, 0.2)
    trainer = side.trained(folder, callbacks=[OnSave(drop)], compute_metrics=scores, **BEST)
    return [checkpoints(folder), outcome(trainer)]


@behaviour()
def callback_adds_files(side, folder):
    """A callback puts files of its own into a checkpoint, and edits the state in it."""

    def annotate(checkpoint):
        (checkpoint / "notes.txt").write_text("a file of the user's")
        state = checkpoint / "trainer_state.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"trial_name": "mine"}))

    side.trained(folder, callbacks=[OnSave(annotate), StopAt(4)], **SAVING)
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    return [files(folder), trainer.state.trial_name, outcome(trainer)]


@behaviour()
def weights_of_a_checkpoint_are_edited(side, folder):
    """A checkpoint whose weights were edited on purpose is gone on from by its path."""
    _interrupted(side, folder)
    file = folder / "checkpoint-4" / "model.safetensors"
    edited = {name: tensor * 0.5 for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(edited, file, metadata={"format": "pt"})
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return outcome(trainer)


@behaviour()
def checkpoint_in_shards(side, folder):
    """A checkpoint whose weights were split into several files is gone on from by its path."""
    _interrupted(side, folder)
    checkpoint = folder / "checkpoint-4"
    model = type(bert()).from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="8KB")
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return [len(list(checkpoint.glob("model-*.safetensors"))) > 1, outcome(trainer)]


@behaviour()
def checkpoint_in_the_format_of_torch(side, folder):
    """A checkpoint whose weights were saved by torch is gone on from by its path."""
    _interrupted(side, folder)
    checkpoint = folder / "checkpoint-4"
    torch.save(safetensors.torch.load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    trainer = side.trainer(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return outcome(trainer)


# Subclasses that save in their own way


@behaviour(nio=Nio.SAME)
def subclass_saves_nothing(side, folder):
    """A `_save_checkpoint` that saves nothing leaves no checkpoint that True could choose."""

    class Own(side.Trainer):
        def _save_checkpoint(self, model, trial):
            pass

    side.trained(folder, trainer_class=Own, **SAVING)
    again = side.trainer(folder, trainer_class=Own)
    return [checkpoints(folder), caught(lambda: again.train(resume_from_checkpoint=True), ValueError)]


@behaviour()
def subclass_saves_every_other_time(side, folder):
    """A `_save_checkpoint` that saves every other time, with a file of its own."""

    class Own(side.Trainer):
        def _save_checkpoint(self, model, trial):
            if self.state.global_step % 4 == 0:
                super()._save_checkpoint(model, trial)
                (folder / f"checkpoint-{self.state.global_step}" / "own.txt").write_text("mine")

    side.trained(folder, trainer_class=Own, callbacks=[StopAt(5)], **SAVING)
    trainer = side.trainer(folder, trainer_class=Own)
    trainer.train(resume_from_checkpoint=True)
    return [files(folder), outcome(trainer)]


@behaviour()
def subclass_saves_and_loads_in_its_own_format(side, folder):
    """A `_save` and a `_load_from_checkpoint` that go together."""

    class Own(side.Trainer):
        def _save(self, output_dir=None, state_dict=None):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), Path(output_dir) / "weights.own")

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            self.model.load_state_dict(torch.load(Path(resume_from_checkpoint) / "weights.own"))

    _interrupted(side, folder, trainer_class=Own)
    trainer = side.trainer(folder, trainer_class=Own)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return [files(folder / "checkpoint-4"), outcome(trainer)]


@behaviour()
def subclass_saves_more_with_the_model(side, folder):
    """A `save_model` that writes a file beside the model, in checkpoints, too."""

    class Own(side.Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            (Path(output_dir or self.args.output_dir) / "words.txt").write_text("w0 w1")

    trainer = side.trained(folder, trainer_class=Own, **SAVING)
    trainer.save_model()
    return [files(folder), outcome(trainer)]


# Callbacks with a state


class Counting(TrainerCallback, ExportableState):
    """Counts steps, from one training to its resume."""

    def __init__(self, unit=1):
        self.unit = unit
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += self.unit

    def state(self):
        return {"args": {"unit": self.unit}, "attributes": {"count": self.count}}


@behaviour(nio=Nio.SAME, cases=(True, False))
def state_of_callbacks(side, folder, restored):
    """A callback with a state goes on counting where that is asked for."""
    side.trained(folder, callbacks=[Counting(10), StopAt(4)], **SAVING)
    trainer = side.trainer(folder, callbacks=[Counting(10)], restore_callback_states_from_checkpoint=restored)
    trainer.train(resume_from_checkpoint=True)
    counting = trainer.pop_callback(Counting)
    return [counting.unit, counting.count, trainer.state.stateful_callbacks["Counting"]]


@behaviour(nio=Nio.SAME)
def patience_is_restored(side, folder):
    """Early stopping goes on with the patience that is left."""
    changes = BEST | {"restore_callback_states_from_checkpoint": True, "max_steps": 20}
    first = [EarlyStoppingCallback(early_stopping_patience=4), StopAt(6)]
    side.trained(folder, callbacks=first, compute_metrics=Scores(0.9, 0.1, 0.2), **changes)
    scores = Scores(*[0.1] * 10)
    again = side.trainer(folder, callbacks=[EarlyStoppingCallback()], compute_metrics=scores, **changes)
    again.train(resume_from_checkpoint=True)
    stopping = again.pop_callback(EarlyStoppingCallback)
    state = (stopping.early_stopping_patience, stopping.early_stopping_patience_counter)
    return [again.state.global_step, state, checkpoints(folder)]
