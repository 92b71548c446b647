"""Which tensors are scaled, which the gradient is of, and what is said of the others."""

import re

import pytest
import torch
from torch import nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import find_tensors
from nio_hf.errors import ModelError
from tests import zoo
from tests.core.cases import FAMILIES, PER_TENSOR, batches_of, case


def depths_of(model):
    tensors = find_tensors(model)
    return {tensor.name: tensor.depth for tensor in tensors.report([1.0] * len(tensors.scaled))}


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_chosen_by_what_they_are(name):
    model = case(name).model
    parameters = dict(model.named_parameters())
    found = find_tensors(model)
    nonzero = [id(p) for p in parameters.values() if p.any()]
    assert [id(p) for p in found.gradient_parameters] == nonzero
    assert [id(p) for p in found.scaled_parameters] == nonzero
    assert [place.name for place in found.trainable] == list(parameters)
    zeros = {parameter_name for parameter_name, parameter in parameters.items() if not parameter.any()}
    assert {(tensor.name, tensor.reason) for tensor in found.excluded} == {(zero, "zero") for zero in zeros}
    assert zeros or name == "mlp"
    assert [place.name for place in found.places] == list(parameters)


@pytest.mark.parametrize("name", ["vit", "gpt2", "resnet", "mlp", "swinv2"])
def test_weights_are_the_matrices_tables_and_tokens(name):
    model = case(name).model
    found = find_tensors(model, "weights")
    # A temperature of each head has three dimensions, two of which are 1.
    named = [(n, p) for n, p in model.named_parameters() if "logit_scale" not in n]
    matrices = [n for n, parameter in named if parameter.ndim >= 2 and parameter.any()]
    assert [place.name for place in found.scaled] == matrices
    reasons = {tensor.name: tensor.reason for tensor in found.excluded}
    assert reasons == {n: "vector" if p.any() else "zero" for n, p in model.named_parameters() if n not in matrices}
    assert found.gradient == find_tensors(model).gradient


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("resnet", "mlp")])
def test_depth_is_the_position_of_the_block(name):
    model = case(name).model
    blocks = [n for n, module in model.named_modules() if re.fullmatch(r"\w+Layer|GPT2Block", type(module).__name__)]
    assert len(blocks) >= 2
    depths = depths_of(model)
    of_block = [{depths[t] for t in depths if t.startswith(f"{block}.")} for block in blocks]
    assert all(len(found) == 1 for found in of_block), of_block
    in_order = [found.pop() for found in of_block]
    assert in_order == sorted(set(in_order))
    first, last = (next(i for i, t in enumerate(depths) if t.startswith(f"{b}.")) for b in (blocks[0], blocks[-1]))
    values = list(depths.values())
    assert set(values[:first]) == {0}
    assert min(values[last:]) == in_order[-1] < values[-1]


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_depth_grows_through_a_convolutional_or_plain_network(name):
    depths = list(depths_of(case(name).model).values())
    assert depths == sorted(depths)
    assert len(set(depths)) >= 4


def test_frozen_and_unused_tensors_are_reported_and_left_alone():
    made = case("dinov2")
    unused = nn.Linear(16, 16)
    made.model.dinov2.unused = unused
    frozen = made.model.dinov2.encoder.layer[0].mlp.fc1.weight.requires_grad_(False)
    with torch.no_grad():
        made.model.dinov2.embeddings.mask_token.fill_(0.1)
    before = [tensor.detach().clone() for tensor in (unused.weight, unused.bias, frozen)]
    result = initialize(
        made.model, batches_of("dinov2", 2), made.loss_fn, NIOConfig(**PER_TENSOR, iterations=1, report_batches=1)
    )
    reasons = {tensor.name: tensor.reason for tensor in result.excluded}
    assert reasons["dinov2.encoder.layer.0.mlp.fc1.weight"] == "frozen"
    for name in ("unused.weight", "unused.bias", "embeddings.mask_token"):
        assert reasons[f"dinov2.{name}"] == "unused"
    assert not reasons.keys() & result.scales.keys()
    assert reasons.keys() | result.scales.keys() == {name for name, _ in made.model.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(before, (unused.weight, unused.bias, frozen), strict=True))


class Experts(nn.Module):
    """Experts of which each sample goes to one, as its first entry says."""

    def __init__(self, number):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(number)])
        self.head = nn.Linear(4, 3)

    def forward(self, inputs):
        places = inputs[:, 0].long()
        out = inputs.clone()
        for number, expert in enumerate(self.experts):
            own = (places == number).nonzero().flatten()
            if len(own):
                out = out.index_add(0, own, expert(inputs[own]))
        return self.head(out)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_tensor_is_used_where_any_sample_reaches_it(micro_batch_size):
    torch.manual_seed(0)
    model, inputs = Experts(6), torch.randn(16, 4)
    # The first two samples go to expert 0, one of the second batch to expert 4, and none to expert 5.
    inputs[:, 0] = torch.tensor([0, 0, 1, 2] + [0] * 4 + [0, 3, 4, 0] + [0] * 4)
    labels = torch.arange(16) % 3
    batches = [(inputs[part], labels[part]) for part in (slice(0, 8), slice(8, 16))]
    config = NIOConfig(sub_batches=2, report_batches=2, micro_batch_size=micro_batch_size, loss_bound=None)
    result = initialize(model, batches, zoo.vector_loss, config)
    unused = {tensor.name for tensor in result.excluded if tensor.reason == "unused"}
    assert unused == {"experts.5.weight", "experts.5.bias"}
    assert result.status == "changed"
    assert len({result.scales[f"experts.{number}.weight"] for number in range(5)}) == 1


def test_frozen_tensors_may_be_in_half_precision():
    model = case("mlp").model
    model[0].requires_grad_(False).half()
    assert len(find_tensors(model).trainable) == 6


class TwoScalars(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return self.a + self.b * x


def test_a_model_of_two_scalars_is_told_to_scale_all_tensors():
    def loss_fn(model, batch):
        return (model(batch) - 1).square().mean()

    batches = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    with pytest.raises(ModelError, match=r'\(2 vector\)\. Set NIOConfig\.scaled_tensors to "all"'):
        initialize(TwoScalars(), batches, loss_fn)
    assert set(initialize(TwoScalars(), batches, loss_fn, NIOConfig(scaled_tensors="all")).scales) == {"a", "b"}


def test_a_large_part_that_is_not_used_is_no_unknown_layer():
    made = case("mlp")
    made.model.auxiliary = nn.Linear(6, 500)
    result = initialize(made.model, batches_of("mlp", 6), lambda model, batch: made.loss_fn(model[:-1], batch))
    assert list(result.scales) == ["0.weight", "4.weight", "6.weight"]
    assert {t.name for t in result.excluded if t.reason == "unused"} == {"auxiliary.weight", "auxiliary.bias"}


@pytest.mark.parametrize("search", ["balance", "published"])
def test_a_table_with_sparse_gradients_is_scaled_as_any_other(search):
    class Bag(nn.Module):
        def __init__(self, *, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(9, 4, sparse=sparse)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1).tanh())

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(9, (8, 5), generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(6)
    ]
    config = NIOConfig(search=search, iterations=2, report_batches=2, sub_batches=2)
    expected, found = (initialize(Bag(sparse=sparse), batches, loss_fn, config) for sparse in (False, True))
    assert found.scales == pytest.approx(expected.scales, rel=1e-4)
    assert found.before.value == pytest.approx(expected.before.value, rel=1e-5)
