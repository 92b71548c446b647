"""Kinds of tensors in models of every family, and the groups of tensors that share a scale."""

import collections
import re

import pytest
import torch
import transformers
from torch import nn

from nio_hf.core.groups import group_tensors, kinds_of
from nio_hf.errors import ConfigError
from tests import zoo
from tests.core.cases import unchanged

# The kind of what is no weight of a normalisation, by the first expression that is found in its name.
KINDS = {
    "bias": r"\bbias$",
    "vector": r"lambda|layer_scale|logit_scale|class_embedding",
    "additive": r"(cls|mask|distillation)_token|position_embedding|token_type|wpe|bias_table",
    "transition": "downsampl",
    "head": r"^(classifier|lm_head|cls|visual_projection|text_projection)\.|pooler",
    "input": "embed|wte",
    "trunk": r"\.\d\.",
}
DECODER = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OTHERS = {
    "resnet_bottleneck": ("ResNetForImageClassification", {**zoo.CONVOLUTIONAL, "embedding_size": 8}),
    "convnextv2": ("ConvNextV2ForImageClassification", {**zoo.CONVOLUTIONAL, "num_stages": 2}),
    "bert_classifier": ("BertForSequenceClassification", zoo.TEXT["bert"][1]),
    "llama": ("LlamaForCausalLM", DECODER),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_key_value_heads": 2, "num_local_experts": 4}),
    "clip": ("CLIPModel", {"text_config": DECODER, "vision_config": zoo.VIT}),
}
FAMILIES = [*zoo.VISION, *zoo.TEXT, *OTHERS]


def model_of(name, **changes):
    if name in zoo.VISION:
        return zoo.vision_model(name, **changes)
    if name in zoo.TEXT:
        return zoo.text_model(name, **changes)
    class_name, config = OTHERS[name]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**{**config, **changes}))


def names_by_kind(model):
    names = collections.defaultdict(set)
    for name, kind in kinds_of(model).items():
        names[kind].add(name)
    return dict(names)


def matches(expression, model):
    return {name for name, _ in model.named_parameters() if re.fullmatch(expression, name)}


def weights_by_kind(model):
    return {kind: names for kind, names in names_by_kind(model).items() if kind not in ("norm", "bias")}


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in FAMILIES), ("vit", {"num_hidden_layers": 1}), ("llama", {"num_hidden_layers": 1})],
)
def test_kinds_of_the_families(name, changes):
    model = model_of(name, **changes)
    norms = {
        f"{place}.weight"
        for place, module in model.named_modules()
        if re.search("Norm|GRN", type(module).__name__) and getattr(module, "weight", None) is not None
    }
    assert norms

    def expected(tensor):
        return "norm" if tensor in norms else next(kind for kind in KINDS if re.search(KINDS[kind], tensor))

    assert kinds_of(model) == {tensor: expected(tensor) for tensor, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["vit", "gpt2", "swin"])
def test_kinds_keep_in_a_wrapped_model(name):
    model = model_of(name)
    kinds = kinds_of(model)
    wrapped = nn.Module()
    wrapped.module = model
    assert kinds_of(wrapped) == {f"module.{tensor}": kind for tensor, kind in kinds.items()}
    with_loss = nn.Sequential(model, nn.Module(), nn.Linear(5, 5))
    assert kinds_of(with_loss) == {
        **{f"0.{tensor}": kind for tensor, kind in kinds.items()},
        "2.weight": "head",
        "2.bias": "bias",
    }


def test_a_body_without_a_head_has_none():
    model = transformers.ViTModel(transformers.ViTConfig(**zoo.VIT), add_pooling_layer=False)
    assert set(names_by_kind(model)) == {"input", "additive", "trunk", "norm", "bias"}


