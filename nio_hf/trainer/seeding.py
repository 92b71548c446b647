"""Adam's second moment, started from the squared gradient at the initialisation instead of zero.

Letters: g_0 the gradient at the initialisation, v_t the second moment after t steps, beta2 its decay. From v_0 = g_0^2,
v_t = beta2^t g_0^2 + (1 - beta2) sum_s beta2^(t - s) g_s^2, and the update divides by the root of

    "gi_adam"      v_t / (1 - beta2^t)    Adam's usual bias correction. Since v_0 is not zero it is too large: at first
                                          the updates are sqrt(1 - beta2^t) of what they would be, an implicit warmup of
                                          the order of 1 / (1 - beta2) steps (1000 for 0.999)
    "uncorrected"  v_t                    no warmup by the second moment. The first moment starts at zero and is not
                                          corrected either: updates grow over 1 / (1 - beta1) steps (10 for 0.9)

Where the training clips gradients, g_0 is clipped likewise: from one that is k times as large as those that follow, the
updates would be k times too small for as long as beta2 remembers it.

Source: Kalra and Barkeshli, arXiv 2406.09405 (GI-Adam, the first form); the second is our choice, as is clipping.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import Trainer

from nio_hf.errors import ConfigError, Problem

SeedMode = Literal["gi_adam", "uncorrected"]
SEED_MODES: tuple[str, ...] = get_args(SeedMode)
_WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod)\.")
"""Parts of parameter names that torch adds when it wraps modules for checkpointing or compiles them."""
_NEGLIGIBLE = 1e-8
"""beta^t from which on a bias correction is 1 in fp32."""


def check_seedable(trainer: Any) -> None:
    """Refuse to seed an optimizer that has no second moment of this kind, before anything is computed.

    Raises:
        ConfigError: Another optimizer than torch's Adam and AdamW, and where its state is in parts that cannot be
            seeded: DeepSpeed's, and that of FSDP version 1.
    """
    where = "nio_seed_optimizer"
    if trainer.is_deepspeed_enabled:
        fix = "Leave it out, or train with DDP or FSDP version 2"
        raise ConfigError(Problem(where, "given with DeepSpeed, which keeps the optimizer's state to itself", fix))
    if trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        fix = "Leave it out, or set fsdp_config: {version: 2}"
        raise ConfigError(Problem(where, "given with FSDP version 1, whose parameters are flat", fix))
    optimizer_class = _optimizer_class(trainer)
    if not issubclass(optimizer_class, torch.optim.Adam):
        found = f"given with {optimizer_class.__name__}, which is not torch's Adam or AdamW"
        fix = "Set optim: adamw_torch or adamw_torch_fused, or leave nio_seed_optimizer out"
        raise ConfigError(Problem(where, found, fix))


@torch.no_grad()
def seed_second_moment(
    optimizer: torch.optim.Optimizer, model: nn.Module, squares: Mapping[str, Tensor], mode: SeedMode
) -> None:
    """Give Adam the state that it goes on from.

    Args:
        optimizer: Torch's Adam or AdamW, which has not taken a step yet.
        model: Model whose parameters the optimiser has; FSDP version 2 may have sharded them.
        squares: {parameter name: squared gradient at the initialisation}, whole.
        mode: Whether the bias correction applies.

    Raises:
        ConfigError: An optimizer that has taken steps, one without a parameter of the model, and squares that lack
            one that it trains.
    """
    inner = _unwrapped(optimizer)
    if inner.state:
        fix = "Give a new optimizer, or leave nio_seed_optimizer out"
        raise ConfigError(Problem("nio_seed_optimizer", "the optimizer has a state already", fix))
    named = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    names = {id(parameter): _WRAPPERS.sub("", name) for name, parameter in named}
    trained = [
        (names[id(parameter)], parameter, group)
        for group in inner.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    ]
    _check_squares(squares, [name for name, _, _ in trained])
    for name, parameter, group in trained:
        inner.state[parameter] = _state(parameter, squares[name], group, mode)


def _check_squares(squares: Mapping[str, Tensor], trained: Sequence[str]) -> None:
    """Refuse an optimizer that would be seeded in part or not at all."""
    missing = [name for name in trained if name not in squares]
    if trained and not missing:
        return
    if trained:
        found = f"no squared gradient of {len(missing)} of the {len(trained)} tensors that it trains, e.g. {missing[0]}"
    else:
        found = "the optimizer trains no parameter of the model"
    fix = "Give the optimizer the parameters of the model that is trained, or leave nio_seed_optimizer out"
    raise ConfigError(Problem("nio_seed_optimizer", found, fix))


def _state(parameter: nn.Parameter, square: Tensor, group: dict[str, Any], mode: SeedMode) -> dict[str, Tensor]:
    """The state of Adam for a parameter, as torch itself lays it out."""
    on_device = group.get("capturable") or group.get("fused")
    steps = 0.0 if mode == "gi_adam" else _steps_without_correction(*group["betas"])
    second = _zeros(parameter)
    second.copy_(_sharded_as(parameter, square))
    state = {
        "step": torch.tensor(steps, dtype=torch.float32, device=parameter.device if on_device else "cpu"),
        "exp_avg": _zeros(parameter),
        "exp_avg_sq": second,
    }
    if group.get("amsgrad"):
        state["max_exp_avg_sq"] = _zeros(parameter)
    return state


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _steps_without_correction(beta1: float, beta2: float) -> float:
    """A number of steps after which both bias corrections are 1."""
    largest = max(float(beta1), float(beta2))
    return float(math.ceil(math.log(_NEGLIGIBLE) / math.log(largest))) if 0 < largest < 1 else 1.0


def _sharded_as(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """A whole tensor, in the shards of a parameter where that is in shards."""
    if not hasattr(parameter, "placements"):
        return whole.to(parameter.device, parameter.dtype)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(whole.to(parameter.device, parameter.dtype), sharded.device_mesh, sharded.placements)


def _optimizer_class(trainer: Any) -> type[Any]:
    if trainer.optimizer is not None:
        return type(_unwrapped(trainer.optimizer))
    if trainer.optimizer_cls_and_kwargs is not None:
        return cast(type[Any], trainer.optimizer_cls_and_kwargs[0])
    return cast(type[Any], Trainer.get_optimizer_cls_and_kwargs(trainer.args)[0])


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside that of accelerate."""
    return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))
