"""What cannot work is refused with one of our errors, and the model stays as it was, bit for bit."""

import itertools

import pytest
import torch
from torch import nn

from nio_hf import NIOConfig, grad_cosine, initialize
from nio_hf.errors import ConfigError, DataError, ModelError, NumericsError
from tests import zoo
from tests.core.cases import SEARCHES, batches_of, case, unchanged

WEIGHT = "4.weight"


def refused(error, message, *, name="mlp", search="exact", loss_fn=None, batches=None, others=None, **settings):
    """Start a run that must fail, and check that it changed nothing."""
    made = case(name)
    made.loss_fn(made.model, made.batch)
    generator = torch.get_rng_state()
    config = NIOConfig(**{"report_batches": 2, "sub_batches": 2, **SEARCHES[search], **settings})
    data = batches_of(name, 4) if batches is None else batches
    with unchanged(made.model), pytest.raises(error, match=message) as caught:
        initialize(made.model, data, loss_fn or made.loss_fn, config, **(others or {}))
    assert torch.equal(generator, torch.get_rng_state())
    return caught.value


class Later:
    """The usual loss, changed in one trial from one call on; trials and calls are counted from 1."""

    def __init__(self, trial, call, then):
        self.trial, self.call, self.then = trial, call, then
        self.trials = self.calls = 0

    def on_trial(self, told):
        self.trials += 1
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        loss = zoo.vector_loss(model, batch)
        return self.then(model, loss) if (self.trials, self.calls) >= (self.trial, self.call) else loss

    def refused(self, error, message, **settings):
        return refused(error, message, loss_fn=self, others={"on_trial": self.on_trial}, **settings)


def times(value):
    return lambda model, loss: loss * value


def zero_of(model):
    return (dict(model.named_parameters())[WEIGHT] * 0).sum()


def infinite_slope(model, loss):
    return loss + zero_of(model).sqrt()


def infinite_curvature(model, loss):
    return loss + zero_of(model).abs().pow(1.5)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sub_batches": 9}, r"NIOConfig\.sub_batches: 9 for a batch of 8 samples\. Choose 2 to 8"),
        ({"groups": {"decoder": "decoder"}}, r'NIOConfig\.groups\["decoder"\]: .* matches no parameter'),
        ({"groups": {"a": "weight", "b": "4"}}, r'groups\["b"\]: claims 4\.weight.*, as the group "a" does'),
        ({"name": "resnet", "sub_batches": 8}, r"sub_batches: one sample .* batch normalisation\. Choose fewer"),
        ({"name": "resnet", "sub_batches": 5}, "one sample for a sub-batch under batch normalisation"),
        ({"name": "resnet", "micro_batch_size": 2}, r"micro_batch_size: given .*\. Leave it out"),
    ],
)
def test_settings_that_cannot_work(search, settings, message):
    refused(ConfigError, message, search=search, **settings)


@pytest.mark.parametrize("sub_batches", [0, 1, 9])
def test_measurements_that_cannot_be_made(sub_batches):
    made = case("mlp")
    with pytest.raises(ConfigError, match=rf"sub_batches: {sub_batches}"):
        grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=sub_batches)
    with pytest.raises(ConfigError, match=r"sub_batches: 1 for a batch of 1 samples\. Give batches of at least 2"):
        grad_cosine(made.model, (made.batch[0][:1], made.batch[1][:1]), made.loss_fn)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_names_iteration_and_sub_batch(value):
    Later(3, 2, times(value)).refused(NumericsError, f"iteration 3, sub-batch 1: the loss is {value}")


def test_a_gradient_that_is_not_finite_names_the_tensor():
    message = rf"iteration 2, sub-batch 0: the gradient of {WEIGHT} is not finite\. Check inputs"
    Later(2, 1, infinite_slope).refused(NumericsError, message)


