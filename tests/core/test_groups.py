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

PATCHES = r"embeddings\.patch_embeddings\.projection\.weight"
TOKENS_AND_POSITIONS = r"embeddings\.(cls_token|mask_token|distillation_token|position_embeddings)"
VIT_BLOCK = r"layers?\.\d\.(attention\.[qkvo]_proj|mlp\.fc[12])\.weight"
BERT = {
    "input": r"bert\.embeddings\.word_embeddings\.weight",
    "additive": r"bert\.embeddings\.(position|token_type)_embeddings\.weight",
    "trunk": r"bert\.encoder\.layer\.\d\.(attention\.self\.(query|key|value)|(attention\.)?output\.dense"
    r"|intermediate\.dense)\.weight",
}
RESNET = {
    "input": r"resnet\.embedder\.embedder\.convolution\.weight",
    "trunk": r"resnet\.encoder\.stages\.\d\.layers\.\d\.(layer\.\d|shortcut)\.convolution\.weight",
    "head": r"classifier\.1\.weight",
}
CONVNEXT = {
    "input": r"convnext(v2)?\.embeddings\.patch_embeddings\.weight",
    "trunk": r"convnext(v2)?\.encoder\.stages\.\d\.layers\.\d\.(dwconv|pwconv[12])\.weight",
    "transition": r"convnext(v2)?\.encoder\.stages\.1\.downsampling_layer\.1\.weight",
    "head": r"classifier\.weight",
}
# For every family, the names of the tensors of each kind, without "norm" and "bias".
KINDS = {
    "vit": {
        "input": rf"vit\.{PATCHES}",
        "additive": rf"vit\.{TOKENS_AND_POSITIONS}",
        "trunk": rf"vit\.{VIT_BLOCK}",
        "head": r"classifier\.weight",
    },
    "deit": {
        "input": rf"deit\.{PATCHES}",
        "additive": rf"deit\.{TOKENS_AND_POSITIONS}",
        "trunk": rf"deit\.{VIT_BLOCK}",
        "head": r"classifier\.weight",
    },
    "beit": {
        "input": rf"beit\.{PATCHES}",
        "additive": rf"beit\.({TOKENS_AND_POSITIONS}|layers\.\d\.relative_position_bias\.relative_position_bias_table)",
        "trunk": rf"beit\.{VIT_BLOCK}",
        "head": r"classifier\.weight",
        "vector": r"beit\.layers\.\d\.lambda_[12]",
    },
    "dinov2": {
        "input": rf"dinov2\.{PATCHES}",
        "additive": rf"dinov2\.{TOKENS_AND_POSITIONS}",
        "trunk": r"dinov2\.encoder\.layer\.\d\.(attention|mlp)\..*\.weight",
        "head": r"classifier\.weight",
        "vector": r"dinov2\.encoder\.layer\.\d\.layer_scale[12]\.lambda1",
    },
    "swin": {
        "input": rf"swin\.{PATCHES}",
        "additive": r".*\.relative_position_bias_table",
        "trunk": r"swin\.encoder\.layers\.\d\.blocks\.\d\.(attention\.[qkvo]_proj|mlp\.fc[12])\.weight",
        "transition": r"swin\.encoder\.layers\.0\.downsample\.reduction\.weight",
        "head": r"classifier\.weight",
    },
    "swinv2": {
        "input": rf"swinv2\.{PATCHES}",
        "trunk": r"swinv2\.encoder\.layers\.\d\.blocks\.\d\..*(query|key|value|dense|position_bias_mlp\.\d)\.weight",
        "transition": r"swinv2\.encoder\.layers\.0\.downsample\.reduction\.weight",
        "head": r"classifier\.weight",
        "vector": r".*\.logit_scale",
    },
    "convnext": {**CONVNEXT, "vector": r".*\.layer_scale_parameter"},
    "convnextv2": CONVNEXT,
    "resnet": RESNET,
    "resnet_bottleneck": RESNET,
    "gpt2": {
        "input": r"transformer\.wte\.weight",
        "additive": r"transformer\.wpe\.weight",
        "trunk": r"transformer\.h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight",
    },
    "bert": {**BERT, "head": r"cls\.predictions\.transform\.dense\.weight"},
    "bert_classifier": {**BERT, "head": r"(bert\.pooler\.dense|classifier)\.weight"},
    "llama": {
        "input": r"model\.embed_tokens\.weight",
        "trunk": r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight",
        "head": r"lm_head\.weight",
    },
    "mixtral": {
        "input": r"model\.embed_tokens\.weight",
        "trunk": r"model\.layers\.\d\.((self_attn\.[qkvo]_proj|mlp\.gate)\.weight|mlp\.experts\.(gate_up|down)_proj)",
        "head": r"lm_head\.weight",
    },
    "clip": {
        "input": r"(text_model\.embeddings\.token_embedding|vision_model\.embeddings\.patch_embedding)\.weight",
        "additive": r"(text|vision)_model\.embeddings\.position_embedding\.weight",
        "trunk": r"(text|vision)_model\.encoder\.layers\.\d\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight",
        "head": r"(visual|text)_projection\.weight",
        "vector": r"logit_scale|vision_model\.embeddings\.class_embedding",
    },
}
DECODER = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def model_of(name):
    """A tiny model of a family in KINDS."""
    if name in zoo.VISION:
        return zoo.vision_model(name)
    if name in zoo.TEXT:
        return zoo.text_model(name)
    class_name, config = {
        "resnet_bottleneck": ("ResNetForImageClassification", {**zoo.CONVOLUTIONAL, "embedding_size": 8}),
        "convnextv2": ("ConvNextV2ForImageClassification", {**zoo.CONVOLUTIONAL, "num_stages": 2}),
        "bert_classifier": ("BertForSequenceClassification", zoo.TEXT["bert"][1]),
        "llama": ("LlamaForCausalLM", DECODER),
        "mixtral": ("MixtralForCausalLM", {**DECODER, "num_key_value_heads": 2, "num_local_experts": 4}),
        "clip": ("CLIPModel", {"text_config": DECODER, "vision_config": zoo.VIT}),
    }[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**config))
    return model


