"""What cannot work is refused with one of our errors, and the model stays as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf import NIOConfig, grad_cosine, initialize
from nio_hf.errors import ConfigError, DataError, ModelError, NumericsError
from tests import zoo
from tests.core.cases import PER_TENSOR, batches_of, case, differences, state

# One call for the probe, two for each of two held-out batches, then four in each iteration.
PROBE, BEFORE, ITERATION = 1, 4, 4
WEIGHT = "4.weight"


def refused(
    error: type[BaseException],
    message: str,
    *,
    name: str = "mlp",
    loss_fn: Callable[..., Any] | None = None,
    batches: Any = None,
    holdout: Any = None,
    **settings: Any,
) -> Any:
    """Start a run that must fail, and check that it changed nothing."""
    made = case(name)
    made.loss_fn(made.model, made.batch)
    before, generator = state(made.model), torch.get_rng_state()

    def start() -> None:
        config = NIOConfig(
            **{
                **PER_TENSOR,
                "iterations": 5,
                "holdout_batches": 2,
                "sub_batches": 2,
                "curvature": "exact",
                **settings,
            }
        )
        data = batches_of(name, 4) if batches is None else batches
        initialize(made.model, data, loss_fn or made.loss_fn, config, holdout=holdout)

    with pytest.raises(error, match=message) as caught:
        start()
    assert not differences(before, state(made.model))
    assert torch.equal(generator, torch.get_rng_state())
    return caught.value


def after_calls(calls: int, then: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The usual loss, changed from one call on."""
    seen: list[None] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(None)
        loss = zoo.vector_loss(model, batch)
        return then(model, loss) if len(seen) > calls else loss

    return loss_fn


def times(value: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, loss: loss * value


def zero_of(model: nn.Module) -> Tensor:
    return (dict(model.named_parameters())[WEIGHT] * 0).sum()


def infinite_slope(model: nn.Module, loss: Tensor) -> Tensor:
    return loss + zero_of(model).sqrt()


def infinite_curvature(model: nn.Module, loss: Tensor) -> Tensor:
    return loss + zero_of(model).abs().pow(1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sub_batches": 9}, r"sub_batches: 9 for a batch of 8 samples\. Choose 2 to 8"),
        ({"sub_batches": 1}, r"NIOConfig\.sub_batches: 1"),
        ({"overlap": 1.0}, r"NIOConfig\.overlap: 1\.0"),
        ({"overlap": -0.1}, r"NIOConfig\.overlap: -0\.1"),
        ({"iterations": 0}, r"NIOConfig\.iterations: 0"),
        ({"gamma": 0.0, "gamma_relative": None}, r"NIOConfig\.gamma: 0\.0"),
        ({"gamma_relative": -2.0}, r"NIOConfig\.gamma_relative: -2\.0"),
        ({"name": "resnet", "sub_batches": 8}, "one sample per sub-batch under batch normalisation"),
        ({"name": "resnet", "micro_batch_size": 2}, 'micro_batch_size: given .* Set batch_norm="frozen"'),
    ],
)
def test_settings_that_cannot_work(settings: Any, message: str) -> None:
    refused(ConfigError, message, **settings)


@pytest.mark.parametrize("sub_batches", [0, 1, 9])
def test_measurements_that_cannot_be_made(sub_batches: int) -> None:
    made = case("mlp")
    with pytest.raises(ConfigError, match=rf"sub_batches: {sub_batches}"):
        grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=sub_batches)
    with pytest.raises(ConfigError, match=r"sub_batches: 1 for a batch of 1 samples\. Give batches of at least 2"):
        grad_cosine(made.model, (made.batch[0][:1], made.batch[1][:1]), made.loss_fn)


