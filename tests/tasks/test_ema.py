"""Average of the weights of models whose tensors share memory."""

import types

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from nio_hf.errors import CheckpointError
from nio_hf.tasks.ema import EMA_NAME, EMACallback

DECAY = 0.75
STEPS = 3


TIES = ["parameter", "memory", "transposed memory", "memory as a buffer", "buffer"]


def tie(left, right, how):
    if how == "parameter":
        right.weight = left.weight
    elif how == "memory":
        right.weight.data = left.weight.data
    elif how == "transposed memory":
        right.weight.data = left.weight.data.T
    elif how == "memory as a buffer":
        del right.weight
        right.register_buffer("weight", left.weight.detach())
    else:
        left.register_buffer("count", torch.zeros(()))
        right.register_buffer("count", left.count)


def tied_model(how, seed=0):
    torch.manual_seed(seed)
    left, right = nn.Linear(4, 4), nn.Linear(4, 4)
    tie(left, right, how)
    integers = nn.ParameterList([nn.Parameter(torch.arange(3), requires_grad=False)])
    return nn.Sequential(left, nn.Tanh(), right, integers)


def run_of(callback, model, folder, step=0):
    """Train for some steps, each of which changes weights and buffers; give the weights of both layers after each."""
    args, state, control = TrainingArguments(output_dir=str(folder)), TrainerState(), TrainerControl()
    state.global_step = step
    callback.on_train_begin(args, state, control)
    for _ in range(STEPS):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(4, 4))
            for buffer in model.buffers():
                if buffer.ndim == 0:
                    buffer.add_(1)
        state.global_step += 1
        callback.on_step_end(args, state, control)
        yield copies(model)
    (folder / f"checkpoint-{state.global_step}").mkdir()
    callback.on_save(args, state, control)


def trainer_of(model, resumed_from=None):
    """Attributes of a Trainer that the callback reads."""
    return types.SimpleNamespace(unwrapped_model=model, resumed_from=resumed_from)


def copies(model):
    return [model[layer].weight.detach().clone() for layer in (0, 2)]


@pytest.mark.parametrize("how", TIES)
def test_tied_tensors_are_evaluated_at_their_average_and_come_back(how, tmp_path):
    model = tied_model(how)
    callback = EMACallback(trainer_of(model), DECAY)
    expected = copies(model)
    for weights in run_of(callback, model, tmp_path):
        expected = [DECAY * mean + (1 - DECAY) * weight for mean, weight in zip(expected, weights, strict=True)]
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with callback.swapped_in():
            for found, mean in zip(copies(model), expected, strict=True):
                torch.testing.assert_close(found, mean)
            for name, buffer in model.named_buffers():
                assert buffer.ndim or torch.equal(buffer, trained[name])
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize("how", TIES)
def test_the_average_of_tied_tensors_is_saved_and_restored(how, tmp_path):
    model, other = tied_model(how), tied_model(how, seed=1)
    saving = EMACallback(trainer_of(model), DECAY)
    restoring = EMACallback(trainer_of(other, resumed_from=tmp_path / f"checkpoint-{STEPS}"), DECAY)
    list(run_of(saving, model, tmp_path))
    next(run_of(restoring, other, tmp_path, step=STEPS))
    with saving.swapped_in(), restoring.swapped_in():
        expected, found = copies(model), copies(other)
    after = copies(other)
    for mean, restored, weight in zip(expected, found, after, strict=True):
        torch.testing.assert_close(restored, DECAY * mean + (1 - DECAY) * weight)


def test_an_average_of_other_parameters_is_refused(tmp_path):
    model = tied_model("parameter")
    safetensors.torch.save_file({"0.bias": torch.zeros(4), "2.bias": torch.zeros(1)}, tmp_path / EMA_NAME)
    callback = EMACallback(trainer_of(model, resumed_from=tmp_path), DECAY)
    with pytest.raises(CheckpointError, match=r"no average that fits 0\.weight, 2\.bias"):
        next(run_of(callback, model, tmp_path, step=1))
