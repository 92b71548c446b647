"""The gradient of the scales: against the joint graph, on every path, and what a path costs and keeps."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from benchmarks.accounting import counted
from benchmarks.reference import joint_graph
from nio_hf import NIOConfig, initialize
from nio_hf.core import Collective, curvature, find_tensors, memory
from nio_hf.core.batches import batch_size
from nio_hf.core.curvature import Path, choose_path, second_pass
from nio_hf.core.gradcosine import published_windows, sub_batch_windows
from nio_hf.core.loss import Loss
from nio_hf.core.mode import measuring
from nio_hf.core.objectives import CosineObjective, NormConstraint, make_objective
from nio_hf.core.sub_batches import SubBatches, first_pass, read, split
from nio_hf.errors import ModelError
from tests.core.cases import FAMILIES, Case, batches_of, case, differences, double_case, state, unchanged

CPU, ALONE = torch.device("cpu"), Collective()
# Samples, sub-batches, overlap of the published windows; None for a partition.
SPLITS = [(6, 2, None), (9, 4, None), (5, 5, None), (10, 2, 0.2), (12, 3, 0.3)]
TARGETS = [("gc", "objective"), ("gc_sum_norm", "objective"), ("gc", "constraint")]
CROSSED = [("mlp", *split, *target) for split, target in itertools.product(SPLITS, TARGETS)]
# Every target once for each family, where all of them with all splits are slow.
FEW = [(6, 2, 0.4), (7, 3, None), (4, 2, 0.25)]
PAIRED = [
    (name, *split, *target) for name in FAMILIES if name != "mlp" for split, target in zip(FEW, TARGETS, strict=True)
]
EXACT = [Path("exact"), Path("exact", "graphs")]
FINITE = [Path("finite_difference"), Path("finite_difference", "gradients")]


def smooth_case(name, samples):
    """A case in fp64 away from the edges of its activations."""
    made = double_case(name, samples)
    for module in made.model.modules():
        # At its start the position network of Swin 2 is: a ReLU of the coordinates, which hold zeros, without a bias.
        if name == "swinv2" and isinstance(module, nn.Linear) and module.in_features == 2:
            nn.init.normal_(module.bias)
    return made


def two_passes(made, windows, objective, path, micro_batch_size=None):
    """GC, GN, norms and mean loss of a batch, and dJ/domega of its scaled tensors."""
    tensors, loss = find_tensors(made.model), Loss(made.model, made.loss_fn, CPU)
    with measuring(made.model):
        parts = split(made.batch, windows, loss, ALONE, where="batch", micro_batch_size=micro_batch_size)
        first = first_pass(
            loss, tensors.gradient_parameters, parts, ALONE, micro_batch_size=micro_batch_size, keep=path.keep
        )
        measured = read(first.sums, parts)
        assert len(first.kept) == (parts.count if path.keep and micro_batch_size is None else len(first.kept))
        initial = [parameter.detach() for parameter in tensors.scaled_parameters]
        slopes, _ = second_pass(loss, tensors, parts, first, objective, initial, path, ALONE)
    values = [measured.value, measured.grad_norm, *measured.norms, measured.loss]
    return torch.tensor(values, dtype=torch.float64), slopes


def oracle(made, windows, objective="gc", branch="objective"):
    """The same from the joint graph."""
    tensors = find_tensors(made.model)
    with measuring(made.model):
        joint = joint_graph(
            made.model,
            lambda model: [made.mean_loss(window, model) for window in windows],
            gradient=[place.name for place in tensors.gradient],
            scaled=[place.name for place in tensors.scaled],
            objective=objective,
            branch=branch,
        )
        loss = torch.stack([made.mean_loss(window).detach() for window in windows]).mean()
    values = [joint.grad_cosine, joint.grad_norm, *joint.norms, loss]
    return torch.stack(values).double(), joint.scale_gradient


def ways_of(name, target):
    """Paths and micro-batch sizes to compute a case by: all of them, three for each target of a slow family."""
    ways = [*((path, None) for path in (*EXACT, *FINITE)), (EXACT[0], 2), (FINITE[1], 2)]
    if name == "resnet":
        ways = ways[:4]
    first = TARGETS.index(target)
    return ways if name == "mlp" else [ways[(first + more) % len(ways)] for more in range(3)]


@pytest.mark.parametrize(("name", "samples", "sub_batches", "overlap", "target", "branch"), CROSSED + PAIRED)
def test_every_path_equals_the_joint_graph(name, samples, sub_batches, overlap, target, branch):
    made = smooth_case(name, samples)
    before = state(made.model)
    windows = published_windows(samples, sub_batches, overlap) if overlap else sub_batch_windows(samples, sub_batches)
    objective = NormConstraint() if branch == "constraint" else make_objective(target)
    values, slopes = oracle(made, windows, target, branch)
    assert slopes.isfinite().all()
    assert float(slopes.norm()) > 1e-3
    # Some of the many ReLUs of the position network of Swin 2 are near their edge nevertheless.
    tolerance = 1e-3 if name == "swinv2" else 1e-5
    for path, size in ways_of(name, (target, branch)):
        found, found_slopes = two_passes(made, windows, objective, path, size)
        torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9)
        if path.product == "exact":
            torch.testing.assert_close(found_slopes, slopes, rtol=1e-8, atol=1e-9)
        else:
            assert float((found_slopes - slopes).norm() / slopes.norm()) < tolerance, path
    assert not differences(before, state(made.model))


@pytest.mark.parametrize("objective", [CosineObjective(), NormConstraint()], ids=["objective", "constraint"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("path", FINITE)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_finite_differences_in_single_precision_are_close(name, path, micro_batch_size, objective):
    made, windows = case(name), sub_batch_windows(8, 2)
    with unchanged(made.model):
        _, exact = two_passes(made, windows, objective, EXACT[0])
        _, approximate = two_passes(made, windows, objective, path, micro_batch_size)
    assert (approximate - exact).norm() < 1e-2 * exact.norm()
    assert not torch.equal(approximate, exact)


@pytest.mark.parametrize(
    ("path", "micro_batch_size", "calls"),
    [
        (EXACT[0], None, 2),
        (EXACT[1], None, 1),
        (FINITE[0], None, 4),
        (FINITE[1], None, 3),
        # Two micro-batches, each computed in pass 1, for g_d again, and for the product.
        (EXACT[0], 2, 6),
        (EXACT[1], 2, 6),
        (FINITE[1], 2, 6),
    ],
)
@pytest.mark.parametrize("sub_batches", [2, 3])
def test_losses_computed_for_each_sub_batch(path, micro_batch_size, calls, sub_batches):
    made = case("mlp", 4 * sub_batches)
    seen = []

    def recorded(model, batch):
        seen.append(len(batch[1]))
        return made.loss_fn(model, batch)

    windows = sub_batch_windows(4 * sub_batches, sub_batches)
    two_passes(Case(made.model, made.batch, recorded), windows, CosineObjective(), path, micro_batch_size)
    assert len(seen) == calls * sub_batches
    assert set(seen) == {micro_batch_size or 4}
    # A double backward costs two backwards, a forward half of one: 4 training steps, 3 with what is kept.
    assert path.steps(in_parts=False) == (3 if path.keep else 4)


@pytest.mark.parametrize(
    ("way", "grows"), [(EXACT[0], False), (FINITE[0], False), (EXACT[1], True), ("joint graph", True)], ids=str
)
def test_peak_memory_grows_with_the_number_of_sub_batches_only_where_graphs_are_kept(way, grows):
    def peak_bytes(sub_batches):
        # The tokens of two sentences for each sub-batch take next to no memory.
        made, windows = case("gpt2", 2 * sub_batches, n_layer=1), sub_batch_windows(2 * sub_batches, sub_batches)
        if way == "joint graph":
            return counted(lambda: oracle(made, windows)).peak
        return counted(lambda: two_passes(made, windows, CosineObjective(), way)).peak

    few, many = peak_bytes(2), peak_bytes(8)
    assert many > 2 * few if grows else many < 1.02 * few


# Which path "auto" and the others take.


def chosen(made, setting, micro_batch_size=None, sub_batches=2):
    tensors, loss = find_tensors(made.model), Loss(made.model, made.loss_fn, CPU)
    windows = sub_batch_windows(batch_size(made.batch), sub_batches)
    with measuring(made.model):
        parts = split(made.batch, windows, loss, ALONE, where="batch 3")
        return choose_path(setting, loss, tensors, parts, micro_batch_size)


@pytest.mark.parametrize(("free", "kept"), [(None, 0), (0, 0), (10**12, 1)])
@pytest.mark.parametrize(
    ("setting", "paths"), [("auto", EXACT), ("exact", EXACT), ("finite_difference", FINITE)], ids=str
)
def test_what_fits_into_memory_is_kept(setting, paths, free, kept, monkeypatch):
    monkeypatch.setattr(curvature, "available_memory", lambda device: free)
    made = case("mlp")
    with unchanged(made.model):
        assert chosen(made, setting) == paths[kept]
    if paths == EXACT:
        assert chosen(made, setting, micro_batch_size=2) == EXACT[0], "graphs of micro-batches are not kept"


def test_gradients_are_kept_where_all_of_them_fit(monkeypatch):
    made = case("mlp")
    numbers = sum(parameter.numel() for parameter in made.model.parameters() if parameter.any())
    for free, keep in [(4 * 2 * numbers / 0.6 + 1, "gradients"), (4 * 2 * numbers / 0.6 - 1, None)]:
        monkeypatch.setattr(curvature, "available_memory", lambda device, free=free: free)
        assert chosen(made, "finite_difference").keep == keep


def test_a_process_without_sub_batches_has_no_path_to_find_out():
    made = case("mlp")
    parts = SubBatches(2, {}, 0, 8, "batch")
    loss, tensors = Loss(made.model, made.loss_fn, CPU), find_tensors(made.model)
    assert choose_path("auto", loss, tensors, parts, None) == EXACT[0]
    assert choose_path("finite_difference", loss, tensors, parts, None) == FINITE[0]


# Operations whose backward leaves no graph: autograd gives a wrong second derivative without a word.


class Square(torch.autograd.Function):
    """y = x^2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x


