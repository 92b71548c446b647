"""A method of initialisation as a record: its options, and what a run of it gives."""

import dataclasses

import pytest
import torch

from nio_hf import NIOConfig, initialize
from nio_hf.core import Method
from nio_hf.core.method import Learned
from nio_hf.errors import ConfigError
from tests.core.cases import batches_of, case, unchanged


def halve(problem, options, watch):
    """Divide every scaled tensor, and take a batch from the stream."""
    assert problem.stream.next() is not None
    for value in problem.theta:
        value.div_(options["divisor"])
    return Learned(cost=3.0)


HALVE = Method(
    name="halve",
    title="Halve",
    describe=lambda config: "Divides the weights.",
    learn=halve,
    batches=lambda config, options: 1,
    most_cost=lambda config, groups, options: 3.0,
    options={"divisor": 2.0, "layers": (1, 2)},
    check=lambda options: [("divisor", options["divisor"], options["divisor"] > 0, "Give a number above 0")],
)


def test_options_have_defaults_and_lists_become_tuples():
    assert HALVE.checked(None) == {"divisor": 2.0, "layers": (1, 2)}
    assert HALVE.checked({"layers": [3], "divisor": 4.0}) == {"divisor": 4.0, "layers": (3,)}
    assert HALVE.options == {"divisor": 2.0, "layers": (1, 2)}


def test_all_problems_of_options_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        HALVE.checked({"divisor": -1.0, "depth": 3, "width": 4})
    assert [problem.where for problem in caught.value.problems] == ["halve.depth", "halve.width", "halve.divisor"]
    assert "halve.depth: is no option of halve. Choose from divisor, layers." in str(caught.value)
    assert "halve.divisor: -1.0. Give a number above 0." in str(caught.value)


@pytest.mark.parametrize("groups", ["model", {"first": r"^0\."}])
def test_a_method_has_a_scale_for_each_tensor_whatever_the_groups_are(groups):
    made = case("mlp")
    values = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    config = NIOConfig(groups=groups, report_batches=2, sub_batches=2)
    result = initialize(made.model, batches_of("mlp", 3), made.loss_fn, config, method=HALVE, options={"divisor": 4})
    assert result.scales.keys() == {name for name, value in values.items() if value.any()}
    assert all(omega == pytest.approx(0.25) for omega in result.scales.values())
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, values[name] / 4)
    assert [(group.name, group.tensors) for group in result.groups] == [(name, 1) for name in result.scales]
    assert (result.method, result.title, result.status, result.cost) == ("halve", "Halve", "applied", 7.0)
    assert result.options == {"divisor": 4, "layers": (1, 2)}
    assert result.message.startswith("Halve applied: GradCosine (D = 2, B/D = 4) ")


def test_a_method_that_fails_leaves_the_model_as_it_was():
    made = case("mlp")

    def halve_and_fail(problem, options, watch):
        halve(problem, options, watch)
        raise ZeroDivisionError

    failing = dataclasses.replace(HALVE, learn=halve_and_fail)
    with unchanged(made.model), pytest.raises(ZeroDivisionError):
        initialize(made.model, batches_of("mlp", 3), made.loss_fn, NIOConfig(report_batches=2), method=failing)
