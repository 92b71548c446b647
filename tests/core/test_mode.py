"""The state that gradients are measured in, and the way back from it."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nio_hf import grad_cosine
from nio_hf.core.mode import measuring
from tests.core.cases import Case, case, differences, double_case, state, unchanged
from tests.versions import checkpoint_activations

NO_DROPOUT = {
    "vit": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "swin": {"drop_path_rate": 0.0},
    "swinv2": {"drop_path_rate": 0.0},
    "beit": {"drop_path_rate": 0.0},
    "dinov2": {"drop_path_rate": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def kernels():
    """Settings of torch that NIO changes while it measures."""
    backends = torch.backends
    return {
        "flash": backends.cuda.flash_sdp_enabled(),
        "efficient": backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": backends.cuda.cudnn_sdp_enabled(),
        "math": backends.cuda.math_sdp_enabled(),
        "any product": backends.fp32_precision,
        "cuda matmul": backends.cuda.matmul.fp32_precision,
        "cpu matmul": backends.mkldnn.matmul.fp32_precision,
        "convolution": backends.cudnn.conv.fp32_precision,
        "recurrent": backends.cudnn.rnn.fp32_precision,
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
    }


@pytest.fixture
def default_precision():
    """The settings of a new process, which torch's older functions do not restore."""
    _reset_precision()
    yield
    _reset_precision()


def _reset_precision():
    torch.set_float32_matmul_precision("highest")
    for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        place.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


def measured(made):
    found = grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=2)
    return found.value, found.norms, found.loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NO_DROPOUT)
def test_dropout_and_stochastic_depth_are_off(name, checkpointing):
    noisy, plain = case(name), case(name, **NO_DROPOUT[name])
    losses = {noisy.mean_loss(range(8)).item() for _ in range(5)}
    assert len(losses) > 1, "this model has nothing to switch off"
    if checkpointing:
        checkpoint_activations(noisy.model)
    value, norms, loss = measured(noisy)
    expected = measured(plain)
    assert value == pytest.approx(expected[0], abs=1e-5)
    assert norms == pytest.approx(expected[1], rel=1e-5)
    assert loss == pytest.approx(expected[2], rel=1e-6)


def test_layers_that_checkpoint_still_do():
    made = case("vit")
    calls = []
    made.model.vit.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    measured(made)
    assert len(calls) == 2
    checkpoint_activations(made.model)
    calls.clear()
    measured(made)
    assert len(calls) == 4


def test_a_layer_that_checkpoints_has_no_dropout_of_its_own():
    class Noisy(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

        def forward(self, inputs):
            return nn.functional.dropout(self.linear(inputs), 0.5, self.training)

    made, layer = case("mlp"), Noisy()
    plain = measured(Case(layer.linear, made.batch, made.loss_fn))
    assert measured(Case(nn.Sequential(layer), made.batch, made.loss_fn)) == plain


@pytest.mark.parametrize("way", ["in place", "through data", "assigned"])
def test_buffers_are_put_back_however_they_are_written(way):
    made = case("mlp")
    made.model.register_buffer("seen", torch.zeros(3))
    buffer = made.model.seen

    def loss_fn(model, batch):
        if way == "in place":
            model.seen.add_(1)
        elif way == "through data":
            model.seen.data.add_(1)
        else:
            model.seen = model.seen + 1
        return made.loss_fn(model, batch)

    grad_cosine(made.model, made.batch, loss_fn, sub_batches=2)
    assert made.model.seen is buffer
    assert torch.equal(buffer, torch.zeros(3))


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("error", [None, ValueError("stop"), KeyboardInterrupt()])
def test_precision_kernels_and_flags_are_set_and_put_back(error):
    made = case("resnet")
    made.model.resnet.encoder.stages[0].eval()
    torch.set_float32_matmul_precision("high")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        flags, before = state(made.model), kernels()
        with contextlib.suppress(ValueError, KeyboardInterrupt), measuring(made.model):
            inside = kernels()
            training = {type(module) for module in made.model.modules() if module.training}
            if error is not None:
                raise error
        assert kernels() == before
    assert not differences(flags, state(made.model))
    assert inside["math"]
    assert inside["grad"]
    assert not [name for name in ("flash", "efficient", "cudnn", "autocast") if inside[name]]
    assert {inside[name] for name in ("cuda matmul", "cpu matmul", "convolution", "recurrent")} == {"ieee"}
    assert training == {nn.BatchNorm2d}


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("setting", ["none", "tf32", "ieee"])
def test_precision_by_the_newer_settings_is_put_back(setting):
    torch.backends.fp32_precision = setting
    before = kernels()
    measured(case("mlp"))
    assert kernels() == before


def test_autocast_and_no_grad_around_it_do_not_matter():
    made = case("vit")
    expected = measured(made)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert measured(made) == expected


def test_a_compiled_model_is_measured_without_its_compiled_form():
    made = case("mlp")
    expected = measured(made)

    def refuse(graph, inputs):
        raise AssertionError("compiled")

    assert measured(Case(torch.compile(made.model, backend=refuse), made.batch, made.loss_fn)) == expected
    made.model.compile(backend=refuse)
    assert measured(made) == expected


def test_batch_statistics_are_those_of_the_sub_batch():
    made = double_case("resnet")
    _, _, loss = measured(made)
    made.model.train()
    losses = [made.mean_loss(half).item() for half in (range(4), range(4, 8))]
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-12)
    assert losses != [pytest.approx(made.mean_loss(range(8)).item()), pytest.approx(made.mean_loss(range(8)).item())]


@pytest.mark.parametrize("settings", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_unusual_layers_use_the_statistics_of_their_input_and_are_put_back(settings):
    layer = nn.BatchNorm1d(3, **settings)
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2))
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    model(inputs)
    before = (layer.momentum, layer.track_running_stats)
    with unchanged(model), contextlib.suppress(KeyboardInterrupt), measuring(model):
        outputs = layer(inputs)
        expected = (inputs - inputs.mean(dim=0)) / (inputs.var(dim=0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        raise KeyboardInterrupt
    assert (layer.momentum, layer.track_running_stats) == before