def test_an_mlp_begins_with_its_input_and_ends_with_its_head():
    weights = {"0.weight": "input", "1.weight": "norm", "4.weight": "trunk", "6.weight": "head"}
    assert kinds_of(zoo.mlp()) == {**weights, **{f"{place}.bias": "bias" for place in (0, 1, 4, 6)}}
    assert kinds_of(nn.Linear(3, 2)) == {"weight": "input", "bias": "bias"}


class Mlp(nn.Sequential):
    def __init__(self, width, out):
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, out))


class Head(nn.Module):
    """One attention head, as tutorials write it."""

    def __init__(self, width):
        super().__init__()
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)


class Block(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = nn.ModuleList([Head(width) for _ in range(heads)])
        self.project = nn.Linear(width, width, bias=False)
        self.norm = Scale(width)
        self.mix = nn.Linear(width, width)


class Scale(nn.Module):
    """A module of a user that owns one vector, neither a layer nor a normalisation."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))


class OwnModel(nn.Module):
    """A sequence classifier in plain torch, whose parts have names of their own."""

    def __init__(self, blocks=2, tied=False):
        super().__init__()
        self.place_table = nn.Parameter(torch.randn(9, 8))
        self.grid = nn.Parameter(torch.randn(3, 3, 8))
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))
        self.letters = nn.Embedding(7, 8)
        self.segments = nn.Embedding(50, 8)
        self.body = nn.Sequential(*[Block(8) for _ in range(blocks)])
        self.ending = nn.Sequential(nn.LayerNorm(8, bias=False), Mlp(8, 8))
        self.last = nn.Linear(8, 7, bias=False)
        if tied:
            self.last.weight = self.letters.weight


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_kinds_of_a_model_of_the_user(blocks, tied):
    """The token table is the first one, although another table is larger; a block holds lists of its own."""
    model = OwnModel(blocks, tied)
    last = set() if tied else {"last.weight"}
    assert names_by_kind(model) == {
        "input": {"letters.weight"},
        "additive": {"place_table", "grid", "segments.weight"},
        "trunk": matches(r"body\.\d\.(heads\.\d\.(key|query)|project|mix)\.weight", model),
        "head": {"ending.1.0.weight", "ending.1.2.weight", *last},
        "norm": {"ending.0.weight"},
        "bias": matches(r".*\.bias", model),
        "vector": {"temperature", *(f"body.{block}.norm.gain" for block in range(blocks))},
    }


def test_the_name_of_a_tied_table_does_not_matter():
    model = nn.Sequential(nn.Linear(8, 7, bias=False), nn.Linear(8, 8, bias=False), nn.Embedding(7, 8))
    model[0].weight = model[2].weight
    assert kinds_of(model) == {"0.weight": "input", "1.weight": "head"}


def test_embeddings_behind_a_convolution_are_positions():
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Embedding(9, 8), nn.Sequential(Block(8), Block(8)))
    assert weights_by_kind(model)["input"] == {"0.weight"}
    assert weights_by_kind(model)["additive"] == {"1.weight"}


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def test_stages_that_are_attributes_or_begin_with_a_block_of_another_class():
    class Wide(Residual):
        pass

    model = nn.Module()
    model.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    model.layer1 = nn.Sequential(Wide(4, 4), Residual(4, 4))
    model.between = nn.Conv2d(4, 8, 1, bias=False)
    model.layer2 = nn.Sequential(Wide(8, 8), Residual(8, 8), Residual(8, 8))
    model.classify = nn.Linear(8, 2, bias=False)
    assert weights_by_kind(model) == {
        "input": {"stem.0.weight", "stem.2.weight"},
        "trunk": matches(r"layer\d\.\d\.(first|second|downsample\.0)\.weight", model),
        "transition": {"between.weight"},
        "head": {"classify.weight"},
    }


def test_blocks_without_anything_before_them_hold_the_input():
    model = nn.Sequential(Mlp(6, 6), Mlp(6, 6), nn.Linear(6, 2))
    assert weights_by_kind(model) == {
        "input": {"0.0.weight"},
        "trunk": {"0.2.weight", "1.0.weight", "1.2.weight"},
        "head": {"2.weight"},
    }


def test_attention_and_recurrent_layers_of_torch():
    model = nn.Module()
    model.embed = nn.Linear(3, 8)
    model.body = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16), nn.TransformerEncoderLayer(8, 2, 16)])
    model.recurrent = nn.LSTM(8, 8)
    assert weights_by_kind(model) == {
        "input": {"embed.weight"},
        "trunk": matches(
            r"body\.\d\.(self_attn\.in_proj_weight|self_attn\.out_proj\.weight|linear[12]\.weight)", model
        ),
        "head": {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"},
    }
    assert names_by_kind(model)["bias"] == matches(r".*bias.*", model)


def test_two_lists_of_different_layers_are_no_blocks():
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    assert weights_by_kind(nn.Sequential(features, classifier)) == {
        "input": {"0.0.weight"},
        "trunk": {"0.2.weight", "1.1.weight"},
        "head": {"1.3.weight"},
    }


class Oddities(nn.Module):
    """A block with tensors whose kinds are easily mistaken."""

    def __init__(self):
        super().__init__()
        self.first, self.second = NormedLinear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.position_bias = nn.Parameter(torch.randn(2, 9, 9))
        self.grid = nn.Parameter(torch.randn(1, 3, 3, 8))
        self.channel_scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.slope = nn.PReLU(8)
        self.norm, self.own_norm = nn.RMSNorm((4, 8)), UserNorm(8)


class NormedLinear(nn.Linear):
    pass


class UserNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


def test_kinds_that_are_easily_mistaken():
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Sequential(Oddities()), nn.Linear(8, 2, bias=False))
    assert names_by_kind(model) == {
        "input": {"0.weight"},
        "additive": {"1.0.position_bias", "1.0.grid"},
        "trunk": {"1.0.first.weight", "1.0.second.weight", "1.0.experts"},
        "head": {"2.weight"},
        "vector": {"1.0.channel_scale", "1.0.slope.weight"},
        "norm": {"1.0.norm.weight", "1.0.own_norm.gamma"},
    }


def scalable_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.any()]


def with_kinds(model, names):
    kinds = kinds_of(model)
    return {name: kinds[name] for name in names}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("groups", ["model", "additive", "tensor", {"blocks": r"\.\d\.", "rest": r"^((?!\.\d\.).)*$"}])
def test_every_grouping_is_a_partition(name, groups):
    model = model_of(name)
    names = scalable_names(model)
    grouping = group_tensors(model, with_kinds(model, names[::-1]), groups)
    members = [member for group in grouping.values() for member in group]
    assert sorted(members) == sorted(names)
    assert all(group for group in grouping.values())
    for group in grouping.values():
        assert group == sorted(group, key=names.index)


def test_groups_of_the_model_and_of_a_tensor():
    model = zoo.mlp()
    names = ["0.weight", "1.weight", "4.weight", "4.bias", "6.weight", "6.bias"]
    assert group_tensors(model, with_kinds(model, names), "model") == {"model": names}
    assert group_tensors(model, with_kinds(model, names), "tensor") == {name: [name] for name in names}


def test_groups_of_a_mapping_keep_its_order_and_leave_the_other_tensors_out():
    model = zoo.mlp()
    names = ["6.weight", "0.weight", "4.weight", "1.weight"]
    grouping = group_tensors(model, with_kinds(model, names), {"late": "^[46].*weight", "early": "0.w"})
    assert list(grouping.items()) == [("late", ["4.weight", "6.weight"]), ("early", ["0.weight"])]


CHOICES = "Choose one of additive, model, tensor, or give a mapping {group: regular expression}"
EXPRESSION = 'Give a regular expression, e.g. "attention"'
NO_PATTERN = "is no regular expression: missing ), unterminated subpattern at position 2"
UNSCALABLE = "matches only tensors that cannot be scaled"
SCALABLE = "Match tensors that are trained, used and not all zero"
APART = "Change one of the two expressions, so that each tensor is in one group"


@pytest.mark.parametrize(
    ("groups", "where", "found", "fix"),
    [
        ("kind", "", "'kind'", CHOICES),
        (None, "", "None", CHOICES),
        (["model"], "", "['model']", CHOICES),
        ({}, "", "an empty mapping", "Give at least one {group: regular expression}"),
        ({"a": "0.(weight"}, '["a"]', f"'0.(weight' {NO_PATTERN}", EXPRESSION),
        ({"a": 3}, '["a"]', "3", EXPRESSION),
        ({"a": "attention"}, '["a"]', "'attention' matches no parameter", "Match names such as 0.weight"),
        ({"a": "0", "b": "bias"}, '["b"]', f"'bias' {UNSCALABLE}: 0.bias (frozen), 1.bias (zero) and 2 more", SCALABLE),
        ({"a": "6.bias"}, '["a"]', f"'6.bias' {UNSCALABLE}: 6.bias (left out or unused)", SCALABLE),
        ({"a": "4", "b": "[146].weight"}, '["b"]', 'claims 4.weight, as the group "a" does', APART),
        (
            {"a": "weight", "b": "[0146]"},
            '["b"]',
            'claims 0.weight, 1.weight and 2 more, as the group "a" does',
            APART,
        ),
    ],
)
def test_groups_that_cannot_work_are_refused(groups, where, found, fix):
    model = zoo.mlp()
    model[0].bias.requires_grad_(False)
    nn.init.zeros_(model[1].bias)
    names = ["0.weight", "1.weight", "4.weight", "6.weight"]
    with pytest.raises(ConfigError) as caught:
        group_tensors(model, with_kinds(model, names), groups)
    assert str(caught.value) == f"NIOConfig.groups{where}: {found}. {fix}."


def test_the_other_name_of_a_tied_tensor_is_explained():
    model = zoo.text_model("gpt2")
    with pytest.raises(ConfigError) as caught:
        group_tensors(model, with_kinds(model, scalable_names(model)), {"head": "lm_head"})
    assert str(caught.value) == (
        "NIOConfig.groups[\"head\"]: 'lm_head' matches no parameter. Match transformer.wte.weight instead, which "
        "lm_head.weight is tied to."
    )


def test_all_problems_of_a_mapping_are_reported_together():
    model = zoo.mlp()
    groups = {"a": "(", "b": "attention", "c": "weight", "d": "0.weight", "e": "[46].weight"}
    with pytest.raises(ConfigError) as caught:
        group_tensors(model, with_kinds(model, ["0.weight", "4.weight", "6.weight"]), groups)
    assert [(problem.where[-4:], problem.found) for problem in caught.value.problems] == [
        ('"a"]', "'(' is no regular expression: missing ), unterminated subpattern at position 0"),
        ('"b"]', "'attention' matches no parameter"),
        ('"d"]', 'claims 0.weight, as the group "c" does'),
        ('"e"]', 'claims 4.weight, 6.weight, as the group "c" does'),
    ]


def test_kinds_need_no_data_and_leave_the_model_alone():
    model = model_of("vit")
    with unchanged(model):
        kinds = kinds_of(model)
    with torch.device("meta"):
        assert kinds_of(model_of("vit")) == kinds


@pytest.mark.parametrize("name", ["vit", "swin", "gpt2", "bert", "mlp"])
def test_additive_sets_apart_what_is_added_to_activations(name):
    model = zoo.mlp() if name == "mlp" else model_of(name)
    kinds = kinds_of(model)
    apart = [tensor for tensor, kind in kinds.items() if kind == "additive"]
    others = [tensor for tensor, kind in kinds.items() if kind != "additive"]
    expected = {"additive": apart, "others": others} if apart else {"others": others}
    assert group_tensors(model, kinds, "additive") == expected
    assert bool(apart) == (name != "mlp")