@pytest.mark.parametrize("iterations", [2, 5])
def test_a_scale_gradient_that_is_not_finite_names_the_tensor(iterations):
    message = rf"iteration 2: the scale gradient of {WEIGHT} is not finite"
    Later(2, 1, infinite_curvature).refused(NumericsError, message, iterations=iterations)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "the loss is nan"), (0.0, "the gradients of all sub-batches are zero")]
)
def test_a_start_that_cannot_be_measured_is_refused(search, micro_batch_size, value, message):
    """No bound can be relative to a loss that is not finite, no agreement be that of gradients of zero."""

    def loss_fn(model, batch):
        return value * zoo.vector_loss(model, batch)

    settings = {"search": search, "micro_batch_size": micro_batch_size}
    refused(NumericsError, f"report batch 0.*: {message}", loss_fn=loss_fn, **settings)


@pytest.mark.parametrize("broken", [times(float("nan")), times(float("inf")), times(0.0), infinite_slope])
def test_larger_weights_that_cannot_be_measured_break_the_bound(broken):
    made = case("mlp")
    start = float(made.model.get_parameter(WEIGHT).detach().norm())

    def loss_fn(model, batch):
        loss = zoo.vector_loss(model, batch)
        return broken(model, loss) if float(model.get_parameter(WEIGHT).detach().norm()) > 1.01 * start else loss

    config = NIOConfig(report_batches=2, sub_batches=2, loss_bound=None, least_norm=None)
    with unchanged(made.model):
        result = initialize(made.model, batches_of("mlp", 2), loss_fn, config)
    assert {record.outcome for record in result.history} == {"loss_bound"}


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: zoo.vector_loss(model, batch).detach(), "the loss does not depend on the parameters"),
        (lambda model, batch: torch.tensor(1.0), "the loss does not depend on the parameters"),
        (lambda model, batch: torch.tensor(1.0, requires_grad=True), r"no tensor can be scaled \(8 unused\)"),
        (lambda model, batch: model(batch[0]), r"returned a tensor of shape \(\d, 5\) as the loss\. Return a scalar"),
        (lambda model, batch: zoo.vector_loss(model, batch).item(), "returned a float as the loss"),
        (lambda model, batch: (zoo.vector_loss(model, batch).item(), 1), "returned a float as the loss"),
        (lambda model, batch: (zoo.vector_loss(model, batch), 1, 2), "returned a tuple as the loss"),
    ],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_losses_that_give_no_gradient(loss_fn, message):
    refused(ModelError, message, loss_fn=loss_fn)


def test_labels_and_tokens_out_of_range():
    inputs, labels = case("mlp").batch
    wrong = (inputs, labels + 77)
    refused(DataError, r"the first sub-batch: an index is out of range .*labels lie between", batches=[wrong] * 4)
    later = [*batches_of("mlp", 3), wrong]
    refused(DataError, "iteration 2, sub-batch 0: an index is out of range", batches=later)
    refused(DataError, "report batch 1, sub-batch 0: an index is out of range", batches=later[2:], search="balance")
    tokens = case("gpt2").batch
    wrong_tokens = {**tokens, "input_ids": tokens["input_ids"] + zoo.VOCABULARY}
    refused(DataError, "tokens in the vocabulary", name="gpt2", batches=[wrong_tokens] * 4)


@pytest.mark.parametrize("kind", [list, iter])
def test_too_little_data(kind):
    report = {"report": batches_of("mlp", 1)}
    refused(DataError, "batches: no batch", batches=kind([]), others=report)
    refused(DataError, "batches: 0 batches, of which 2 are to be reported on", batches=kind([]))
    refused(DataError, "1 batches, of which 2 are to be", batches=kind(batches_of("mlp", 1)), search="balance")
    refused(DataError, "no batch beyond the 2 of the report", batches=kind(batches_of("mlp", 2)))


def test_report_batches_that_are_none_or_too_small():
    refused(DataError, "report: a list without a batch", others={"report": []})
    small = {"report": [zoo.vectors(3)]}
    refused(ConfigError, "sub_batches: 4 for a batch of 3 samples", others=small, sub_batches=4)


