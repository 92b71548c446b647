"""NIO as a method: what both of its searches tell, cost and say of themselves."""

import pytest

from nio_hf import NIOConfig, initialize
from nio_hf.core import NIO, expected_cost
from nio_hf.errors import ConfigError, StoppedError
from tests.core.cases import PER_TENSOR, batches_of, case, unchanged

CONFIGS = {
    # Bounds that refuse at least once.
    "balance": NIOConfig(sub_batches=2, report_batches=2, least_norm=1.0, loss_bound=0.01),
    "published": NIOConfig(sub_batches=2, report_batches=2, **PER_TENSOR, iterations=5, lr=0.05),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_tried_is_told_before_and_what_came_of_it_after(name):
    made, told, seen, config = case("mlp"), [], [], CONFIGS[name]
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
    assert seen == list(enumerate(result.history, 1))
    assert all(number == record.iteration for number, record in seen)
    assert all(record.grad_cosine is not None and record.objective is None for record in result.history)
    # Computed scales are measured once, where they are tried.
    reports = 2 if name == "balance" else 4
    assert result.cost == pytest.approx(sum(record.cost for record in result.history) + reports)
    assert result.cost <= expected_cost(config, len(result.groups))


@pytest.mark.parametrize(("name", "after"), [("balance", 0), ("balance", 1), ("published", 0), ("published", 3)])
def test_a_run_that_is_stopped_leaves_the_model_as_it_was(name, after):
    made, seen = case("mlp"), []
    task = (made.model, batches_of("mlp", 7), made.loss_fn, CONFIGS[name])
    with unchanged(made.model), pytest.raises(StoppedError, match=r"NIO: stopped before it was through\. Start again"):
        initialize(*task, on_iteration=seen.append, should_stop=lambda: len(seen) == after)
    assert len(seen) == after


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