def names_by_kind(model):
    """Names of the tensors of each kind."""
    names = collections.defaultdict(set)
    for name, kind in kinds_of(model).items():
        names[kind].add(name)
    return dict(names)


def matches(expression, model):
    return {name for name, _ in model.named_parameters() if re.fullmatch(expression, name)}


def weights_by_kind(model):
    """As names_by_kind, without "norm" and "bias"."""
    return {kind: names for kind, names in names_by_kind(model).items() if kind not in ("norm", "bias")}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_the_families(name):
    model = model_of(name)
    assert weights_by_kind(model) == {kind: matches(expression, model) for kind, expression in KINDS[name].items()}


@pytest.mark.parametrize("name", KINDS)
def test_norms_and_biases_of_the_families(name):
    model = model_of(name)
    names = names_by_kind(model)
    norms = {
        f"{module_name}.weight"
        for module_name, module in model.named_modules()
        if re.search("Norm|GRN", type(module).__name__) and getattr(module, "weight", None) is not None
    }
    assert norms
    assert names["norm"] == norms
    assert names.get("bias", set()) == matches(r".*\bbias", model)
    assert ("bias" in names) == (name not in ("llama", "mixtral"))


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


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_kinds_of_a_model_with_one_block(name):
    one_layer = {"num_hidden_layers": 1}
    if name == "vit":
        model = zoo.vision_model("vit", **one_layer)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, **one_layer}))
    assert weights_by_kind(model) == {kind: matches(expression, model) for kind, expression in KINDS[name].items()}


def test_a_body_without_a_head_has_none():
    config = transformers.ViTConfig(**zoo.VIT)
    assert set(names_by_kind(transformers.ViTModel(config, add_pooling_layer=False))) == {
        "input",
        "additive",
        "trunk",
        "norm",
        "bias",
    }