def slope_of_square(ctx, incoming):
    (x,) = ctx.saved_tensors
    return 2 * x * incoming


class SoundSquare(Square):
    """By operations that can be differentiated again."""

    backward = staticmethod(slope_of_square)


class OnceSquare(Square):
    """Its author did not want it differentiated twice."""

    backward = staticmethod(once_differentiable(slope_of_square))


class FusedSquare(Square):
    """As a fused kernel does it: autograd sees nothing of the backward."""

    backward = staticmethod(torch.no_grad()(slope_of_square))


class Squaring(nn.Module):
    """Two linear layers around y = x^2, with activation checkpointing or without."""

    def __init__(self, square, checkpointing):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.square, self.checkpointing = square, checkpointing

    def forward(self, x):
        hidden = lambda x: self.square(self.first(x))  # noqa: E731
        return self.last(checkpoint(hidden, x, use_reentrant=False) if self.checkpointing else hidden(x))


def squaring(square, checkpointing=False):
    made = case("mlp")
    return Case(Squaring(square, checkpointing).double(), made.batch, made.loss_fn)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("square", [OnceSquare, FusedSquare])
def test_operations_that_leave_no_graph_are_computed_by_finite_differences_or_refused(square, checkpointing, caplog):
    made, windows = squaring(square.apply, checkpointing), sub_batch_windows(8, 2)
    _, right = oracle(squaring(torch.square), windows)
    _, wrong = two_passes(made, windows, CosineObjective(), EXACT[0])
    assert float((wrong - right).norm()) > 0.1 * float(right.norm()), "there is nothing to find"
    path = chosen(made, "auto")
    assert path.product == "finite_difference"
    assert f"the backward of {square.__name__} leaves no graph to differentiate again" in caplog.text
    _, found = two_passes(made, windows, CosineObjective(), path)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)
    message = rf"batch 3: the backward of {square.__name__} leaves no graph .* \"finite_difference\""
    with pytest.raises(ModelError, match=message):
        chosen(made, "exact")


