"""NIO as a method: what both of its searches tell, cost and say of themselves."""

import pytest

from nio_hf import NIOConfig, initialize
from nio_hf.core import NIO, expected_cost
from nio_hf.errors import ConfigError
from tests.core.cases import batches_of, case

SEARCHES = {
    # A bound that refuses at least once.
    "balance": {"least_norm": 1.0, "loss_bound": 0.01},
    "published": {"search": "published", "groups": "tensor", "scaled_tensors": "all", "iterations": 5, "lr": 0.05},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_tried_is_told_before_and_what_came_of_it_after(name):
    made, told, seen = case("mlp"), [], []
    config = NIOConfig(sub_batches=2, report_batches=2, **SEARCHES[name])
    result = initialize(
        made.model,
        batches_of("mlp", 7),
        made.loss_fn,
        config,
        on_trial=told.append,
        on_iteration=lambda record: seen.append((len(told), record)),
    )
    assert len(seen) > 1
    assert told == [record.tried for record in result.history]
    assert [record for _, record in seen] == list(result.history)
    assert [count for count, _ in seen] == [record.iteration for record in result.history]
    assert [record.iteration for record in result.history] == list(range(1, len(result.history) + 1))
    assert all(record.grad_cosine is not None and record.objective is None for record in result.history)
    # Computed scales are measured once, where they are tried.
    reports = 2 if name == "balance" else 4
    assert result.cost == pytest.approx(sum(record.cost for record in result.history) + reports)
    assert result.cost <= expected_cost(config, len(result.groups))


def test_nio_takes_what_its_search_needs_and_has_no_options():
    assert NIO.batches(NIOConfig(), {}) == 0
    assert NIO.batches(NIOConfig(search="published", iterations=11), {}) == 11
    with pytest.raises(ConfigError, match=r"nio\.rate: is no option of nio\. Leave it out: it has none of its own"):
        NIO.checked({"rate": 3})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": "model"}, "multiplied the weights by scales, one scalar (omega) for all of them, computed, "),
        ({}, "one scalar (omega) for additive tensors and one for all others, computed, so that layers keep"),
        ({"groups": {"a": "b"}}, "one scalar (omega) for each group, computed"),
        ({}, "as large as what they are added to, under bounds on loss and gradient norm."),
        ({"least_norm": None}, "added to, under a bound on loss."),
        ({"loss_bound": None}, "added to, under a bound on gradient norm."),
        ({"least_norm": None, "loss_bound": None}, "as large as what they are added to."),
        ({"search": "published", "groups": "tensor"}, "one scalar (omega) each, learned by the published algorithm"),
        ({"search": "published"}, "agree (GradCosine)."),
        ({"search": "published", "gamma": 1.0}, "agree (GradCosine), under a bound on gradient norm."),
    ],
)
def test_the_description_follows_the_settings(settings, words):
    assert words in NIO.describe(NIOConfig(**settings))