def test_an_mlp_begins_with_its_input_and_ends_with_its_head():
    assert kinds_of(zoo.mlp()) == {
        "0.weight": "input",
        "0.bias": "bias",
        "1.weight": "norm",
        "1.bias": "bias",
        "4.weight": "trunk",
        "4.bias": "bias",
        "6.weight": "head",
        "6.bias": "bias",
    }
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
    model = nn.Module()
    model.patches = nn.Conv2d(3, 8, 4)
    model.places = nn.Embedding(9, 8)
    model.blocks = nn.Sequential(Block(8), Block(8))
    assert weights_by_kind(model)["input"] == {"patches.weight"}
    assert weights_by_kind(model)["additive"] == {"places.weight"}


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


@pytest.mark.parametrize("name", KINDS)
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


CHOICES = "Choose one of additive, model, tensor, or give a mapping {group: regular expression}."
EXPRESSION = 'Give a regular expression, e.g. "attention".'


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("kind", f"NIOConfig.groups: 'kind'. {CHOICES}"),
        (None, f"NIOConfig.groups: None. {CHOICES}"),
        (["model"], f"NIOConfig.groups: ['model']. {CHOICES}"),
        ({}, "NIOConfig.groups: an empty mapping. Give at least one {group: regular expression}."),
        (
            {"a": "0.(weight"},
            "NIOConfig.groups[\"a\"]: '0.(weight' is no regular expression: missing ), unterminated subpattern at "
            f"position 2. {EXPRESSION}",
        ),
        ({"a": 3}, f'NIOConfig.groups["a"]: 3. {EXPRESSION}'),
        (
            {"a": "attention"},
            "NIOConfig.groups[\"a\"]: 'attention' matches no parameter. Match names such as 0.weight.",
        ),
        (
            {"a": "0", "b": "bias"},
            "NIOConfig.groups[\"b\"]: 'bias' matches only tensors that cannot be scaled: 0.bias (frozen), 1.bias "
            "(zero) and 2 more. Match tensors that are trained, used and not all zero.",
        ),
        (
            {"a": "6.bias"},
            "NIOConfig.groups[\"a\"]: '6.bias' matches only tensors that cannot be scaled: 6.bias (left out or "
            "unused). Match tensors that are trained, used and not all zero.",
        ),
        (
            {"a": "4", "b": "[146].weight"},
            'NIOConfig.groups["b"]: claims 4.weight, as the group "a" does. Change one of the two expressions, so that '
            "each tensor is in one group.",
        ),
        (
            {"a": "weight", "b": "[0146]"},
            'NIOConfig.groups["b"]: claims 0.weight, 1.weight and 2 more, as the group "a" does. Change one of the two '
            "expressions, so that each tensor is in one group.",
        ),
    ],
)
def test_groups_that_cannot_work_are_refused(groups, message):
    model = zoo.mlp()
    model[0].bias.requires_grad_(False)
    nn.init.zeros_(model[1].bias)
    names = ["0.weight", "1.weight", "4.weight", "6.weight"]
    with pytest.raises(ConfigError) as caught:
        group_tensors(model, with_kinds(model, names), groups)
    assert str(caught.value) == message


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
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = kinds_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.device("meta"):
        assert kinds_of(model_of("vit")) == kinds


@pytest.mark.parametrize("name", ["vit", "swin", "gpt2", "bert", "mlp"])
def test_additive_sets_apart_what_is_added_to_activations(name):
    model = zoo.mlp() if name == "mlp" else (zoo.vision_model(name) if name in zoo.VISION else zoo.text_model(name))
    names = [parameter for parameter, _ in model.named_parameters()]
    kinds = kinds_of(model)
    apart = [parameter for parameter in names if kinds[parameter] == "additive"]
    others = [parameter for parameter in names if kinds[parameter] != "additive"]
    expected = {"additive": apart, "others": others} if apart else {"others": others}
    assert group_tensors(model, with_kinds(model, names), "additive") == expected
    assert bool(apart) == (name != "mlp")