def test_operations_that_leave_no_graph_are_found_where_memory_is_scarce(monkeypatch):
    monkeypatch.setattr(memory, "release_memory", lambda device: None)
    made = squaring(FusedSquare.apply)

    def loss_fn(model, batch):
        if len(batch[1]) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return made.loss_fn(model, batch)

    small = Case(made.model, made.batch, loss_fn)
    assert chosen(small, "auto").product == "finite_difference"
    with pytest.raises(ModelError, match="the backward of FusedSquare leaves no graph"):
        chosen(small, "exact")


def test_a_whole_run_through_an_operation_that_leaves_no_graph_is_right():
    config = NIOConfig(search="published", groups="tensor", iterations=3, lr=0.05, sub_batches=2)
    scales = []
    for square in (torch.square, FusedSquare.apply):
        made = squaring(square)
        scales.append(initialize(made.model, batches_of("mlp", 8), made.loss_fn, config).scales)
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    assert max(abs(omega - 1) for omega in scales[0].values()) > 0.04


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_that_can_be_differentiated_again_are_computed_exactly(checkpointing):
    made, windows = squaring(SoundSquare.apply, checkpointing), sub_batch_windows(8, 2)
    path = chosen(made, "exact")
    assert path.product == "exact"
    torch.testing.assert_close(
        two_passes(made, windows, CosineObjective(), path)[1], oracle(squaring(torch.square), windows)[1]
    )