def test_samples_of_different_number():
    inputs, labels = zoo.vectors(8)
    refused(DataError, r"tensors of different length: batch\[0\] 8, batch\[1\] 7", batches=[(inputs, labels[:7])] * 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": None}, DataError, r"batches: a NoneType\. Give a DataLoader"),
        ({"config": {"lr": 1}}, ConfigError, "config: a dict. Give an NIOConfig"),
        ({"report": 3}, DataError, "report: a int. Give a list"),
        ({"model": zoo.vector_loss}, ModelError, "model: a function. Give a torch.nn.Module"),
        ({"options": {"rate": 1}}, ConfigError, "nio.rate: is no option of nio"),
    ],
)
def test_arguments_of_another_type(arguments, error, message):
    given = {"model": zoo.mlp(), "batches": batches_of("mlp", 8), "loss_fn": zoo.vector_loss, **arguments}
    with pytest.raises(error, match=message):
        initialize(**given)


def test_tensors_that_cannot_be_scaled_apart():
    mixed, shared = zoo.mlp(), zoo.mlp()
    mixed[-1].double()
    shared[1].bias.data = shared[4].bias.data
    for model, message in [(mixed, "6.weight: dtype torch.float64 beside"), (shared, "4.bias: another parameter in")]:
        with pytest.raises(ModelError, match=message):
            initialize(model, batches_of("mlp", 8), zoo.vector_loss)


def zeroed(model):
    torch._foreach_zero_([parameter.data for parameter in model.parameters()])
    return model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda model: model.to("meta"), r"vit\.embeddings\.cls_token: on the meta device.*\n.* such tensors"),
        (nn.Module.half, r"cls_token: dtype torch\.float16\. Load the model with dtype=torch\.float32"),
        (nn.Module.bfloat16, r"dtype torch\.bfloat16"),
        (lambda model: model.requires_grad_(False), "ViTForImageClass.*: no parameter requires a gradient. Unfreeze"),
        (zeroed, r"ViTForImageClassification: no tensor can be scaled \(40 zero\)"),
    ],
)
def test_models_that_cannot_be_initialised(broken, message):
    model = broken(case("vit").model)
    flags = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=message):
        initialize(model, batches_of("vit", 3), zoo.image_loss, NIOConfig(report_batches=1))
    assert {name: module.training for name, module in model.named_modules()} == flags


# Scales of the ViT are computed by a look at the gradients, four calls before, four to balance, and four after.
INTERRUPTED = [("vit", "balance", calls) for calls in (0, 3, 6, 8, 12)] + [
    (name, search, calls)
    for name, search in (("mlp", "exact"), ("mlp", "finite differences"), ("resnet", "exact"))
    for calls in (0, 3, 6, 9, 15, 20)
]


@pytest.mark.parametrize(("name", "search", "calls"), INTERRUPTED)
def test_an_interrupt_leaves_the_model_as_it_was(name, search, calls):
    made, count = case(name), itertools.count()

    def interrupted(model, batch):
        if next(count) == calls:
            raise KeyboardInterrupt("stop")
        return made.loss_fn(model, batch)

    refused(KeyboardInterrupt, "stop", name=name, search=search, loss_fn=interrupted)


@pytest.mark.parametrize("error", [ValueError("Target is out of bounds"), RuntimeError("mine"), KeyError("labels")])
def test_an_error_of_the_loss_stays_as_it_is_and_says_where_it_was_raised(error):
    def broken(model, loss):
        raise error

    assert Later(2, 2, broken).refused(type(error), str(error)) is error
    assert error.__notes__ == ["raised at iteration 2, sub-batch 1"]


def test_an_error_of_who_watches_leaves_the_model_as_it_was():
    def broken(record):
        raise RuntimeError("the screen is gone")

    refused(RuntimeError, "the screen is gone", others={"on_iteration": broken})
