"""Several processes: the same weights on all, and those of one process alone."""

import pytest

from nio_hf.baselines import METHODS
from nio_hf.core import Collective, NIOConfig, initialize
from tests.baselines.homes import home
from tests.core.cases import batches_of, case
from tests.distributed.ranks import run_ranks


def _weights(name):
    model, method, config = home(name), METHODS[name], NIOConfig(report_batches=2, sub_batches=2)
    made = case(model)
    options = {"iterations": 3, "lr": 0.05} if "iterations" in method.options else {}
    task = (made.model, batches_of(model, 5), made.loss_fn, config)
    initialize(*task, method=method, options=options, collective=Collective.current())
    return [parameter.flatten().tolist() for parameter in made.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_the_same_weights(method):
    alone = _weights(method)
    first, second = run_ranks(2, _weights, method)
    assert first == second
    assert all(mine == pytest.approx(theirs, rel=1e-5) for mine, theirs in zip(alone, first, strict=True))
