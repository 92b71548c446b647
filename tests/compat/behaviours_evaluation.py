"""How a Trainer evaluates and predicts."""

from tests.compat.sides import Nio, behaviour
from tests.compat.toys import (
    MODELS,
    Prose,
    Texts,
    accuracy,
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


@behaviour(
    cases={"steps": EVALUATING, "epochs": {"eval_strategy": "epoch", "max_steps": 12}, "no": {}}, nio_cases=("steps",)
)
def evaluation_while_training(side, folder, changes):
    """The metrics of a training that evaluates; the model goes on in training mode."""
    trainer = side.trained(folder, compute_metrics=accuracy, **changes)
    return [outcome(trainer), trainer.model.training]


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


@behaviour()
def evaluate_is_overridden(side, folder):
    """An `evaluate` of the user's adds a metric, which decides about the best model."""

    class Own(side.Trainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return {**metrics, "eval_own": -self.state.global_step}

    changes = EVALUATING | {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True}
    changes |= {"metric_for_best_model": "own", "greater_is_better": True}
    trainer = side.trained(folder, trainer_class=Own, **changes)
    return [outcome(trainer), trainer.state.best_metric, name_of(trainer.state.best_model_checkpoint)]


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
