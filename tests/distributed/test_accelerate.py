"""NIO in a training loop with accelerate, on two processes: the documented way, and what is refused."""

import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from nio_hf import NIOConfig, initialize
from nio_hf.core import Collective
from nio_hf.errors import ConfigError, NumericsError
from tests.core.cases import batches_of, case, differences, state
from tests.distributed.ranks import run_ranks

PAGE = (Path(__file__).parents[2] / "docs" / "own-loop.md").read_text(encoding="utf-8")
CONFIG = NIOConfig(report_batches=2)
SAMPLES = 12


def _documented_loop(code):
    """Run the example of the documentation, and train by it; the weights after each."""
    # As `accelerate launch --cpu` does.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    accelerator, model, optimizer = (names[name] for name in ("accelerator", "model", "optimizer"))
    initialised = _weights(accelerator.unwrap_model(model))
    for batch in names["loader"]:
        optimizer.zero_grad()
        accelerator.backward(names["loss_fn"](model, batch))
        optimizer.step()
    trained = _weights(accelerator.unwrap_model(model))
    return {
        "processes": accelerator.num_processes,
        "initialised": initialised,
        "trained": trained,
        "steps": len(names["loader"]),
    }


def _weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()


def _loop_of_the_page():
    """The definitions of the example for any torch module, and the loop that goes on from them."""
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (number,) = (number for number, example in enumerate(examples) if "Collective.current()" in example)
    return examples[number - 1].split("print(")[0] + examples[number]


def test_the_documented_loop_leaves_the_same_weights_on_both_processes():
    code = _loop_of_the_page()
    assert "initialize(model, batches, loss_fn, collective=Collective.current())" in code
    untouched = re.sub(r"^initialize\(.*\n", "", code, flags=re.MULTILINE)
    (alone,), (start,) = run_ranks(1, _documented_loop, code), run_ranks(1, _documented_loop, untouched)
    found = run_ranks(2, _documented_loop, code)
    assert [report["processes"] for report in found] == [2, 2]
    assert [report["steps"] for report in found] == [alone["steps"] / 2] * 2
    for name in ("initialised", "trained"):
        assert found[0][name] == found[1][name]
    assert found[0]["initialised"] == pytest.approx(alone["initialised"], rel=1e-5, abs=1e-7)
    assert found[0]["initialised"] != start["initialised"]
    assert found[0]["trained"] != found[0]["initialised"]


def _initialise(prepared, guarded):
    """Initialise with what accelerate has prepared, and leave the model as it was where that is refused."""
    accelerator = Accelerator(cpu=True)
    made = case("mlp", SAMPLES)
    columns = zip(*batches_of("mlp", 8, SAMPLES), strict=True)
    loader = DataLoader(TensorDataset(*(torch.cat(column) for column in columns)), batch_size=SAMPLES)
    model = made.model
    if prepared in ("loader", "both"):
        loader = accelerator.prepare(loader)
    if prepared in ("model", "both"):
        model = accelerator.prepare(model)
        assert isinstance(model, DistributedDataParallel)
    before = state(made.model)
    collective = {"collective": Collective.current()} if guarded else {}
    try:
        initialize(model, loader, made.loss_fn, CONFIG, **collective)
    except Exception:
        assert not differences(before, state(made.model))
        raise
    return _weights(made.model)


@pytest.mark.parametrize("prepared", ["loader", "both"])
def test_a_loader_that_gives_each_process_other_batches_is_refused(prepared):
    for error in run_ranks(2, _initialise, prepared, True, seconds=30):
        assert isinstance(error, NumericsError)
        assert str(error) == (
            "the report batches: not the same on rank 0 and rank 1. Give all processes the same batches: a loader in a "
            "fixed order that neither accelerate.prepare nor a distributed sampler has split."
        )


@pytest.mark.parametrize("prepared", ["nothing", "both"])
def test_a_call_that_does_not_say_who_takes_part_is_refused_with_the_remedy(prepared):
    for error in run_ranks(2, _initialise, prepared, False, seconds=20):
        assert isinstance(error, ConfigError)
        assert str(error) == (
            "collective: not given, with torch.distributed in use by 2 processes. Call initialize on all of them with "
            "collective=Collective.current(), the same weights and the same batches, or on one of them with "
            "collective=Collective() and broadcast the weights."
        )


def test_a_model_that_is_prepared_already_is_initialised_inside_of_its_wrapper():
    (expected,) = run_ranks(1, _initialise, "nothing", True)
    found = run_ranks(2, _initialise, "model", True)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(expected, rel=1e-5, abs=1e-7)
