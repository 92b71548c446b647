"""The variance of every layer's output afterwards, and the layers that cannot have it."""

from collections import defaultdict

import pytest
import torch
from torch import nn

from nio_hf.baselines import METHODS
from nio_hf.baselines.lsuv import Moments
from nio_hf.core import NIOConfig, initialize
from nio_hf.core.mode import measuring
from nio_hf.errors import NumericsError
from tests import zoo
from tests.core.cases import case

CONFIG = NIOConfig(sub_batches=2)


def run(model, batch, loss_fn=zoo.vector_loss, config=CONFIG, **options):
    return initialize(model, [batch], loss_fn, config, method=METHODS["lsuv"], options=options, report=[batch])


def output_variances(model, batch, loss_fn=zoo.vector_loss):
    """Variance of all that each linear and convolution module gives in one run of the model."""
    outputs = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, inputs, y, name=name: outputs[name].append(y.detach().flatten()))
    with measuring(model):
        loss_fn(model, batch)
    return {name: torch.cat(values).var(unbiased=False).item() for name, values in outputs.items()}


def model_of(name):
    """(model, batch, loss)"""
    if name != "conv net":
        made = case(name)
        return made.model, made.batch, made.loss_fn
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 10 * 10, 5),
    )
    batch = zoo.images(8)
    return model, (batch["pixel_values"][:, :, :12, :12], batch["labels"]), zoo.vector_loss


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize(
    ("name", "layers"), {"mlp": 3, "conv net": 4, "vit": 7, "swin": 7, "resnet": 7, "convnext": 7}.items()
)
def test_every_layer_has_unit_variance(name, layers, orthonormal, caplog):
    model, batch, loss_fn = model_of(name)
    before = output_variances(model, batch, loss_fn)
    run(model, batch, loss_fn, orthonormal=orthonormal)
    variances = output_variances(model, batch, loss_fn)
    assert variances.keys() == before.keys()
    assert len(variances) >= layers
    assert all(abs(variance - 1) < 0.1 for variance in variances.values()), variances
    assert any(abs(variance - 1) > 0.5 for variance in before.values())
    assert name != "mlp" or not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_tolerance_is_that_of_the_option():
    made = case("vit")
    run(made.model, made.batch, made.loss_fn, tolerance=1e-4)
    variances = output_variances(made.model, made.batch, made.loss_fn)
    assert all(abs(variance - 1) < 2e-4 for variance in variances.values()), variances


def test_weights_are_orthonormal_but_for_their_scale():
    made, other = case("mlp"), case("mlp")
    with torch.no_grad():
        for parameter in other.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_()
    run(made.model, made.batch)
    run(other.model, made.batch)
    for name in ("0.weight", "4.weight", "6.weight"):
        weight = made.model.get_parameter(name).detach()
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram)), atol=1e-5, rtol=0)
        # They are drawn from the seed, whatever they were.
        torch.testing.assert_close(weight, other.model.get_parameter(name).detach())


def test_without_orthonormal_weights_are_only_scaled():
    made, before = case("vit"), case("vit").model
    result = run(made.model, made.batch, made.loss_fn, orthonormal=False)
    for name, parameter in made.model.named_parameters():
        omega = result.scales.get(name, 1.0)
        torch.testing.assert_close(parameter, before.get_parameter(name) * omega, rtol=1e-4, atol=1e-6)
        assert (omega == 1) or parameter.ndim > 1


class Odd(nn.Module):
    """Layers that are shared, tied, never called, blind, or dominated by their bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.never = nn.Linear(6, 6)
        self.last = nn.Linear(6, 5)
        self.first = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.blind = nn.Linear(6, 6, bias=False)
        self.biased = nn.Linear(6, 6)
        self.sums = nn.MultiheadAttention(6, 2, batch_first=True)
        with torch.no_grad():
            self.biased.bias.copy_(torch.tensor([4.0, -4.0, 4.0, -4.0, 4.0, -4.0]))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = torch.tanh(self.tied(x))
        x = x + self.blind(0 * x) + 0.1 * self.biased(x) + self.sums(x[None], x[None], x[None])[0][0]
        return self.last(x)


def test_odd_layers_are_scaled_together_or_left_with_a_warning(caplog):
    model, batch = Odd(), zoo.vectors(16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = run(model, batch, orthonormal=False)
    outputs = defaultdict(list)
    for name in ("first", "twice", "tied", "last"):
        layer = "first" if name == "tied" else name
        model.get_submodule(name).register_forward_hook(lambda m, i, y, layer=layer: outputs[layer].append(y))
    with measuring(model):
        model(batch[0])
    assert {name: len(values) for name, values in outputs.items()} == {"first": 2, "twice": 2, "last": 1}
    for name, values in outputs.items():
        assert abs(torch.cat(values).var(unbiased=False).item() - 1) < 0.1, name
    left = ["biased.weight", "blind.weight", "never.weight", "sums.in_proj_weight", "sums.out_proj.weight"]
    for name in left:
        assert torch.equal(model.get_parameter(name), before[name]), name
    warnings = {r.getMessage() for r in caplog.records if r.name == "nio_hf.baselines.lsuv"}
    assert len(warnings) == 4
    (tried,) = (text for text in warnings if "after 10 trials" in text)
    assert "biased.weight" in tried
    assert "blind.weight" not in tried
    assert sum("no module shows its output" in text for text in warnings) == 2
    assert "never.weight" in {tensor.name for tensor in result.excluded if tensor.reason == "unused"}


def test_an_output_without_variance_is_left(caplog):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(0.01)
        model[0].bias.fill_(-10.0)

    def loss_fn(model, batch):
        # The first layer has a gradient of its own; behind the ReLU there is nothing.
        return zoo.vector_loss(model, batch) + model.get_submodule("0")(batch[0]).square().mean()

    before = model[2].weight.detach().clone()
    run(model, zoo.vectors(8), loss_fn, orthonormal=False)
    assert torch.equal(model[2].weight, before)
    assert "2.weight has no unit variance: its output has no variance" in caplog.text


def test_a_weight_that_is_tied_to_an_embedding_is_left():
    made = case("gpt2")
    embedding = made.model.get_parameter("transformer.wte.weight")
    before = embedding.detach().clone()
    result = run(made.model, made.batch, made.loss_fn)
    assert torch.equal(embedding, before)
    assert result.scales["transformer.h.0.attn.c_attn.weight"] != 1


def test_an_infinite_output_is_named():
    made = case("mlp")
    calls = []

    def loss_fn(model, batch):
        calls.append(None)
        # After the probe and one report batch of two sub-batches.
        inputs = batch[0] * (torch.inf if len(calls) > 3 else 1)
        return zoo.vector_loss(model, (inputs, batch[1]))

    with pytest.raises(NumericsError, match=r"LSUV, 0\.weight: its output is not finite"):
        run(made.model, made.batch, loss_fn)


def test_micro_batches_give_the_same_weights():
    made, split = case("vit"), case("vit")
    run(made.model, made.batch, made.loss_fn)
    run(split.model, made.batch, made.loss_fn, NIOConfig(sub_batches=2, micro_batch_size=3))
    for mine, other in zip(made.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_moments_of_parts_are_those_of_the_whole():
    values = torch.randn(40, 7) * 3 + 100
    moments = Moments()
    for part in values.split([1, 9, 30]):
        moments.add(part)
    assert moments.variance == pytest.approx(values.double().var(unbiased=False).item(), rel=1e-9)
    constant = Moments()
    constant.add(torch.full((10,), 0.1))
    constant.add(torch.full((3,), 0.1))
    assert constant.variance == 0