def test_batch_normalisation_of_single_samples() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    batches = batches_of("mlp", 3)
    before = state(model)
    with pytest.raises(ConfigError, match=r'one sample per sub-batch.* Set batch_norm="frozen"'):
        initialize(model, batches, zoo.vector_loss, NIOConfig(iterations=1, holdout_batches=1, sub_batches=8))
    with pytest.raises(ConfigError, match="one sample per sub-batch"):
        grad_cosine(model, batches[0], zoo.vector_loss)
    assert not differences(before, state(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_iteration_and_sub_batch(value: float) -> None:
    # The second sub-batch of the third iteration.
    loss_fn = after_calls(PROBE + BEFORE + 2 * ITERATION + 1, times(value))
    refused(NumericsError, f"NIO iteration 3, sub-batch 1: the loss is {value}", loss_fn=loss_fn)


def test_a_loss_that_is_not_finite_from_the_start() -> None:
    message = "held-out batch 0 before NIO, sub-batch 0: the loss is nan"
    refused(NumericsError, message, loss_fn=after_calls(0, times(float("nan"))))


def test_a_gradient_that_is_not_finite_names_the_tensor() -> None:
    loss_fn = after_calls(PROBE + BEFORE + ITERATION, infinite_slope)
    message = rf"NIO iteration 2, sub-batch 0: the gradient of {WEIGHT} is not finite"
    refused(NumericsError, message, loss_fn=loss_fn)


@pytest.mark.parametrize("iterations", [2, 5])
def test_a_scale_gradient_that_is_not_finite_names_the_tensor(iterations: int) -> None:
    loss_fn = after_calls(PROBE + BEFORE + ITERATION, infinite_curvature)
    message = rf"NIO iteration 2: the scale gradient of {WEIGHT} is not finite"
    refused(NumericsError, message, loss_fn=loss_fn, iterations=iterations)


def test_gradients_that_are_zero() -> None:
    message = "held-out batch 0 before NIO: the gradients of all sub-batches are zero"
    refused(NumericsError, message, loss_fn=lambda model, batch: 0 * zoo.vector_loss(model, batch))
    one_of_two = after_calls(PROBE + BEFORE + 1, lambda model, loss: 0 * loss)
    refused(NumericsError, "NIO iteration 1, sub-batch 1: the gradient is zero", loss_fn=one_of_two)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: zoo.vector_loss(model, batch).detach(), "the loss does not depend on the parameters"),
        (lambda model, batch: torch.tensor(1.0), "the loss does not depend on the parameters"),
        (lambda model, batch: torch.tensor(1.0, requires_grad=True), r"no tensor can be scaled \(1 zero, 7 unused\)"),
        (lambda model, batch: model(batch[0]), r"returned a tensor of shape \(4, 5\) as the loss\. Return a scalar"),
        (lambda model, batch: zoo.vector_loss(model, batch).item(), "returned a float as the loss"),
        (lambda model, batch: (zoo.vector_loss(model, batch), 1, 2), "returned a tuple as the loss"),
    ],
)
def test_losses_that_give_no_gradient(loss_fn: Any, message: str) -> None:
    refused(ModelError, message, loss_fn=loss_fn)


def test_labels_and_tokens_out_of_range() -> None:
    inputs, labels = case("mlp").batch
    wrong = (inputs, torch.full_like(labels, 77))
    refused(DataError, r"the first sub-batch: an index is out of range .*labels lie between", batches=[wrong] * 3)
    later = [*batches_of("mlp", 3), wrong]
    refused(DataError, "NIO iteration 2, sub-batch 0: an index is out of range", batches=later)
    tokens = case("gpt2").batch
    wrong_tokens = {**tokens, "input_ids": tokens["input_ids"] + zoo.VOCABULARY}
    refused(DataError, "tokens in the vocabulary", name="gpt2", batches=[wrong_tokens] * 3)


@pytest.mark.parametrize("batches", [[], iter([])])
def test_no_data(batches: Any) -> None:
    refused(DataError, "batches: 0 batches, of which 2 are to be held out", batches=batches)


def test_too_little_data() -> None:
    refused(DataError, "no batch beyond the 2 held out", batches=batches_of("mlp", 2))
    refused(DataError, "holdout: a list without a batch", holdout=[])
    refused(ConfigError, "sub_batches: 4 for a batch of 3 samples", holdout=[zoo.vectors(3)], sub_batches=4)


def test_samples_of_different_number() -> None:
    refused(DataError, r"tensors of different length: batch\[0\] 8, batch\[1\] 7", batches=[_uneven()] * 3)