def ctc(model, batch):
    """A loss of torch without a second derivative."""
    scores = model(batch[0]).log_softmax(dim=-1).expand(3, -1, -1)
    lengths = torch.full((len(batch[0]),), 3), torch.full((len(batch[0]),), 1)
    return nn.functional.ctc_loss(scores, batch[1][:, None].clamp(min=1), *lengths)


def test_operations_of_torch_without_a_second_derivative(caplog):
    made = Case(case("mlp").model, case("mlp").batch, ctc)
    with pytest.raises(ModelError, match=r'batch 3: .*no second derivative .*Set NIOConfig.curvature to "finite_diff'):
        chosen(made, "exact")
    assert chosen(made, "auto").product == "finite_difference"
    assert "no second derivative" in caplog.text
    config = NIOConfig(search="published", iterations=1, report_batches=1, sub_batches=2, curvature="finite_difference")
    assert initialize(made.model, batches_of("mlp", 2), ctc, config).history


def test_bfloat16_is_not_differentiated_by_finite_differences():
    """Their difference is all rounding."""
    made = case("mlp")
    config = NIOConfig(search="published", sub_batches=2, report_batches=1, precision="bf16")
    message = r'no second derivative .* Set NIOConfig\.precision to "fp32"'
    with pytest.raises(ModelError, match=message):
        initialize(made.model, batches_of("mlp", 8), ctc, config)


# Losses that are not smooth.


class Routed(nn.Module):
    """Two experts of which each sample takes the one with the larger score, as in a mixture of experts."""

    def __init__(self, sharpness):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(6, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))
        with torch.no_grad():
            self.router.weight.mul_(sharpness)

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        weight, index = gates.topk(1, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return weight * outputs.gather(1, index[:, :, None].expand(-1, 1, outputs.shape[2])).squeeze(1)


def routed(sharpness):
    made = case("mlp", 64)
    return Case(Routed(sharpness), made.batch, made.loss_fn)


def test_through_routing_exact_products_are_right_and_finite_differences_refused():
    """Where samples lie near the edge between two experts: a step takes some of them to the other one."""
    made, windows = routed(1e-5), sub_batch_windows(64, 2)
    with pytest.raises(ModelError, match=r"the gradient jumps, as in top-k routing .*\"exact\", or .*\"balance\""):
        chosen(made, "finite_difference")
    assert chosen(made, "auto").product == "exact"
    _, wrong = two_passes(made, windows, CosineObjective(), FINITE[0])
    made.model.double()
    _, exact = two_passes(made, windows, CosineObjective(), EXACT[0])
    assert float((wrong - exact).norm()) > 0.3 * float(exact.norm()), "they are refused without need"
    torch.testing.assert_close(exact, oracle(made, windows)[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("samples", [8, 32])
def test_finite_differences_through_many_edges_of_a_relu_are_refused(samples):
    made = case("resnet", samples)
    with pytest.raises(ModelError, match="at the edge of a ReLU"):
        chosen(made, "finite_difference")
    assert chosen(made, "auto").product == "exact"


def test_finite_differences_where_no_sample_changes_its_expert_are_right():
    made, windows = routed(1.0), sub_batch_windows(64, 2)
    path = chosen(made, "finite_difference")
    _, exact = two_passes(made, windows, CosineObjective(), EXACT[0])
    _, close = two_passes(made, windows, CosineObjective(), path)
    assert float((close - exact).norm()) < 1e-2 * float(exact.norm())


# bfloat16.


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_bfloat16_autocast_is_near_and_reaches_the_loss(name):
    made, seen = case(name, 16), set()

    def loss_fn(model, batch):
        seen.add(torch.is_autocast_enabled("cpu"))
        return made.loss_fn(model, batch)

    results = {}
    for precision in ("fp32", "bf16"):
        own = case(name, 16)
        config = NIOConfig(search="published", iterations=2, report_batches=1, sub_batches=2, precision=precision)
        results[precision] = initialize(own.model, [own.batch] * 3, loss_fn, config)
    assert seen == {False, True}
    assert results["bf16"].before.value == pytest.approx(results["fp32"].before.value, abs=0.02)
    assert results["bf16"].before.value != results["fp32"].before.value


def test_bfloat16_sees_the_weights_as_they_are():
    """Autocast keeps cast weights, and NIO changes weights without its notice."""
    made, batches = case("vit"), batches_of("vit", 5)
    settings = {"sub_batches": 2, "report_batches": 2, "precision": "bf16", "search": "published"}
    config = NIOConfig(iterations=3, lr=0.1, **settings)
    first, again = (initialize(made.model, batches, made.loss_fn, config) for _ in range(2))
    assert first.after.value != first.before.value
    assert (again.before.value, again.before.loss) == (first.after.value, first.after.loss)
