"""How a Trainer evaluates and predicts."""

import torch

from tests.compat.sides import Nio, behaviour, caught
from tests.compat.toys import (
    MODELS,
    Prose,
    Texts,
    accuracy,
    bert,
    checkpoints,
    history,
    name_of,
    outcome,
    t5,
    weights,
    without_clocks,
)

EVALUATED = ("bert", "gpt2", "vit", "resnet", "perceptron")
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3}


def _evaluated(trainer, *args, **kwargs):
    return without_clocks(trainer.evaluate(*args, **kwargs))


@behaviour(nio=Nio.SAME, cases={name: MODELS[name] for name in EVALUATED}, nio_cases=("bert", "resnet"))
def evaluation_without_training(side, folder, case):
    """The metrics of an untrained model, whose weights are left alone."""
    model, data = case
    trainer = side.trainer(folder, model=model(), eval_dataset=data(10), train_dataset=data())
    return [_evaluated(trainer), weights(trainer), history(trainer)]


@behaviour()
def evaluation_after_training(side, folder):
    """The metrics of a trained model, under each prefix, on each data set."""
    trainer = side.trained(folder, compute_metrics=accuracy)
    found = [_evaluated(trainer), _evaluated(trainer, Texts(7)), _evaluated(trainer, metric_key_prefix="test")]
    return [found, history(trainer)]


@behaviour()
def prediction(side, folder):
    """Logits, labels and metrics of a prediction."""
    predicted = side.trained(folder, compute_metrics=accuracy).predict(Texts(10))
    return [predicted.predictions, predicted.label_ids, without_clocks(predicted.metrics)]


class Unlabelled(Texts):
    """Texts whose labels nobody knows."""

    def __getitem__(self, index):
        return {"input_ids": self.input_ids[index]}


@behaviour()
def prediction_without_labels(side, folder):
    """Without labels there are logits, and neither labels nor a loss."""
    predicted = side.trained(folder).predict(Unlabelled(10), metric_key_prefix="own")
    return [predicted.predictions, predicted.label_ids is None, without_clocks(predicted.metrics)]


@behaviour(
    cases={"steps": EVALUATING, "epochs": {"eval_strategy": "epoch", "max_steps": 12}, "no": {}}, nio_cases=("steps",)
)
def evaluation_while_training(side, folder, changes):
    """The metrics of a training that evaluates; the model goes on in training mode."""
    trainer = side.trained(folder, compute_metrics=accuracy, **changes)
    return [outcome(trainer), trainer.model.training]


BEGINNINGS = {
    "on start": {"eval_on_start": True},
    "after a delay": {"eval_delay": 4, "eval_steps": 2},
    "at a share of the steps": {"eval_steps": 0.5},
    "at the end, too": {"eval_steps": 4},
}


@behaviour(cases=BEGINNINGS, nio_cases=("on start",))
def first_evaluation(side, folder, changes):
    """The steps at which a training evaluates."""
    return outcome(side.trained(folder, **EVALUATING | changes))


BATCHES = {
    "accumulated": {"eval_accumulation_steps": 2},
    "the loss only": {"prediction_loss_only": True},
    "not concatenated": {"eval_do_concat_batches": False},
    "in bfloat16": {"bf16_full_eval": True},
    "in larger batches": {"per_device_eval_batch_size": 8},
    "gathered as objects": {"eval_use_gather_object": True},
}


@behaviour(cases=BATCHES, nio_cases=("accumulated", "in bfloat16"))
def batches_of_an_evaluation(side, folder, changes):
    """What the metrics are computed from, for each way to go through the batches."""
    seen = []

    def shapes(prediction):
        parts = prediction.predictions if isinstance(prediction.predictions, list) else [prediction.predictions]
        seen.extend(part.shape for part in parts)
        return {"parts": len(parts)}

    trainer = side.trained(folder, compute_metrics=shapes, **EVALUATING | changes)
    dtype = str(next(trainer.model.parameters()).dtype)
    return [outcome(trainer), [list(shape) for shape in seen], dtype]


class Totals:
    """A metric that adds up batches."""

    def __init__(self):
        self.right = []

    def __call__(self, prediction, compute_result=False):
        self.right.append(prediction.predictions.argmax(-1) == prediction.label_ids)
        if not compute_result:
            return {}
        metrics = {"accuracy": float(torch.cat(self.right).float().mean()), "batches": len(self.right)}
        self.right.clear()
        return metrics


@behaviour()
def metrics_of_batches(side, folder):
    """`batch_eval_metrics` gives the metric one batch after the other."""
    return outcome(side.trained(folder, compute_metrics=Totals(), batch_eval_metrics=True, **EVALUATING))


@behaviour()
def metrics_of_inputs_and_losses(side, folder):
    """`include_for_metrics` gives the metric inputs and losses, too."""
    seen = []

    def look(prediction):
        seen.append([prediction.inputs, list(prediction.losses.shape)])
        return {"mean": float(prediction.losses.mean())}

    trainer = side.trained(folder, compute_metrics=look, include_for_metrics=["inputs", "loss"], **EVALUATING)
    return [seen, outcome(trainer)]


