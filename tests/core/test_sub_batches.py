"""Two passes over the sub-batches give the numbers of the joint graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nio_hf.core import Collective, LayerScales, NIOConfig
from nio_hf.core.batches import batch_size
from nio_hf.core.curvature import make_path
from nio_hf.core.differentiator import Differentiator
from nio_hf.core.gradcosine import sub_batch_windows
from nio_hf.core.mode import measuring
from nio_hf.core.objectives import NormConstraint, make_objective
from nio_hf.core.reference import joint_graph
from nio_hf.core.two_pass import Reading, TwoPass
from tests.core.cases import Case, differences, double_case, state

GN_0, BETA = 3.0, 0.7
SPLITS = [(6, 2, 0.0), (9, 4, 0.0), (5, 5, 0.0), (10, 2, 0.2), (20, 4, 0.2)]
TARGETS = [(name, "objective") for name in ("gc", "gc_norm", "gc_sum_norm", "variance")] + [("gc", "constraint")]

CROSSED = [(*split, *target) for split in SPLITS for target in TARGETS]
# Every split and every target with at least two of the other, where the whole product is slow.
CHECKERBOARD = CROSSED[::2]
TRANSFORMERS = [(name, "batch") for name in ("swin", "convnext", "gpt2", "bert")]

PLAIN_CASES = [(name, "batch", *rest) for name in ("mlp", "vit") for rest in CROSSED]
OTHER_CASES = [(*model, *rest) for model in [*TRANSFORMERS, ("resnet", "frozen")] for rest in CHECKERBOARD]
# A sub-batch of one sample has no statistics.
SUB_BATCH_STATISTICS = [("resnet", "batch", *rest) for rest in CHECKERBOARD if rest[0] > rest[1]]


@pytest.mark.parametrize(
    ("name", "batch_norm", "samples", "sub_batches", "overlap", "objective", "branch"),
    PLAIN_CASES + OTHER_CASES + SUB_BATCH_STATISTICS,
)
def test_two_passes_equal_the_joint_graph(
    name: str, batch_norm: Any, samples: int, sub_batches: int, overlap: float, objective: Any, branch: Any
) -> None:
    made = double_case(name, samples)
    before = state(made.model)
    step = Step(made, sub_batches, overlap, objective, branch, batch_norm)
    expected = step.joint()
    _assert_equal(step.two_passes("exact"), expected)
    _assert_equal(step.two_passes("exact_kept"), expected)
    if batch_norm == "frozen" or name != "resnet":
        _assert_equal(step.two_passes("exact", micro_batch_size=3), expected)
    assert not differences(before, state(made.model))


def test_samples_are_put_in_order_before_they_are_split() -> None:
    made = double_case("mlp", 5)
    passes = Step(made, 2, 0.0, "gc", "objective").passes()
    parts = passes.split(made.batch, 2, order=torch.tensor([4, 2, 0, 1, 3]))
    inputs, labels = made.batch
    for index, positions in enumerate(([4, 2], [0, 1, 3])):
        assert torch.equal(parts.owned[index][0], inputs[positions])
        assert torch.equal(parts.owned[index][1], labels[positions])


class Step:
    """The numbers of one iteration in one vector: GC, GN, norms, losses, then the scale gradient."""

    def __init__(
        self,
        made: Case,
        sub_batches: int,
        overlap: float,
        objective: Any,
        branch: Any,
        batch_norm: Any = "batch",
    ) -> None:
        self.made, self.sub_batches, self.overlap, self.branch = made, sub_batches, overlap, branch
        self.batch_norm = batch_norm
        self.scales = LayerScales(made.model)
        self.config = NIOConfig(objective=objective, beta=BETA, sub_batches=sub_batches)
        self.target = NormConstraint() if branch == "constraint" else make_objective(self.config, GN_0)

    def passes(self, micro_batch_size: int | None = None) -> TwoPass:
        self.differentiator = Differentiator(self.made.model, self.made.loss_fn, self.scales, micro_batch_size)
        return TwoPass(self.made.model, self.differentiator, self.scales, Collective(), self.batch_norm)

    def first_pass(self, curvature: Any, micro_batch_size: int | None = None) -> Any:
        passes = self.passes(micro_batch_size)
        self.path = make_path(curvature, self.differentiator, self.made.batch, self.sub_batches)
        self.parts = passes.split(self.made.batch, self.sub_batches, overlap=self.overlap)
        with measuring(self.made.model, self.batch_norm), passes.statistics(self.made.batch):
            with_sum = self.target.needs_gradient_sum
            return passes.first_pass(self.path, self.parts, "", with_gradient_sum=with_sum)

    def two_passes(self, curvature: Any, micro_batch_size: int | None = None) -> Tensor:
        sums = self.first_pass(curvature, micro_batch_size)
        reading = Reading.of(sums)
        passes = self.passes(micro_batch_size)
        initial = [parameter.detach() for parameter in self.scales.scaled]
        with measuring(self.made.model, self.batch_norm), passes.statistics(self.made.batch):
            shares = passes.second_pass(self.path, self.parts, sums, self.target, initial, "")
        read = [reading.grad_cosine, reading.grad_norm, *reading.norms, *reading.losses]
        return torch.cat([shares.new_tensor(read), shares])

    def joint(self) -> Tensor:
        made = self.made
        windows = sub_batch_windows(batch_size(made.batch), self.sub_batches, self.overlap)
        with measuring(made.model, self.batch_norm), self.passes().statistics(made.batch):
            joint = joint_graph(
                made.model,
                lambda model: [made.mean_loss(window, model) for window in windows],
                gradient=[self.scales.name_of(parameter) for parameter in self.scales.gradient],
                scaled=[self.scales.name_of(parameter) for parameter in self.scales.scaled],
                objective=self.config.objective,
                branch=self.branch,
                beta=BETA,
                initial_grad_norm=GN_0,
            )
            losses = torch.stack([made.mean_loss(window).detach() for window in windows])
        return torch.cat([torch.stack([joint.grad_cosine, joint.grad_norm]), joint.norms, losses, joint.scale_gradient])


def _assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
