"""Adam's second moment, started from the squared gradient."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nio_hf import NIOTrainer
from nio_hf.core import squared_gradients
from nio_hf.errors import ConfigError
from nio_hf.trainer.seeding import seed_second_moment
from tests.trainer import toys
from tests.trainer.toys import build, losses, refused, same_weights

LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.999, 1e-8
SEEDED = {"nio": False, "nio_seed_optimizer": "gi_adam", "max_steps": 1, "learning_rate": LR}
trainer_of = functools.partial(toys.trainer_of, **SEEDED)
trained = functools.partial(toys.trained, **SEEDED)


def one_parameter(value):
    """A model of one parameter `w`."""
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(value))
    return model


@pytest.mark.parametrize(
    ("changes", "samples"),
    [
        ({"per_device_train_batch_size": 16}, 16),
        ({"per_device_train_batch_size": 4}, 4),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}, 32),
    ],
)
def test_the_squares_are_those_of_the_batch_that_a_step_sees(tmp_path, changes, samples):
    trainer = trainer_of(tmp_path, max_grad_norm=0.0, **changes)
    config = trainer.args.to_nio_config()
    batches = list(itertools.islice(trainer.get_nio_dataloader(), config.report_batches))
    model = build("vit")
    expected, another = (
        squared_gradients(model, batches, lambda model, batch: model(**batch).loss, config, training_batch_size=size)
        for size in (samples, samples + 1)
    )
    found = trainer.squared_gradients()
    assert found.keys() == expected.keys()
    for name, square in found.items():
        torch.testing.assert_close(square, expected[name], rtol=1e-5, atol=1e-12)
    assert any(not torch.allclose(square, another[name], rtol=1e-4) for name, square in found.items())


def test_the_squares_follow_a_batch_that_was_found_automatically(tmp_path):
    """The training begins again with fewer samples where memory runs out."""
    seen = []

    class Observed(NIOTrainer):
        def squared_gradients(self, *args, **kwargs):
            found = super().squared_gradients(*args, **kwargs)
            seen.append((self._train_batch_size, sum(float(square.sum()) for square in found.values())))
            return found

        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer_of(tmp_path, Observed, auto_find_batch_size=True, max_grad_norm=0.0).train()
    sizes, sums = zip(*seen, strict=True)
    assert sizes[0] == 8
    assert sizes[-1] <= 4
    assert [*sums] == sorted(sums)
    assert sums[-1] > 1.05 * sums[0]


@pytest.mark.parametrize("max_grad_norm", [-1.0, 0.0, 1e-3])
def test_a_training_that_clips_is_seeded_with_what_its_optimizer_sees(tmp_path, max_grad_norm):
    def norm(limit):
        squares = trainer_of(tmp_path, max_grad_norm=limit).squared_gradients(batches=1)
        return math.sqrt(sum(float(square.sum()) for square in squares.values()))

    whole = norm(1e9)
    assert whole > 1e-2
    assert math.isclose(norm(max_grad_norm), max_grad_norm if max_grad_norm > 0 else whole, rel_tol=1e-2)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("mode", ["gi_adam", "uncorrected"])
def test_the_updates_are_those_of_the_equations(mode, kind, options):
    """Three steps against the equations of the module, written out."""
    model = one_parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    parameter = model.w
    square = torch.tensor([0.04, 1.0, 1e-6], dtype=torch.float64)
    optimizer = kind([parameter], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, **options)
    seed_second_moment(optimizer, model, {"w": square}, mode)
    expected, first, second = parameter.detach().clone(), torch.zeros(3).double(), square.clone()
    largest = torch.zeros(3).double()
    for step, gradient in enumerate(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double(), 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        largest = torch.maximum(largest, second)
        used = largest if options.get("amsgrad") else second
        corrected = mode == "gi_adam"
        m = first / (1 - BETA1**step) if corrected else first
        v = used / (1 - BETA2**step) if corrected else used
        expected = expected - LR * m / (v.sqrt() + EPS)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=1e-10)


def test_an_optimizer_that_has_taken_steps_is_left_alone():
    model = one_parameter(torch.ones(1))
    optimizer = torch.optim.Adam(model.parameters())
    model.w.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ConfigError, match="has a state already"):
        seed_second_moment(optimizer, model, {"w": torch.ones(1)}, "gi_adam")


@pytest.mark.parametrize("named", ["nothing", "weight"])
def test_squares_that_lack_a_parameter_of_the_optimizer_are_refused(named):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    missing = {"nothing": "2 of the 2 tensors that it trains, e.g. weight", "weight": "1 of the 2 .*e.g. bias"}[named]
    with pytest.raises(ConfigError, match=f"nio_seed_optimizer: no squared gradient of {missing}"):
        seed_second_moment(optimizer, model, {named: torch.ones(2, 2)}, "gi_adam")
    assert not optimizer.state


def test_parameters_that_are_not_of_the_model_begin_as_usual():
    model, temperature = nn.Linear(2, 2), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([*model.parameters(), temperature])
    squares = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    seed_second_moment(optimizer, model, squares, "gi_adam")
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in model.parameters()}


def test_modules_that_were_wrapped_for_checkpointing_keep_their_squares():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    named = enumerate(model.named_parameters(), 1)
    squares = {name: torch.full_like(parameter, number) for number, (name, parameter) in named}
    model[1] = checkpoint_wrapper(model[1])
    assert "1._checkpoint_wrapped_module.0.weight" in dict(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters())
    seed_second_moment(optimizer, model, squares, "gi_adam")
    seeds = [float(optimizer.state[parameter]["exp_avg_sq"].mean()) for parameter in model.parameters()]
    assert seeds == [1.0, 2.0, 3.0, 4.0]


def test_a_training_with_an_optimizer_of_another_model_is_refused(tmp_path):
    optimizer = torch.optim.AdamW(build("vit").parameters())
    trainer = trainer_of(tmp_path, optimizers=(optimizer, None))
    with refused(trainer, ConfigError) as raised:
        trainer.train()
    assert str(raised.value) == (
        "nio_seed_optimizer: the optimizer trains no parameter of the model. Give the optimizer the parameters of the "
        "model that is trained, or leave nio_seed_optimizer out."
    )
    assert not optimizer.state


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("nio", [False, True])
def test_a_training_starts_from_the_squares_at_its_initialisation(tmp_path, optim, nio):
    trainer = trained(tmp_path, optim=optim, nio=nio, nio_seed_optimizer="uncorrected", learning_rate=0.0)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = {id(parameter): state for parameter, state in inner.state.items()}
    squares = trainer.squared_gradients()
    for name, parameter in trainer.model.named_parameters():
        seeded = states[id(parameter)]["exp_avg_sq"]
        # One step of training has been mixed in, with a weight of 1 - beta2.
        own = squares[name] * BETA2
        assert (seeded >= own * (1 - 1e-5)).all()
    assert sum(float(square.sum()) for square in squares.values()) > 0


def test_the_random_numbers_of_the_training_are_those_without_it(tmp_path):
    plain, seeded = (
        trained(tmp_path / str(mode), nio_seed_optimizer=mode, logging_steps=1) for mode in (None, "gi_adam")
    )
    assert losses(plain) == losses(seeded)


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop"])
def test_other_optimizers_are_refused_before_nio_runs(tmp_path, optim):
    trainer = trainer_of(tmp_path, optim=optim, nio=True)
    with refused(trainer, ConfigError, "nio_seed_optimizer: given with"):
        trainer.train()


def test_a_resumed_training_goes_on_with_its_own_second_moment(tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", **saving)
    part = trained(tmp_path / "part", resume=str(tmp_path / "whole" / "checkpoint-2"), **saving)
    assert same_weights(whole, part)