@behaviour()
def logits_are_processed(side, folder):
    """`preprocess_logits_for_metrics` decides what the metric sees and `predict` returns."""

    def classes(logits, labels):
        return logits.argmax(-1) + 0 * labels

    def rate(prediction):
        return {"right": float((prediction.predictions == prediction.label_ids).mean())}

    trainer = side.trained(folder, compute_metrics=rate, preprocess_logits_for_metrics=classes, **EVALUATING)
    return [outcome(trainer), list(trainer.predict(Texts(6)).predictions.shape)]


@behaviour()
def several_data_sets(side, folder):
    """Each of several named data sets is evaluated; one of them decides about the best model."""
    changes = EVALUATING | {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 3}
    changes |= {"metric_for_best_model": "eval_left_score", "greater_is_better": True}
    scores = iter([0.9, 0.1, 0.2, 0.8, 0.0, 0.0])
    sets = {"left": Texts(6), "right": Texts(10)}
    trainer = side.trained(folder, eval_dataset=sets, compute_metrics=lambda _: {"score": next(scores)}, **changes)
    state = trainer.state
    return [outcome(trainer), state.best_metric, name_of(state.best_model_checkpoint), checkpoints(folder)]


@behaviour(nio=Nio.SAME)
def several_data_sets_without_a_choice(side, folder):
    """Where none of several data sets is chosen, the best model is a KeyError."""
    changes = EVALUATING | {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 3}
    trainer = side.trainer(folder, eval_dataset={"left": Texts(6), "right": Texts(10)}, **changes)
    return caught(trainer.train, KeyError)


@behaviour()
def several_data_sets_by_hand(side, folder):
    """`evaluate` takes named data sets, or the name of one."""
    trainer = side.trained(folder, eval_dataset={"left": Texts(6), "right": Texts(10)})
    return [_evaluated(trainer), _evaluated(trainer, {"other": Texts(4)}), _evaluated(trainer, "right")]


@behaviour(nio=Nio.SAME)
def evaluation_without_data(side, folder):
    """An evaluation without data is a ValueError."""
    return caught(side.trainer(folder, eval_dataset=None).evaluate, ValueError)


@behaviour()
def outputs_are_ignored(side, folder):
    """Outputs that `ignore_keys` names do not reach the metric."""
    counts = []

    def count(prediction):
        counts.append(len(prediction.predictions) if isinstance(prediction.predictions, tuple) else 1)
        return {}

    model = bert(output_hidden_states=True)
    trainer = side.trainer(folder, model=model, compute_metrics=count, **EVALUATING)
    trainer.train(ignore_keys_for_eval=["hidden_states"])
    trainer.evaluate()
    trainer.evaluate(ignore_keys=["hidden_states"])
    return [counts, outcome(trainer)]


@behaviour()
def prediction_step_is_overridden(side, folder):
    """A `prediction_step` of the user's is what evaluates."""

    class Own(side.Trainer):  # type: ignore[misc, name-defined]
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return 2 * loss, logits, labels

    return outcome(side.trained(folder, trainer_class=Own, **EVALUATING))


@behaviour()
def evaluate_is_overridden(side, folder):
    """An `evaluate` of the user's adds a metric, which decides about the best model."""

    class Own(side.Trainer):  # type: ignore[misc, name-defined]
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return {**metrics, "eval_own": -self.state.global_step}

    changes = EVALUATING | {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True}
    changes |= {"metric_for_best_model": "own", "greater_is_better": True}
    trainer = side.trained(folder, trainer_class=Own, **changes)
    return [outcome(trainer), trainer.state.best_metric, name_of(trainer.state.best_model_checkpoint)]


@behaviour()
def labels_have_other_names(side, folder):
    """`label_names` says which columns are labels."""
    trainer = side.trained(folder, label_names=["labels", "token_type_ids"], train_dataset=Texts())
    predicted = trainer.predict(Texts(4, token_type_ids=[0, 0, 1, 1, 1, 1]))
    return [list(predicted.label_ids[0].shape), list(predicted.label_ids[1].shape), predicted.predictions]


@behaviour()
def generation(side, folder):
    """A Seq2SeqTrainer that predicts by generating, while training and afterwards."""
    settings = {"predict_with_generate": True, "generation_max_length": 5, **EVALUATING}
    args = side.arguments(folder, side.seq2seq_arguments_class, **settings)
    given = {"model": t5(), "train_dataset": Prose(), "eval_dataset": Prose(6), "trainer_class": side.Seq2SeqTrainer}
    lengths = []

    def measure(prediction):
        lengths.append(prediction.predictions.shape[-1])
        return {"length": float(lengths[-1])}

    trainer = side.trained(folder, args=args, compute_metrics=measure, **given)
    predicted = trainer.predict(Prose(4), max_length=4, num_beams=2)
    return [outcome(trainer), lengths, list(predicted.predictions.shape)]