def test_micro_batches_of_a_loss_that_is_no_mean_over_samples() -> None:
    def mean_over_tokens(model: nn.Module, batch: Any) -> Tensor:
        loss, weight = zoo.text_loss(model, batch)
        return loss / weight

    message = r"loss_fn \(.*mean_over_tokens\): the mean loss .* Return \(loss_sum, weight\)"
    refused(ConfigError, message, name="gpt2", loss_fn=mean_over_tokens, micro_batch_size=2)


def test_operations_without_a_second_derivative_are_pointed_to_finite_differences() -> None:
    lengths = torch.full((4,), 3), torch.full((4,), 1)

    def ctc(model: nn.Module, batch: Any) -> Tensor:
        scores = model(batch[0]).log_softmax(dim=-1).expand(3, -1, -1)
        return nn.functional.ctc_loss(scores, batch[1][:, None].clamp(min=1), *lengths)

    refused(ModelError, 'no second derivative .*Set curvature="finite_difference"', loss_fn=ctc)
    made = case("mlp")
    config = NIOConfig(iterations=1, holdout_batches=1, sub_batches=2, curvature="finite_difference")
    assert initialize(made.model, batches_of("mlp", 2), ctc, config).history


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": None}, DataError, "batches: a NoneType"),
        ({"config": {"lr": 1}}, ConfigError, "config: a dict. Give an NIOConfig"),
        ({"holdout": 3}, DataError, "holdout: a int. Give a list"),
        ({"model": zoo.vector_loss}, ModelError, "model: a function. Give a torch.nn.Module"),
    ],
)
def test_arguments_of_another_type(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": zoo.mlp(), "batches": batches_of("mlp", 6), "loss_fn": zoo.vector_loss, **arguments}
    with pytest.raises(error, match=message):
        initialize(**given)


def test_tensors_that_cannot_be_scaled_apart() -> None:
    mixed, shared = zoo.mlp(), zoo.mlp()
    mixed[-1].double()
    shared[1].bias.data = shared[4].bias.data
    for model, message in [(mixed, "6.weight: dtype torch.float64 beside"), (shared, "4.bias: another parameter in")]:
        with pytest.raises(ModelError, match=message):
            initialize(model, batches_of("mlp", 6), zoo.vector_loss)


@pytest.mark.parametrize("model", ["frozen", "half", "zero", "meta"])
def test_models_that_cannot_be_initialised(model: str) -> None:
    made = case("vit").model
    if model == "zero":
        torch._foreach_zero_([parameter.data for parameter in made.parameters()])
    broken = {"frozen": lambda: made.requires_grad_(False), "half": made.half, "meta": lambda: made.to("meta")}
    made = broken.get(model, lambda: made)()
    message = {"frozen": "no parameter requires", "half": "float16", "zero": "40 zero", "meta": "on the meta device"}
    flags = {name: module.training for name, module in made.named_modules()}
    with pytest.raises(ModelError, match=message[model]):
        initialize(made, batches_of("vit", 3), zoo.image_loss, NIOConfig(iterations=1, holdout_batches=1))
    assert {name: module.training for name, module in made.named_modules()} == flags


@pytest.mark.parametrize("curvature", ["exact", "exact_kept", "finite_difference", "finite_difference_kept"])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize("calls", [0, 3, PROBE + BEFORE + 1, PROBE + BEFORE + 11, PROBE + BEFORE + 14])
def test_an_interrupt_leaves_the_model_as_it_was(calls: int, name: str, curvature: str) -> None:
    seen: list[None] = []
    made = case(name)

    def interrupted(model: nn.Module, batch: Any) -> Any:
        seen.append(None)
        if len(seen) > calls:
            raise KeyboardInterrupt("stop")
        return made.loss_fn(model, batch)

    refused(KeyboardInterrupt, "stop", name=name, loss_fn=interrupted, curvature=curvature, lr=0.1, iterations=9)


def test_an_error_of_the_loss_says_where_it_was_raised() -> None:
    def broken(model: nn.Module, loss: Tensor) -> Tensor:
        raise TypeError("mine")

    error = refused(TypeError, "mine", loss_fn=after_calls(PROBE + BEFORE + 5, broken))
    assert error.__notes__ == ["raised at NIO iteration 2, sub-batch 1"]


def _uneven() -> tuple[Tensor, Tensor]:
    inputs, labels = zoo.vectors(8)
    return inputs, labels[:7]
