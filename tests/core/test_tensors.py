"""Which tensors are scaled, which the gradient is of, and what is said of the others."""

import contextlib
import itertools
import re

import pytest
import torch
from torch import nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import find_tensors
from nio_hf.core.tensors import copied_values, set_scales
from nio_hf.errors import ConfigError, ModelError
from tests.core.cases import FAMILIES, PER_TENSOR, batches_of, case
from tests.versions import VALUES

BLOCKS = {
    "vit": "ViTLayer",
    "deit": "DeiTLayer",
    "beit": "BeitLayer",
    "dinov2": "Dinov2Layer",
    "swin": "SwinLayer",
    "swinv2": "Swinv2Layer",
    "convnext": "ConvNextLayer",
    "gpt2": "GPT2Block",
    "bert": "BertLayer",
}


def ones(tensors):
    return [1.0] * len(tensors.scaled)


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


@pytest.mark.parametrize("groups", ["model", "additive", "tensor", {"values": VALUES, "positions": "position"}])
def test_groups_are_a_partition_of_the_scaled_tensors(groups):
    found = find_tensors(case("vit").model, "weights", groups)
    positions = [position for members in found.groups.values() for position in members]
    assert sorted(positions) == list(range(len(found.scaled)))
    by_group = [float(number) for number in range(2, 2 + len(found.groups))]
    omega = found.by_tensor(by_group)
    for tensor, value in zip(found.report(omega), omega, strict=True):
        assert (tensor.omega, by_group[list(found.groups).index(tensor.group)]) == (value, value)
    if groups == "tensor":
        assert list(found.groups) == [place.name for place in found.scaled]


def test_a_mapping_decides_what_is_scaled():
    model = case("vit").model
    found = find_tensors(model, "weights", {"values": VALUES, "norms": r"layernorm_before\.weight"})
    assert set(found.groups) == {"values", "norms"}
    names = [place.name for place in found.scaled]
    assert names == [n for n, p in model.named_parameters() if re.search(rf"{VALUES}\.weight|norm_before\.weight", n)]
    reasons = {tensor.name: tensor.reason for tensor in found.excluded}
    matrices = [n for n, p in model.named_parameters() if p.ndim >= 2 and p.any()]
    assert {reasons[name] for name in matrices if name not in names} == {"no group"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"decoder": "decoder"}, r'NIOConfig\.groups\["decoder"\]: .decoder. matches no parameter'),
        ({"values": VALUES, "all": "attention"}, r'groups\["all"\]: claims .*, as the group "values" does'),
        ({"biases": r"classifier\.bias"}, r"matches only tensors that cannot be scaled: classifier\.bias \(zero\)"),
        ({}, "an empty mapping"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        find_tensors(case("vit").model, groups=groups)


@pytest.mark.parametrize("name", BLOCKS)
def test_depth_is_the_position_of_the_block(name):
    model = case(name).model
    modules = dict(model.named_modules())
    blocks = [module_name for module_name, module in modules.items() if type(module).__name__ == BLOCKS[name]]
    assert len(blocks) >= 2
    tensors = find_tensors(model)
    depths = {tensor.name: tensor.depth for tensor in tensors.report(ones(tensors))}
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
    tensors = find_tensors(case(name).model)
    depths = [tensor.depth for tensor in tensors.report(ones(tensors))]
    assert depths == sorted(depths)
    assert len(set(depths)) >= 4


def test_zero_tokens_are_left_out_with_the_reason():
    excluded = {tensor.name: tensor for tensor in find_tensors(case("deit").model).excluded}
    for token in ("cls_token", "distillation_token", "position_embeddings"):
        found = excluded[f"deit.embeddings.{token}"]
        assert (found.reason, found.kind) == ("zero", "additive")


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_tied_tensors_are_scaled_once(name):
    made = case(name)
    embedding, head = made.model.get_input_embeddings().weight, made.model.get_output_embeddings().weight
    assert embedding is head
    tensors = find_tensors(made.model)
    assert sum(parameter is embedding for parameter in tensors.scaled_parameters) == 1
    assert sum(parameter is embedding for parameter in tensors.gradient_parameters) == 1
    before = embedding.detach().clone()
    with copied_values(tensors) as initial:
        set_scales(tensors, initial, [2.0] * len(initial))
        assert torch.equal(embedding, 2 * before)
        assert head.data_ptr() == embedding.data_ptr()
        set_scales(tensors, initial, [0.5] * len(initial))
        values = [parameter.data for parameter in tensors.scaled_parameters]
    assert torch.equal(embedding, before)
    torch._foreach_copy_([parameter.data for parameter in tensors.scaled_parameters], [4 * value for value in values])
    assert torch.equal(embedding, 2 * before)


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

    def loss_fn(own, batch):
        return nn.functional.cross_entropy(own(batch[0]), batch[1])

    batches = [(inputs[part], labels[part]) for part in (slice(0, 8), slice(8, 16))]
    config = NIOConfig(sub_batches=2, report_batches=2, micro_batch_size=micro_batch_size, loss_bound=None)
    result = initialize(model, batches, loss_fn, config)
    assert {tensor.name for tensor in result.excluded if tensor.reason == "unused"} == {
        "experts.5.weight",
        "experts.5.bias",
    }
    assert result.status == "changed"
    assert len({result.scales[f"experts.{number}.weight"] for number in range(5)}) == 1


def test_parameters_hold_copies_until_the_originals_return():
    model = case("mlp").model
    tensors = find_tensors(model, "weights")
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    values = [parameter.detach().clone() for parameter in model.parameters()]
    with contextlib.suppress(KeyboardInterrupt), copied_values(tensors) as initial:
        for parameter in model.parameters():
            parameter.data.zero_()
        assert len(initial) == 3
        assert all(tensor.any() for tensor in initial)
        raise KeyboardInterrupt
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["meta", "half", "bfloat16", "frozen", "zero"])
def test_models_that_cannot_be_initialised_are_refused(kind):
    model = case("vit").model
    message = {
        "meta": r"vit\.embeddings\.cls_token: on the meta device.*\n.* such tensors",
        "half": r"vit\.embeddings\.cls_token: dtype torch\.float16\. Load the model with dtype=torch\.float32",
        "bfloat16": r"dtype torch\.bfloat16",
        "frozen": r"ViTForImageClassification: no parameter requires a gradient. Unfreeze",
        "zero": r"ViTForImageClassification: no tensor can be scaled \(40 zero\)",
    }[kind]
    match kind:
        case "meta":
            model = model.to("meta")
        case "half":
            model = model.half()
        case "bfloat16":
            model = model.bfloat16()
        case "frozen":
            model.requires_grad_(False)
        case "zero":
            torch._foreach_zero_([parameter.data for parameter in model.parameters()])
    with pytest.raises(ModelError, match=message):
        find_tensors(model)


