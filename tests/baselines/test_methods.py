"""What all methods have in common: what they change, what they leave alone, what they report."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nio_hf.baselines import METHODS, options_of
from nio_hf.core import InitResult, NIOConfig, grad_cosine
from nio_hf.core.scales import LayerScales
from nio_hf.errors import ConfigError
from tests.core.cases import Case, batches_of, case, differences, state

SHORT: dict[str, Any] = {"iterations": 2, "holdout_batches": 2, "sub_batches": 2, "lr": 0.05}
LEARNED = ["gradinit", "metainit"]
CHANGING = [name for name in METHODS if name != "none"]


def run(method: str, made: Case, name: str = "mlp", loss_fn: Any = None, **options: Any) -> InitResult:
    return METHODS[method](made.model, batches_of(name, 4), loss_fn or made.loss_fn, NIOConfig(**SHORT), **options)


@pytest.mark.parametrize("name", ["mlp", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_changes_scaled_tensors_and_nothing_else(method: str, name: str) -> None:
    made = case(name)
    next(iter(made.model.children())).eval()
    made.loss_fn(made.model, made.batch)
    before, generators = state(made.model), (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    result = run(method, made, name)

    changed = differences(before, state(made.model))
    assert set(changed) <= {f"{parameter}: value" for parameter in result.scales}
    assert bool(changed) == (method != "none")
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == generators
    for parameter, omega in result.scales.items():
        value = made.model.get_parameter(parameter)
        expected = value.norm() / before[f"{parameter}: value"].norm()
        assert omega == pytest.approx(expected.item(), rel=1e-5), parameter
    for batch, part in zip(batches_of(name, 2), result.after.parts, strict=True):
        again = grad_cosine(made.model, batch, made.loss_fn, sub_batches=2)
        assert (again.value, again.norms, again.loss) == (part.value, part.norms, part.loss)
    assert (result.method, result.status) == (method, "applied")
    assert result.options.keys() == options_of(method).keys()
    assert len(result.history) == (2 if method in LEARNED else 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_the_same_again(method: str) -> None:
    first, second = case("mlp"), case("mlp")
    run(method, first)
    torch.manual_seed(7)
    run(method, second)
    assert not differences(
        {name: value for name, value in state(first.model).items() if name.endswith("value")},
        {name: value for name, value in state(second.model).items() if name.endswith("value")},
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_result_survives_json(method: str) -> None:
    result = run(method, case("mlp"))
    loaded = InitResult.from_dict(json.loads(json.dumps(result.to_dict())))
    for field in dataclasses.fields(InitResult):
        if field.name not in ("tensors", "excluded"):
            assert getattr(loaded, field.name) == getattr(result, field.name), field.name
    assert list(loaded.scales.values()) == list(result.scales.values())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_the_middle_leaves_the_model_as_it_was(method: str, error: type[BaseException]) -> None:
    calls = _loss_calls(method)
    # The probe, two sub-batches of two held-out batches, what the method does, and the held-out batches again.
    for last in {1 + 4 + 1, (calls + 2) // 2, calls - 4, calls}:
        made = case("mlp")
        before, generator = state(made.model), torch.get_rng_state()
        with pytest.raises(error, match="stop here"):
            run(method, made, loss_fn=_stopping(made, last, error))
        assert not differences(before, state(made.model)), last
        assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("method", LEARNED)
def test_iterations_are_reported_as_they_happen(method: str) -> None:
    seen: list[Any] = []
    result = run(method, case("mlp"), on_iteration=seen.append)
    assert tuple(seen) == result.history
    assert [record.iteration for record in seen] == [1, 2]
    assert all(record.grad_cosine is None and record.grad_norm > 0 and record.seconds > 0 for record in seen)


@pytest.mark.parametrize("method", LEARNED)
def test_what_was_learned_before_the_data_ended_is_applied(method: str) -> None:
    made = case("mlp")
    result = METHODS[method](made.model, iter(batches_of("mlp", 3)), made.loss_fn, NIOConfig(**SHORT))
    assert len(result.history) == 1
    assert any(omega != 1 for omega in result.scales.values())


@pytest.mark.parametrize("method", CHANGING)
def test_frozen_tensors_keep_their_values(method: str) -> None:
    made = case("mlp")
    frozen = made.model.get_parameter("4.weight").requires_grad_(False)
    before = frozen.clone()
    result = run(method, made)
    assert torch.equal(frozen, before)
    assert "4.weight" not in result.scales


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
def test_batch_normalisation_keeps_its_statistics(method: str, batch_norm: Any) -> None:
    made = case("resnet")
    before = state(made.model)
    config = NIOConfig(**SHORT, batch_norm=batch_norm)
    result = METHODS[method](made.model, batches_of("resnet", 4), made.loss_fn, config)
    changed = differences(before, state(made.model))
    assert changed
    assert set(changed) <= {f"{parameter}: value" for parameter in result.scales}


@pytest.mark.parametrize("method", CHANGING)
def test_activation_checkpointing_changes_nothing(method: str) -> None:
    plain, checkpointed = case("vit"), case("vit")
    checkpointed.model.activation_checkpointing_enable()
    before = state(checkpointed.model)
    first, second = run(method, plain, "vit"), run(method, checkpointed, "vit")
    assert second.scales == pytest.approx(first.scales, abs=1e-5)
    assert all(key.endswith("value") for key in differences(before, state(checkpointed.model)))


def test_options_are_those_of_the_signature() -> None:
    assert options_of("none") == {}
    assert options_of("gradinit") == {"optimizer": "adam", "step_size": None}
    assert options_of("lsuv") == {"orthonormal": True, "tolerance": 0.1, "max_trials": 10}
    with pytest.raises(ConfigError, match=r"method: 'nio'\. Choose one of none, gradinit, metainit"):
        options_of("nio")


@pytest.mark.parametrize(
    ("method", "options", "messages"),
    [
        (
            "gradinit",
            {"optimizer": "lion", "step_size": 0.0},
            ["gradinit.optimizer: 'lion'", "gradinit.step_size: 0.0"],
        ),
        ("metainit", {"momentum": 1.0, "epsilon": -1.0}, ["metainit.momentum: 1.0", "metainit.epsilon: -1.0"]),
        (
            "lsuv",
            {"orthonormal": 1, "tolerance": 0, "max_trials": 0},
            ["lsuv.orthonormal: 1", "lsuv.tolerance: 0", "lsuv.max_trials: 0"],
        ),
        ("emergence", {"alpha": 0}, ["emergence.alpha: 0"]),
        ("architecture_aware", {"gain": float("nan")}, ["architecture_aware.gain: nan"]),
    ],
)
def test_all_options_out_of_range_are_named(method: str, options: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(method, case("mlp"), **options)
    assert len(caught.value.problems) == len(messages)
    assert all(message in str(caught.value) for message in messages)


@pytest.mark.parametrize("method", METHODS)
def test_before_is_what_the_model_measures_as_it_comes(method: str) -> None:
    made = case("mlp")
    excluded = LayerScales(made.model).excluded
    result = run(method, made)
    assert list(result.excluded) == excluded
    assert result.before.value == pytest.approx(
        np.mean([grad_cosine(case("mlp").model, b, made.loss_fn, sub_batches=2).value for b in batches_of("mlp", 2)])
    )


def _stopping(made: Case, last: int, error: type[BaseException]) -> Any:
    """The loss, which fails at one of its calls."""
    seen: list[None] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(None)
        if len(seen) == last:
            raise error("stop here")
        return made.loss_fn(model, batch)

    return loss_fn


def _loss_calls(method: str) -> int:
    made, seen = case("mlp"), []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(None)
        return made.loss_fn(model, batch)

    run(method, made, loss_fn=loss_fn)
    return len(seen)


@pytest.mark.parametrize("method", CHANGING)
def test_bfloat16_measures_the_new_weights(method: str) -> None:
    made, batches, config = case("vit"), batches_of("vit", 4), NIOConfig(**SHORT, precision="bf16")
    result = METHODS[method](made.model, batches, made.loss_fn, config)
    again = METHODS["none"](made.model, batches, made.loss_fn, config)
    assert result.after != result.before
    assert again.before == result.after


@pytest.mark.parametrize("method", ["gradinit", "metainit"])
def test_data_that_end_before_the_iterations_are_told(method: str) -> None:
    made = case("mlp")
    config = NIOConfig(**{**SHORT, "iterations": 9})
    result = METHODS[method](made.model, iter(batches_of("mlp", 4)), made.loss_fn, config)
    assert result.status == "applied"
    assert result.message.endswith("The data ended after 2 of 9 iterations.")
