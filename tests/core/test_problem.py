"""What a method is given: points, batches and their measurements."""

import itertools
import re

import pytest
import torch

from nio_hf import NIOConfig, grad_cosine
from nio_hf.core.problem import seed_of
from tests.core.cases import batches_of, double_case, scaling_problem
from tests.versions import VALUES

PARTS = {"first": r"^0\.weight", "middle": r"^4\.weight"}


def test_a_point_multiplies_the_tensors_of_each_group_and_none_else():
    made = double_case("vit")
    values = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    config = NIOConfig(groups={"values": rf"{VALUES}\.weight", "positions": "position"})
    with scaling_problem(made.model, made.loss_fn, config) as problem:
        for by_group in ([2.0, 0.5], [3.0, 1.0]):
            problem.place(by_group)
            for name, parameter in made.model.named_parameters():
                factor = (
                    by_group[0] if re.search(rf"{VALUES}\.weight", name) else by_group[1] if "position" in name else 1.0
                )
                assert torch.equal(parameter, factor * values[name])
        pairs = zip(problem.theta, problem.tensors.scaled_parameters, strict=True)
        assert all(theta.data_ptr() == parameter.data_ptr() for theta, parameter in pairs)
    assert all(torch.equal(parameter, values[name]) for name, parameter in made.model.named_parameters())


def test_a_point_is_measured_on_the_report_batches_as_the_diagnostic_does_it():
    made, batches = double_case("mlp"), batches_of("mlp", 3)
    by_group = [1.5, 0.5]
    with scaling_problem(made.model, made.loss_fn, NIOConfig(groups=PARTS), batches) as problem:
        problem.place(by_group)
        measured, size = problem.measure(None)
        in_parts, small = problem.measure(1)
    assert (size, small) == (None, 1)
    assert (in_parts.value, in_parts.loss) == pytest.approx((measured.value, measured.loss), rel=1e-6)
    for name, omega in zip(("0.weight", "4.weight"), by_group, strict=True):
        made.model.get_parameter(name).data.mul_(omega)
    assert list(measured.parts) == [grad_cosine(made.model, batch, made.loss_fn, sub_batches=4) for batch in batches]


def test_numbers_of_runs_and_batches_have_seeds_of_their_own():
    numbers = [*range(200), *range(500_000, 500_020)]
    seeds = [seed_of(seed, number) for seed, number in itertools.product(range(5), numbers)]
    assert len(set(seeds)) == len(seeds)