def test_frozen_tensors_may_be_in_half_precision():
    model = case("mlp").model
    model[0].requires_grad_(False).half()
    assert len(find_tensors(model).trainable) == 6


class TwoScalars(nn.Module):
    """y = a + b x."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return self.a + self.b * x


def test_a_model_of_two_scalars_is_told_to_scale_all_tensors():
    with pytest.raises(ModelError, match=r'\(2 vector\)\. Set NIOConfig\.scaled_tensors to "all"'):
        find_tensors(TwoScalars(), "weights")
    assert [place.name for place in find_tensors(TwoScalars(), "all").scaled] == ["a", "b"]

    def loss_fn(model, batch):
        return (model(batch) - 1).square().mean()

    batches = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    with pytest.raises(ModelError, match=r'Set NIOConfig\.scaled_tensors to "all"'):
        initialize(TwoScalars(), batches, loss_fn)
    assert set(initialize(TwoScalars(), batches, loss_fn, NIOConfig(scaled_tensors="all")).scales) == {"a", "b"}


def test_a_second_look_leaves_out_what_no_gradient_reaches():
    model = case("mlp").model
    found = find_tensors(model, "weights", "tensor", unused=["4.weight", "4.bias"])
    assert [place.name for place in found.scaled] == ["0.weight", "6.weight"]
    assert found.groups == {"0.weight": (0,), "6.weight": (1,)}
    assert [place.name for place in found.trainable] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "6.weight",
        "6.bias",
    ]
    assert {tensor.name for tensor in found.excluded if tensor.reason == "unused"} == {"4.weight", "4.bias"}


def test_a_large_part_that_is_not_used_is_no_unknown_layer():
    made = case("mlp")
    made.model.auxiliary = nn.Linear(6, 500)

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model[:-1](batch[0]), batch[1])

    result = initialize(made.model, batches_of("mlp", 6), loss_fn)
    assert list(result.scales) == ["0.weight", "4.weight", "6.weight"]
    assert {t.name for t in result.excluded if t.reason == "unused"} == {"auxiliary.weight", "auxiliary.bias"}


def test_a_table_with_sparse_gradients_is_scaled_as_any_other():
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
    results = {}
    for search, sparse in itertools.product(("balance", "published"), (False, True)):
        config = NIOConfig(search=search, iterations=2, report_batches=2, sub_batches=2)
        results[search, sparse] = initialize(Bag(sparse=sparse), batches, loss_fn, config)
    for search in ("balance", "published"):
        expected, found = results[search, False], results[search, True]
        assert found.scales == pytest.approx(expected.scales, rel=1e-4)
        assert found.before.value == pytest.approx(expected.before.value, rel=1e-5)
