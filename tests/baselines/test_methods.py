"""What all methods have in common: what they change, what they leave alone, what they report."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from nio_hf.baselines import METHODS
from nio_hf.core import Collective, InitResult, NIOConfig, expected_cost, find_tensors, grad_cosine, initialize
from nio_hf.errors import ConfigError
from tests.core.cases import batches_of, case, differences, state
from tests.distributed.ranks import run_ranks
from tests.versions import checkpoint_activations

CONFIG = NIOConfig(report_batches=2, sub_batches=2)
LEARNED = "gradinit"
"""The method that has iterations."""
OF_TRANSFORMERS = ("range", "mimetic", "structured")
"""Methods that refuse a plain network."""
CHANGING = [name for name in METHODS if name != "none"]
ANYWHERE = [name for name in CHANGING if name not in OF_TRANSFORMERS]


def home(method):
    """A small model that a method is defined for."""
    return "vit" if method in OF_TRANSFORMERS else "mlp"


def run(method, made, name=None, batches=None, config=CONFIG, on_iteration=None, **options):
    short = {"iterations": 2, "lr": 0.05} if method == LEARNED else {}
    return initialize(
        made.model,
        batches or batches_of(name or home(method), 4),
        made.loss_fn,
        config,
        method=METHODS[method],
        options={**short, **options},
        on_iteration=on_iteration,
    )


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, "vit") for method in METHODS]
    + [(method, name) for method in ("none", *ANYWHERE) for name in ("mlp", "resnet")],
)
def test_every_method_changes_scaled_tensors_and_nothing_else(method, name):
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
    untouched = case(name).model
    assert result.excluded == find_tensors(untouched).excluded
    for model, measured in ((untouched, result.before), (made.model, result.after)):
        for batch, part in zip(batches_of(name, 2), measured.parts, strict=True):
            again = grad_cosine(model, batch, made.loss_fn, sub_batches=2)
            assert (again.value, again.norms, again.loss) == (part.value, part.norms, part.loss)
    assert (result.method, result.status) == (method, "applied")
    assert result.options.keys() == METHODS[method].options.keys()
    assert (result.title, result.description) == (METHODS[method].title, METHODS[method].describe(result.config))
    assert len(result.history) == (2 if method == LEARNED else 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_the_same_again(method):
    first, second = case(home(method)), case(home(method))
    run(method, first)
    torch.manual_seed(7)
    run(method, second)
    assert all(torch.equal(*pair) for pair in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_result_survives_json(method):
    result = run(method, case(home(method)))
    loaded = InitResult.from_dict(json.loads(json.dumps(result.to_dict())))
    for field in dataclasses.fields(InitResult):
        if field.name not in ("groups", "tensors", "excluded"):
            assert getattr(loaded, field.name) == getattr(result, field.name), field.name
    names = [f"tensor {index}" for index in range(len(result.groups))]
    renamed = zip(result.groups, names, strict=True)
    assert loaded.groups == tuple(dataclasses.replace(group, name=name) for group, name in renamed)
    assert list(loaded.scales.values()) == list(result.scales.values())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_the_middle_leaves_the_model_as_it_was(method, error):
    def failing(made, at, calls):
        def loss_fn(model, batch):
            calls.append(None)
            if len(calls) == at:
                raise error("stop here")
            return made.loss_fn(model, batch)

        return dataclasses.replace(made, loss_fn=loss_fn)

    all_calls = []
    run(method, failing(case(home(method)), None, all_calls))
    count = len(all_calls)
    # The probe, two sub-batches of two report batches, what the method does, and the report batches again.
    for last in {1 + 4 + 1, (count + 2) // 2, count - 4, count}:
        made = case(home(method))
        before, generator = state(made.model), torch.get_rng_state()
        with pytest.raises(error, match="stop here"):
            run(method, failing(made, last, []))
        assert not differences(before, state(made.model)), last
        assert torch.equal(generator, torch.get_rng_state())


def test_iterations_are_reported_as_they_happen():
    seen = []
    result = run(LEARNED, case("mlp"), on_iteration=seen.append)
    assert tuple(seen) == result.history
    assert [record.iteration for record in seen] == [1, 2]
    assert all(record.grad_cosine is None and record.grad_norm > 0 and record.seconds > 0 for record in seen)


@pytest.mark.parametrize("method", ANYWHERE)
def test_frozen_tensors_keep_their_values(method):
    made = case("mlp")
    frozen = made.model.get_parameter("4.weight").requires_grad_(False)
    before = frozen.clone()
    result = run(method, made)
    assert torch.equal(frozen, before)
    assert "4.weight" not in result.scales


@pytest.mark.parametrize("method", CHANGING)
def test_activation_checkpointing_changes_nothing(method):
    plain, checkpointed = case("vit"), case("vit")
    checkpoint_activations(checkpointed.model)
    before = state(checkpointed.model)
    first, second = run(method, plain, "vit"), run(method, checkpointed, "vit")
    assert second.scales == pytest.approx(first.scales, abs=1e-5)
    assert all(key.endswith("value") for key in differences(before, state(checkpointed.model)))


def test_options_have_defaults():
    adam = {"lr": 0.01, "iterations": 100, "scale_range": (0.01, 100.0)}
    bounds = {"gamma": None, "gamma_relative": 2.0}
    assert {name: dict(method.options) for name, method in METHODS.items()} == {
        "none": {},
        "gradinit": {"optimizer": "adam", "step_size": None, **bounds, **adam},
        "lsuv": {"orthonormal": True, "tolerance": 0.1, "max_trials": 10},
        "emergence": {"alpha": 1.1},
        "architecture_aware": {"gain": 2.0},
        "range": {"factor": None, "additive": 1.0},
        "xavier": {},
        "mimetic": {"query_key": 0.7, "value_output": 0.4, "positions": True, "control": False},
        "structured": {"logit_norm": 7.0, "positions": 18.0, "value_output": 0.4},
    }
    with pytest.raises(ConfigError, match=r"lsuv\.alpha: is no option of lsuv\. Choose from orthonormal, tolerance"):
        run("lsuv", case("mlp"), alpha=1.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_cost_is_at_most_what_is_expected(method):
    own, reports = run(method, case(home(method))).cost, 2 * 2
    options = {"iterations": 2} if method == LEARNED else None
    expected = expected_cost(CONFIG, 1, METHODS[method], options)
    if method == "lsuv":
        # A forward pass for all three layers, one or two for each, and one to see that they stay as they are.
        assert expected is None
        assert reports + 5 / 3 <= own <= reports + 9 / 3
    else:
        assert reports <= own <= expected
        assert expected <= reports + {"architecture_aware": 1 / 6, "gradinit": 20}.get(method, 0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gradinit", {"optimizer": "lion", "step_size": 0.0}),
        ("gradinit", {"gamma": -1.0, "gamma_relative": "2", "iterations": 0, "lr": None, "scale_range": (2.0, 3.0)}),
        ("lsuv", {"orthonormal": 1, "tolerance": 0, "max_trials": 0}),
        ("emergence", {"alpha": 0}),
        ("architecture_aware", {"gain": float("nan")}),
        ("range", {"factor": 0, "additive": None}),
        ("mimetic", {"query_key": 0, "control": 1}),
        ("structured", {"logit_norm": "7", "positions": -1.0}),
    ],
)
def test_all_options_out_of_range_are_named(method, options):
    with pytest.raises(ConfigError) as caught:
        run(method, case("mlp"), **options)
    assert len(caught.value.problems) == len(options)
    assert all(f"{method}.{name}: {value!r}" in str(caught.value) for name, value in options.items())


@pytest.mark.parametrize("method", CHANGING)
def test_bfloat16_measures_the_new_weights(method):
    made, config = case("vit"), NIOConfig(report_batches=2, sub_batches=2, precision="bf16")
    result = run(method, made, "vit", config=config)
    again = run("none", made, "vit", config=config)
    assert result.after != result.before
    assert again.before == result.after


def test_data_that_end_before_the_iterations_are_told():
    result = run(LEARNED, case("mlp"), batches=iter(batches_of("mlp", 4)), iterations=9)
    assert result.status == "applied"
    assert len(result.history) == 2
    assert any(omega != 1 for omega in result.scales.values())
    assert result.message.endswith("The data ended after 2 of 9 iterations.")


def test_gradinit_computes_in_parts_where_memory_runs_out():
    made = case("vit")

    def loss_fn(model, batch):
        """A loss that has room for the gradient of four samples."""
        if torch.is_grad_enabled() and len(batch["labels"]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return made.loss_fn(model, batch)

    expected = run("gradinit", case("vit"), "vit")
    result = run("gradinit", dataclasses.replace(made, loss_fn=loss_fn), "vit")
    assert [record.micro_batch_size for record in result.history] == [3, 3]
    assert result.scales == pytest.approx(expected.scales, abs=1e-4)


def _weights(method):
    made, options = case(home(method)), {"iterations": 3, "lr": 0.05} if method == LEARNED else {}
    task = (made.model, batches_of(home(method), 5), made.loss_fn, CONFIG)
    initialize(*task, method=METHODS[method], options=options, collective=Collective.current())
    return [parameter.flatten().tolist() for parameter in made.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_the_weights_of_one(method):
    alone = _weights(method)
    first, second = run_ranks(2, _weights, method)
    assert first == second
    assert all(mine == pytest.approx(theirs, rel=1e-5) for mine, theirs in zip(alone, first, strict=True))
