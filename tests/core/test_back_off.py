"""Out of memory: what gives way, in which order, and that the numbers stay the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf import NIOConfig, NIOResult, grad_cosine, initialize
from nio_hf.core import curvature, memory
from nio_hf.core.memory import available_memory, graph_bytes, is_out_of_memory
from nio_hf.errors import NIOMemoryError
from tests import zoo
from tests.core.cases import Case, batches_of, case, differences, state


class Device:
    """A loss on a device that holds the graphs of so many samples at once, and counts what it was asked for."""

    def __init__(self, made: Case, samples: int) -> None:
        self.made, self.samples, self.sizes = made, samples, []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor | tuple[Tensor, Any]:
        size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
        if size > self.samples and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.sizes.append(size)
        return self.made.loss_fn(model, batch)


def run(name: str, samples: int = 99, loss_fn: Any = None, **settings: Any) -> tuple[NIOResult, Device]:
    made = case(name)
    device = Device(made, samples)
    config = NIOConfig(**{"iterations": 3, "holdout_batches": 2, "sub_batches": 2, **settings})
    return initialize(made.model, batches_of(name, 5, 12), loss_fn or device, config), device


@pytest.mark.parametrize("curvature", ["exact", "auto", "finite_difference_kept"])
@pytest.mark.parametrize("name", ["mlp", "vit", "gpt2"])
def test_micro_batches_are_halved_until_they_fit(name: str, curvature: Any, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = run(name, curvature=curvature)
    with caplog.at_level(logging.WARNING):
        halved, device = run(name, samples=2, curvature=curvature)
    assert max(device.sizes[-20:]) == 2
    assert {record.micro_batch_size for record in halved.history} == {2}
    assert {record.micro_batch_size for record in whole.history} == {None}
    assert "Micro-batches of 3 samples from here on, not 6" in caplog.text
    assert "Micro-batches of 2 samples from here on, not 3" in caplog.text
    tolerance = 1e-2 if "difference" in curvature else 1e-4
    for tensor, omega in halved.scales.items():
        assert omega == pytest.approx(whole.scales[tensor], abs=tolerance * 0.03 * 3)


def test_kept_graphs_give_way_first(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made, failures = case("vit"), []
    product = curvature._product

    def failing_once(*args: Any) -> Any:
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return product(*args)

    monkeypatch.setattr(curvature, "_product", failing_once)
    config = NIOConfig(iterations=2, holdout_batches=1, sub_batches=2, curvature="exact_kept")
    with caplog.at_level(logging.WARNING):
        result = initialize(made.model, batches_of("vit", 3), made.loss_fn, config)
    assert [record.curvature for record in result.history] == ["exact", "exact"]
    assert [record.micro_batch_size for record in result.history] == [None, None]
    assert "Nothing is kept between the passes from here on" in caplog.text
    made = case("vit")
    plain = initialize(made.model, batches_of("vit", 3), made.loss_fn, config)
    assert result.scales == pytest.approx(plain.scales, abs=1e-5)


def test_where_nothing_can_give_way_the_error_says_what_to_do() -> None:
    made = case("mlp")
    before = state(made.model)
    with pytest.raises(NIOMemoryError, match=r"out of memory for 1 samples at once .*Give smaller batches"):
        initialize(made.model, batches_of("mlp", 5), Device(made, 0), NIOConfig(sub_batches=2))
    assert not differences(before, state(made.model))
    with pytest.raises(NIOMemoryError, match='Set batch_norm="frozen"'):
        run("resnet", samples=2)
    result, _ = run("resnet", samples=2, batch_norm="frozen")
    assert result.history[-1].micro_batch_size == 2


def test_a_loss_that_does_not_add_up_is_not_split() -> None:
    made = case("gpt2")

    def mean_over_tokens(model: nn.Module, batch: Any) -> Tensor:
        if len(batch["labels"]) > 3 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        loss, weight = zoo.text_loss(model, batch)
        return loss / weight

    with pytest.raises(NIOMemoryError, match=r"cannot be split: the mean loss .* Return \(loss_sum, weight\)"):
        initialize(made.model, batches_of("gpt2", 5, 12), mean_over_tokens, NIOConfig(sub_batches=2))


def test_the_diagnostic_backs_off_too() -> None:
    made = case("mlp", 12)
    for sub_batches in (2, None):
        whole = grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=sub_batches)
        halved = grad_cosine(made.model, made.batch, Device(made, 2), sub_batches=sub_batches)
        assert halved.value == pytest.approx(whole.value, abs=1e-5)


@pytest.mark.parametrize(("free", "path"), [(None, "exact"), (0, "exact"), (10**12, "exact_kept")])
def test_graphs_are_kept_where_they_fit(free: int | None, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "available_memory", lambda device: free)
    assert run("mlp")[0].curvature == path


def test_the_memory_of_a_graph_is_what_it_saves() -> None:
    weight = torch.ones(10, 10, requires_grad=True)
    inputs = torch.ones(1000, 10)
    with graph_bytes([weight]) as counted:
        ((inputs @ weight).exp() ** 2).sum()
    # The inputs, the exponential; the weight is a parameter, and each storage counts once.
    assert counted == [2 * inputs.nbytes]


def test_available_memory_is_that_of_the_machine_and_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory(torch.device("cpu"))
    if free is None:
        pytest.skip("known on Linux only")
    assert 2**20 < free < 2**50
    monkeypatch.setattr(memory, "_control_group_memory", lambda: 5)
    assert available_memory(torch.device("cpu")) == 5
    assert available_memory(torch.device("meta")) is None


def test_errors_of_memory_are_told_from_others() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
