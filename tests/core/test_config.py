"""Settings are checked together."""

import copy
import dataclasses
import json
import math
import pickle

import pytest

from nio_hf import NIOConfig
from nio_hf.core.config import REPLACED, refuse_replaced
from nio_hf.errors import ConfigError

RANGES = [(2.0, 1.0), (1.5, 2.0), (0.1, 0.9), (0.0, 2.0), (-1.0, 2.0), (1.0,), (0.5, 1.0, 2.0), 3.0, (math.nan, 2.0)]


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("iterations", [0, -1, 1.5, True, "3", None], [1]),
        ("sub_batches", [1, 0, 2.0], [2]),
        ("report_batches", [0], [1]),
        ("lr", [0.0, -1.0, math.nan, math.inf, "0.1", None], [1e-9]),
        ("strength", [0.0, -0.5, math.nan, math.inf, "1", None], [0.5, 1, 2.0]),
        ("loss_bound", [0.0, -0.1, math.nan, math.inf], [None, 0.01]),
        ("least_norm", [0.0, -0.1, 1.01, math.nan, "0.5", (0.5, 1.0)], [None, 1, 0.01]),
        ("scale_range", [None, (1.0, math.inf), *RANGES], [(0.01, 100.0), (1.0, 1.0), (1, 2)]),
        ("objective", ["auto", "balance", "gc_norm", "gc_sign", "variance", None], ["gc", "gc_sum_norm"]),
        ("search", ["scan", "gradient", None], ["balance", "published"]),
        ("groups", ["kind", None, 3], ["additive", "model", {"attention": "attn"}]),
        ("scaled_tensors", ["matrices", None], ["all", "weights"]),
        ("curvature", ["fast", "exact_kept", None], ["auto", "exact", "finite_difference"]),
        ("precision", ["fp16", None], ["fp32", "bf16"]),
        ("micro_batch_size", [0, 2.5], [None, 1]),
        ("seed", [-1, 0.5, True], [0]),
    ],
)
def test_values_out_of_range_are_refused_with_their_name(name, bad, good):
    for value in good:
        assert getattr(NIOConfig(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=rf"NIOConfig\.{name}: ") as caught:
            NIOConfig(**{name: value})
        assert len(caught.value.problems) == 1, value


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("gamma", [0.0, -3.0, math.nan, math.inf], [None, 0.5]),
        ("overlap", [-0.1, 1.0, 1, math.nan, "0"], [0, 0.0, 0.99]),
        ("groups", ["kind"], ["additive", "model", "tensor"]),
    ],
)
def test_the_settings_of_the_published_search(name, bad, good):
    for value in good:
        assert getattr(NIOConfig(search="published", **{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=rf"NIOConfig\.{name}: .*[Gg]ive a "):
            NIOConfig(search="published", **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 5.0}, r"NIOConfig\.gamma: 5\.0\. Leave it out, or set NIOConfig\.search to \"published\""),
        ({"overlap": 0.2}, r"NIOConfig\.overlap: 0\.2\. Leave it out, or set"),
        ({"precision": "bf16", "curvature": "finite_difference"}, "bfloat16 rounds away the difference"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        NIOConfig(**settings)
    assert len(caught.value.problems) == 1


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        NIOConfig(search="published", iterations=0, overlap=1.0, lr=-1.0)
    assert {problem.where for problem in caught.value.problems} == {
        "NIOConfig.iterations",
        "NIOConfig.overlap",
        "NIOConfig.lr",
    }
    message = str(caught.value)
    assert message.startswith("3 problems:\n  1. ")
    assert "NIOConfig.overlap: 1.0. Give a number in [0, 1)." in message


@pytest.mark.parametrize("name", REPLACED)
def test_former_settings_name_what_replaces_them(name):
    with pytest.raises(ConfigError) as caught:
        NIOConfig(**{name: "anything"})
    (problem,) = caught.value.problems
    assert (problem.where, problem.fix) == (f"NIOConfig.{name}", REPLACED[name])
    named = [field.name for field in dataclasses.fields(NIOConfig) if f"NIOConfig.{field.name}" in problem.fix]
    assert named or problem.fix.startswith("Leave it out: ")


def test_former_settings_are_named_together_and_as_they_were_given():
    with pytest.raises(ConfigError, match="2 problems"):
        NIOConfig(min_scale=0.5, scale_sharing="model")
    with pytest.raises(ConfigError) as caught:
        refuse_replaced({"nio_norm_band": None, "beta": 0.9, "nio_seed": 3}, "nio_")
    (problem,) = caught.value.problems
    said = "Set nio_least_norm, or nio_gamma where nio_search is published"
    assert (problem.where, problem.fix) == ("nio_norm_band", said)
    refuse_replaced({"nio_seed": 3, "min_scale": 3}, "nio_")


def test_a_setting_that_never_was_is_a_type_error():
    with pytest.raises(TypeError, match="unknown_setting"):
        NIOConfig(unknown_setting=1)


def test_the_published_settings_are_those_of_the_paper_but_for_what_is_changed():
    config = NIOConfig.published(seed=3, overlap=0.0)
    assert (config.search, config.groups, config.scaled_tensors) == ("published", "tensor", "all")
    assert (config.objective, config.sub_batches, config.gamma, config.overlap) == ("gc_sum_norm", 4, 10.0, 0.0)
    assert (config.iterations, config.lr, config.scale_range[0], config.seed) == (100, 0.003, 0.01, 3)
    assert NIOConfig.published().overlap == 0.2
    assert (config.batches, NIOConfig().batches) == (100, 0)


@pytest.mark.parametrize("config", [NIOConfig(groups={"a": "b"}, least_norm=None), NIOConfig.published()])
def test_settings_survive_copies_and_json(config):
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config
    assert NIOConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
