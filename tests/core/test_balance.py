"""Scales that are computed: how large additive tensors have to be, and how the bounds are kept on any landscape."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nio_hf import GradCosine, NIOConfig, initialize
from nio_hf.core import balance, expected_cost, mode
from nio_hf.core.balance import Balance, balances
from nio_hf.core.collective import Collective
from nio_hf.core.gradcosine import sub_batch_windows
from nio_hf.core.groups import blocks_of, kinds_of
from nio_hf.core.loss import Loss
from nio_hf.core.method import Learned, Watch
from nio_hf.core.problem import ScalingProblem
from nio_hf.core.sub_batches import split
from nio_hf.errors import ModelError, NumericsError, Problem
from tests.core.cases import case, scaling_problem, unchanged
from tests.core.examples import examples

CPU = torch.device("cpu")
UNBOUNDED = NIOConfig(sub_batches=2, report_batches=1, loss_bound=None, least_norm=None)


class Block(nn.Module):
    """A block with two weight matrices, and a table that it adds to what it computes inside."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias_table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x) + self.bias_table))


class Adding(nn.Module):
    """Inputs (B, 3, 4) in the first two channels, positions of a given size in the other two, then blocks.

    Args:
        size: Length of the positions at each place; inputs have length 1.
        normalised: Whether a normalisation without a mean stands before the first block.
    """

    def __init__(self, size, *, normalised=False):
        super().__init__()
        self.read = nn.Linear(4, 4, bias=False)
        self.read.weight.data = torch.eye(4)
        self.positions = nn.Parameter(size * torch.tensor([[0.0, 0.0, 0.6, 0.8]] * 3))
        self.norm = nn.RMSNorm(4) if normalised else nn.Identity()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.read(x) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def inputs(samples=8):
    angles = torch.rand(samples, 3, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    zeros = torch.zeros_like(angles)
    return torch.stack([angles.cos(), angles.sin(), zeros, zeros], dim=-1)


def squared(model, batch):
    return model(batch).square().mean()


def found_balances(model, batch=None, loss_fn=squared, size=None):
    """{block: (names of its additive tensors, factor)}."""
    kinds = kinds_of(model)
    additive = {name: weight for name, weight in model.named_parameters() if kinds[name] == "additive"}
    loss, names = Loss(model, loss_fn, CPU), list(additive)
    with mode.isolated(model, CPU):
        parts = split(inputs() if batch is None else batch, sub_batch_windows(8, 2), loss, Collective(), where="batch")
        found = balances(loss, list(additive.values()), parts, Collective(), size)
    return {each.place: ([names[member] for member in each.members], each.factor) for each in found}


def factor(model, batch=None, loss_fn=squared, size=None):
    """The factor of a model with one first block; 1 where nothing is balanced."""
    found = [own for _, own in found_balances(model, batch, loss_fn, size).values()]
    return found[0] if found else 1.0


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("size", [1e-5, 0.02, 0.3, 0.9, 1.0, 3.0])
def test_what_is_added_is_to_become_at_least_as_large_as_what_it_is_added_to(size, normalised):
    assert factor(Adding(size, normalised=normalised)) == pytest.approx(max(1 / size, 1.0), rel=1e-3)


def test_places_that_nothing_is_added_to_do_not_count():
    batch = inputs()
    batch[:, 0] = 0.0
    assert factor(Adding(0.2), batch) == pytest.approx(5.0, rel=1e-3)


def test_micro_batches_change_nothing_and_all_is_as_it_was():
    model = Adding(0.25)
    with unchanged(model):
        assert factor(model, size=1) == pytest.approx(factor(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_the_model_as_it_was():
    model, calls = Adding(0.25), []

    def failing(own, batch):
        calls.append(1)
        if len(calls) == 2:
            raise ModelError(Problem("model", "broken", "Mend it"))
        return squared(own, batch)

    with unchanged(model), pytest.raises(ModelError):
        factor(model, loss_fn=failing)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_added_elsewhere_does_not_count():
    class Probing(Adding):
        def __init__(self):
            super().__init__(0.1)
            self.probe = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return super().forward(x) + self.probe.mean()

    model = Probing()
    kinds = kinds_of(model)
    assert kinds["blocks.0.bias_table"] == kinds["blocks.1.bias_table"] == kinds["probe"] == "additive"
    assert found_balances(model) == {"blocks.0": (["positions"], pytest.approx(10.0, rel=1e-3))}
    scales = initialize(model, [inputs()], squared, UNBOUNDED).scales
    common = scales["blocks.0.first.weight"]
    assert scales["positions"] == pytest.approx(10 * common, rel=1e-3)
    assert scales["probe"] == scales["blocks.1.bias_table"] == common
    assert factor(Adding(0.0)) == 1.0


def test_each_tower_has_a_balance_of_its_own_and_later_stages_have_none():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Adding(0.1), Adding(0.5)
            self.stage = nn.ModuleList([Block(), Block()])
            self.added = nn.Parameter(torch.randn(3, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            left, right = (tower.norm(tower.read(x) + tower.positions) for tower in (self.left, self.right))
            for block in self.left.blocks:
                left = block(left)
            for block in self.right.blocks:
                right = block(right)
            both = left * right + self.added
            for block in self.stage:
                both = block(both)
            return self.head(both.mean(1))

    model = Towers()
    assert found_balances(model) == {
        "left.blocks.0": (["left.positions"], pytest.approx(10.0, rel=1e-3)),
        "right.blocks.0": (["right.positions"], pytest.approx(2.0, rel=1e-3)),
    }
    result = initialize(model, [inputs()], squared, UNBOUNDED)
    groups = {group.name: group.omega for group in result.groups}
    assert list(groups) == ["additive (left.blocks.0)", "additive (right.blocks.0)", "others"]
    assert groups["additive (left.blocks.0)"] == pytest.approx(10 * groups["others"], rel=1e-3)
    assert groups["additive (right.blocks.0)"] == pytest.approx(2 * groups["others"], rel=1e-3)
    named = {tensor.name: (tensor.group, tensor.omega) for tensor in result.tensors}
    assert named["left.positions"] == ("additive (left.blocks.0)", groups["additive (left.blocks.0)"])
    assert named["added"] == ("others", groups["others"])


def test_a_model_without_blocks_has_nothing_to_balance():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.positions = nn.Parameter(torch.full((3, 4), 0.01))

        def forward(self, x):
            return self.head((self.read(x) + self.positions).mean(1))

    assert blocks_of(Flat()) == []
    assert factor(Flat()) == 1.0


@pytest.mark.parametrize("family", ["vit", "gpt2", "bert"])
def test_after_nio_additive_tensors_are_at_least_as_large_as_what_they_are_added_to(family):
    made = case(family)
    before = factor(made.model, made.batch, made.loss_fn)
    result = initialize(made.model, [made.batch], made.loss_fn, UNBOUNDED)
    scales = {group.name: group.omega for group in result.groups}
    assert scales["additive"] / scales["others"] == pytest.approx(before, rel=0.1)
    assert factor(made.model, made.batch, made.loss_fn) == pytest.approx(1.0, abs=0.1)
    assert (before > 1.5) == (family == "vit")


# Bounds, on landscapes that are made up.


@dataclasses.dataclass
class Found:
    """What a search did, with the points that it measured as log2 of the scales, and where the balance was taken."""

    learned: Learned
    measured: list[tuple[float, ...]]
    balanced_at: tuple[float, ...]
    config: NIOConfig

    @property
    def exponents(self):
        return tuple(math.log2(group.omega) for group in self.learned.groups)

    @property
    def trials(self):
        return [(record.tried, record.outcome) for record in self.learned.history]


def search(landscape, preserving, balancing=1.0, start=1.0, **settings):
    """Search with given factors, from a gradient norm of 1, on the tensors of a small model.

    A landscape is a function (log2 of the scale of additive tensors, that of all others) -> (loss, gradient norm).
    """
    config = NIOConfig(**{"sub_batches": 2, "report_batches": 3, **settings})
    measured, placed = [], []

    def measure(problem, size):
        measured.append(tuple(math.log2(scale) for scale in placed[-1]))
        loss, grad_norm = landscape(measured[-1][0], measured[-1][-1])
        if not math.isfinite(loss):
            raise NumericsError(Problem("batch", f"the loss is {loss}", "Check"))
        return GradCosine.mean([GradCosine(0.1, grad_norm, (grad_norm,) * 2, loss, 8)] * 3), size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "preserving_factor", lambda model, tensors: preserving)
        patch.setattr(balance, "balances", lambda *args: [Balance("blocks.0", (0, 1, 2), balancing)])
        patch.setattr(ScalingProblem, "measure", measure)
        patch.setattr(ScalingProblem, "place", lambda problem, scales: placed.append(tuple(scales)))
        with scaling_problem(Adding(0.5), squared, config, [inputs()] * 3) as made:
            problem = dataclasses.replace(made, before=dataclasses.replace(made.before, loss=start))
            learned = balance.balance_scales(problem, {}, Watch())
            assert learned.omega == problem.tensors.by_tensor([group.omega for group in learned.groups])
    assert placed[-1] == tuple(group.omega for group in learned.groups)
    return Found(learned, measured, placed[0], config)


def flat(additive, others):
    """A landscape that is the same everywhere."""
    return 1.0, 1.0


def test_what_is_added_is_balanced_at_the_common_factor():
    found = search(flat, 3.0, 8.0)
    assert found.balanced_at == (3.0, 3.0)
    assert found.trials == [("additive x24, others x3", "accepted")]
    assert [group.omega for group in found.learned.groups] == pytest.approx([24.0, 3.0])
    assert found.learned.history[0].scale == pytest.approx(3.0)
    # Two forward passes of one batch, and three batches measured.
    assert found.learned.cost == pytest.approx(2 / 3 + 3)


@pytest.mark.parametrize("groups", ["model", {"additive": "positions", "head": r"head\.weight"}])
def test_other_groups_have_the_common_factor_alone(groups):
    found = search(flat, 3.0, 8.0, groups=groups)
    assert [group.name for group in found.learned.groups] == (["model"] if groups == "model" else list(groups))
    assert [group.omega for group in found.learned.groups] == pytest.approx([3.0] * len(found.learned.groups))
    assert found.trials == [("all x3", "accepted")]
    assert found.learned.cost == 3


@pytest.mark.parametrize(("factor", "expected"), [(1.1, 1.0), (1.3, 1.3)])
def test_factors_are_worth_a_trial(factor, expected):
    found = search(flat, 1.0, factor)
    assert [group.omega for group in found.learned.groups] == pytest.approx([expected, 1.0])
    assert len(found.trials) == (expected != 1.0)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_strength_is_the_exponent_of_the_computed_scales(strength):
    found = search(flat, 8.0, 2.0, strength=strength, scale_range=(1.0, 2.0**9))
    assert found.exponents == pytest.approx((4 * strength, 3 * strength))
    assert found.balanced_at == (8.0, 8.0)


@pytest.mark.parametrize(
    ("landscape", "outcome", "settings"),
    [
        (lambda x, y: (1.5 if x <= 2.1 else 1.51, 1.0), "loss_bound", {}),
        (lambda x, y: (1.0 if x <= 2.1 else math.nan, 1.0), "loss_bound", {"loss_bound": None}),
        (lambda x, y: (1.0 if x <= 2.1 else math.inf, 1.0), "loss_bound", {"loss_bound": None}),
        # A negative loss may rise by a part of its size.
        (lambda x, y: (-1.0 if x <= 2.1 else -0.99, 1.0), "loss_bound", {"start": -2.0}),
        (lambda x, y: (1.0, 0.6 if x <= 2.1 else 0.59), "least_norm", {}),
    ],
)
def test_all_exponents_are_halved_while_a_bound_is_broken(landscape, outcome, settings):
    found = search(landscape, 16.0, 16.0, scale_range=(1.0, 2.0**9), **settings)
    assert found.measured == [(8.0, 4.0), (4.0, 2.0), (2.0, 1.0)]
    assert found.exponents == (2.0, 1.0)
    assert [each for _, each in found.trials] == [outcome, outcome, "accepted"]
    refused = found.learned.history[0]
    assert math.isnan(refused.loss) == (refused.grad_cosine is None) == ("loss_bound" in settings)


def test_without_bounds_a_finite_loss_is_enough_and_a_norm_may_always_rise():
    assert search(lambda x, y: (1e30, 1e-30), 4.0, loss_bound=None, least_norm=None).exponents == (2.0, 2.0)
    assert search(lambda x, y: (1.0, 1e30), 4.0).exponents == (2.0, 2.0)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("groups", ["additive", "model"])
def test_nothing_is_applied_where_nothing_keeps_the_bounds_and_nothing_costs_more(groups, strength):
    found = search(lambda x, y: (9.0, 1.0), 1e30, 1e30, groups=groups, strength=strength)
    assert set(found.exponents) == {0.0}
    assert {outcome for _, outcome in found.trials} == {"loss_bound"}
    assert found.learned.after.loss == 1.0
    assert found.learned.cost == pytest.approx(balance.most_cost(found.config))


@examples(100)
@given(
    slopes=st.tuples(*[st.floats(-1.0, 1.0)] * 4),
    preserving=st.sampled_from([0.5, 1.0, 1.5, 7.0, 300.0]),
    balancing=st.sampled_from([1.0, 2.0, 90.0]),
    strength=st.sampled_from([0.5, 1.0, 3.0]),
    loss_bound=st.sampled_from([None, 0.05, 0.5]),
    least_norm=st.sampled_from([None, 0.6, 1.0]),
    scale_range=st.sampled_from([(0.01, 100.0), (0.3, 3.0), (0.5, 1.0)]),
)
def test_the_largest_share_that_keeps_the_bounds_is_applied_on_any_landscape(
    slopes, preserving, balancing, strength, **settings
):
    def landscape(x, y):
        return 1.0 + math.tanh(slopes[0] * x + slopes[1] * y) / 2, math.exp((slopes[2] * x + slopes[3] * y) / 3)

    found = search(landscape, preserving, balancing, strength=strength, **settings)
    most = math.log2(settings["scale_range"][1])
    common = math.log2(max(1.0, preserving))
    whole = [min(most, strength * each) for each in (common + math.log2(balancing), common)]
    shares = [[each / 2**times for each in whole] for times in range(40)]
    tried = [share for share in shares if max(share) >= balance.LEAST_EXPONENT]
    allowed = [share for share in tried if within(landscape(*share), settings)]
    assert list(found.exponents) == pytest.approx(allowed[0] if allowed else [0.0, 0.0], abs=1e-9)
    for one, other in zip(found.measured, tried, strict=False):
        assert list(one) == pytest.approx(other)
    records = found.learned.history
    assert len(records) == len(found.measured) == (1 + tried.index(allowed[0]) if allowed else len(tried))
    assert found.learned.after.loss == pytest.approx(landscape(*found.exponents)[0])
    assert sum(record.cost for record in records) == pytest.approx(found.learned.cost if records else 0.0)
    assert found.learned.cost <= balance.most_cost(found.config) + 1e-9


def within(at, bounds):
    """Whether a loss and a norm keep the bounds, both 1 at the start."""
    return at[0] <= 1 + (bounds["loss_bound"] or math.inf) and at[1] >= (bounds["least_norm"] or 0.0)


def growing(model, batch):
    """A loss that any larger weight raises."""
    return squared(model, batch) + sum(parameter.square().sum() for parameter in model.parameters())


@pytest.mark.parametrize(("groups", "trials"), [("additive", 4), ("model", 2)])
def test_what_a_run_costs_is_expected_whatever_the_report(groups, trials):
    """Also where all that is scaled is additive."""
    model = Adding(0.25)
    if groups == "additive":
        model.requires_grad_(False).positions.requires_grad_(True)
    bounds = {"loss_bound": 1e-9, "least_norm": 1.0, "scale_range": (1.0, 4.0)}
    config = NIOConfig(sub_batches=2, report_batches=2, groups=groups, **bounds)
    result = initialize(model, (), growing, config, report=[inputs()] * 5)
    assert (len(result.groups), len(result.history)) == (1, trials)
    assert result.cost == pytest.approx(sum(record.cost for record in result.history) + 5)
    assert result.cost <= expected_cost(config, 1, batches=5)
    assert expected_cost(config, 1, batches=5) > expected_cost(config, 1)
