"""GradCosine by layer: slices of the same gradients, which sum back to the whole."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import GradientInspection, find_tensors, inspect_gradients
from nio_hf.core.batches import map_tensors
from nio_hf.core.gradcosine import sub_batch_windows
from nio_hf.core.mode import measuring
from nio_hf.errors import ConfigError, DataError
from tests.core.cases import FAMILIES, Case, batches_of, case, double_case, unchanged


def inspect(made, sub_batches, **settings):
    return inspect_gradients(made.model, [made.batch], made.loss_fn, NIOConfig(sub_batches=sub_batches, **settings))


def slices(made, sub_batches):
    """[d][l]: the gradient of sub-batch d in gradient tensor l, by the most obvious way."""
    tensors = find_tensors(made.model).gradient_parameters
    gradients = []
    with measuring(made.model):
        for window in sub_batch_windows(8, sub_batches):
            grads = torch.autograd.grad(made.mean_loss(window), tensors, allow_unused=True)
            gradients.append([torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)])
    return gradients


# Batch normalisation takes its statistics from a sub-batch, so that one sample is none.
@pytest.mark.parametrize(
    ("name", "sub_batches"), [(name, count) for name in FAMILIES for count in (2, 4 if name == "resnet" else 8)]
)
def test_layers_sum_to_the_whole(name, sub_batches):
    made = double_case(name)
    with unchanged(made.model):
        found = inspect(made, sub_batches)
    assert math.fsum(layer.contribution for layer in found.layers) == pytest.approx(found.measured.value, abs=1e-12)
    assert math.fsum(layer.share for layer in found.layers) == pytest.approx(1, abs=1e-12)
    mean_square = sum(norm**2 for norm in found.measured.norms) / sub_batches
    assert math.fsum(layer.grad_norm**2 for layer in found.layers) == pytest.approx(mean_square, rel=1e-12)
    weighted = math.fsum(layer.share * layer.agreement for layer in found.layers if layer.share > 0)
    assert weighted == pytest.approx(found.measured.value, abs=1e-12)


@pytest.mark.parametrize("name", ["vit", "swin", "mlp", "gpt2"])
def test_each_layer_equals_its_pairs_of_slices(name):
    made, count = double_case(name), 4
    gradients = slices(made, count)
    norms = [math.sqrt(sum(float(tensor.square().sum()) for tensor in gradient)) for gradient in gradients]
    for index, layer in enumerate(inspect(made, count).layers):
        parts = [gradient[index] / norm for gradient, norm in zip(gradients, norms, strict=True)]
        pairs = [float((left * right).sum()) for left, right in itertools.permutations(parts, 2)]
        squares = [float(part.square().sum()) for part in parts]
        assert layer.contribution == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
        assert layer.share == pytest.approx(sum(squares) / count, abs=1e-9)


def test_agreement_is_one_where_all_slices_are_alike_and_zero_where_they_are_orthogonal():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.alike = nn.Linear(1, 1, bias=False)
            self.apart = nn.Linear(4, 1, bias=False)

        def forward(self, x):
            return self.alike(torch.ones(len(x), 1, dtype=x.dtype)) + self.apart(x)

    found = inspect(Case(Scales().double(), torch.eye(4).double(), lambda model, x: model(x).mean()), 4)
    alike, apart = found.layers
    assert (alike.agreement, apart.agreement) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert (alike.share, apart.share, found.measured.value) == pytest.approx((0.5, 0.5, 0.5))
    whole = found.grouped(lambda layer: "all")["all"]
    assert (whole.parameters, whole.contribution, whole.share) == (5, pytest.approx(0.5), pytest.approx(1.0))


def test_it_measures_what_nio_reports_before_and_after():
    made = case("vit")
    held_out, batches = batches_of("vit", 2), batches_of("vit", 5)[2:]
    config = NIOConfig(search="published", sub_batches=4, iterations=3, seed=7)
    before = inspect_gradients(made.model, held_out, made.loss_fn, config)
    result = initialize(made.model, batches, made.loss_fn, config, report=held_out)
    assert any(omega != 1 for omega in result.scales.values())
    after = inspect_gradients(made.model, held_out, made.loss_fn, config)
    assert before.measured == result.before
    assert after.measured.value == pytest.approx(result.after.value, abs=1e-6)
    assert after.measured.grad_norm == pytest.approx(result.after.grad_norm, rel=1e-5)


def test_micro_batches_change_nothing():
    made = double_case("swin")
    whole, parts = inspect(made, 2), inspect(made, 2, micro_batch_size=1)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert other.contribution == pytest.approx(one.contribution, abs=1e-10)


def test_batches_are_averaged():
    made, config = double_case("mlp"), NIOConfig(sub_batches=2)
    batches = [map_tensors(lambda t: t.double() if t.is_floating_point() else t, b) for b in batches_of("mlp", 3)]
    both = inspect_gradients(made.model, batches, made.loss_fn, config)
    single = [inspect_gradients(made.model, [batch], made.loss_fn, config) for batch in batches]
    assert both.measured.value == pytest.approx(sum(s.measured.value for s in single) / 3)
    assert both.layers[0].contribution == pytest.approx(sum(s.layers[0].contribution for s in single) / 3)
    assert math.fsum(layer.contribution for layer in both.layers) == pytest.approx(both.measured.value, abs=1e-12)


def test_it_is_json_even_where_a_gradient_is_zero():
    class HalfUsed(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.used(x) + 0 * self.unused(x)

    found = inspect_gradients(HalfUsed(), [torch.randn(4, 2)], lambda m, x: m(x).square().mean(), NIOConfig())
    assert math.isnan(found.layers[2].agreement)
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["layers"][2]["agreement"] is None
    assert written["measured"]["value"] == found.measured.value
    assert GradientInspection.from_dict(written) == found


def test_refusals():
    made = case("mlp")
    with pytest.raises(DataError, match=r"batches: none\. Give at least one"):
        inspect_gradients(made.model, [], made.loss_fn)
    with pytest.raises(ConfigError, match="sub_batches"):
        inspect_gradients(made.model, [made.batch], made.loss_fn, NIOConfig(sub_batches=9))
