"""What memory is free, inside of a container too; what gives way where it runs out, and that numbers stay the same."""

import logging
import sys

import pytest
import torch

from nio_hf import NIOConfig, grad_cosine, initialize
from nio_hf.core import curvature, memory
from nio_hf.core.memory import available_memory, graph_bytes, is_out_of_memory, with_less_memory
from nio_hf.errors import NIOMemoryError
from tests.core.cases import PER_TENSOR, SEARCHES, batches_of, case, unchanged


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Collecting garbage takes longer than all of the rest."""
    monkeypatch.setattr(memory, "release_memory", lambda device: None)


@pytest.mark.skipif(sys.platform != "linux", reason="known on Linux only")
@pytest.mark.parametrize(("limit", "expected"), [("1000", 1000 - 900 + 300), ("500", 0), ("max", None), (None, None)])
def test_available_memory_is_that_of_the_machine_and_of_its_container(limit, expected, tmp_path, monkeypatch):
    """Files that the system keeps at hand are free; without a limit or a container the machine decides."""
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("900\n")
        (tmp_path / "memory.stat").write_text("anon 500\nactive_file 100\ninactive_file 200\nfile_mapped 7\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    free = available_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50 if expected is None else free == expected
    assert available_memory(torch.device("meta")) is None


def test_the_memory_of_a_graph_is_what_it_saves():
    weight = torch.ones(10, 10, requires_grad=True)
    inputs = torch.ones(1000, 10)
    with graph_bytes([weight]) as counted:
        ((inputs @ weight).exp() ** 2).sum()
    # The inputs, the exponential; the weight is a parameter, and each storage counts once.
    assert counted == [2 * inputs.nbytes]


def test_errors_of_memory_are_told_from_others():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


class Attempts:
    """Work that runs out of memory above so many samples, or while anything is kept."""

    def __init__(self, fits, kept=False):
        self.fits, self.kept, self.sizes = fits, kept, []

    def __call__(self, size):
        self.sizes.append(size)
        if self.kept or (7 if size is None else size) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "done"

    def drop_kept(self):
        dropped, self.kept = self.kept, False
        return dropped

    def start(self, begin=None, check=lambda size: None):
        return with_less_memory(
            self, 7, begin, where="batch 3", device=torch.device("cpu"), drop_kept=self.drop_kept, check_split=check
        )


@pytest.mark.parametrize(
    ("fits", "kept", "begin", "tried"),
    [
        (7, False, None, [None]),
        (3, False, 3, [3]),
        (7, True, None, [None, None]),
        (3, False, None, [None, 4, 2]),
        (3, True, None, [None, None, 4, 2]),
        (1, False, 5, [5, 3, 2, 1]),
        (4, False, 99, [99, 4]),
    ],
)
def test_what_is_kept_gives_way_first_and_then_the_micro_batches(fits, kept, begin, tried):
    attempts = Attempts(fits, kept)
    assert attempts.start(begin) == ("done", tried[-1])
    assert attempts.sizes == tried


def test_a_check_that_does_not_fit_is_an_error():
    def check(size):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(NIOMemoryError, match="batch 3: out of memory for 7 samples at once, and for the check"):
        Attempts(3).start(check=check)


def test_other_errors_pass():
    def broken(size):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Attempts(3).start(check=broken)
    with pytest.raises(RuntimeError, match="mine"):
        with_less_memory(broken, 7, None, where="", device=torch.device("cpu"))


class Device:
    """A loss on a device that holds the graphs of so many samples at once, and counts what it was asked for."""

    def __init__(self, made, samples):
        self.made, self.samples, self.sizes = made, samples, []

    def __call__(self, model, batch):
        size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
        if size > self.samples and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.sizes.append(size)
        return self.made.loss_fn(model, batch)


def run(name, samples=99, **settings):
    made = case(name)
    device, config = Device(made, samples), NIOConfig(report_batches=2, sub_batches=2, **settings)
    return initialize(made.model, batches_of(name, 5, 12), device, config), device


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_micro_batches_are_halved_until_they_fit(name, search, caplog):
    whole, _ = run(name, **SEARCHES[search])
    with caplog.at_level(logging.WARNING):
        halved, device = run(name, samples=2, **SEARCHES[search])
    assert max(device.sizes[-20:]) == 2
    assert {record.micro_batch_size for record in halved.history} == {2}
    assert {record.micro_batch_size for record in whole.history} == {None}
    assert "Micro-batches of 3 samples from here on, not 6" in caplog.text
    assert "Micro-batches of 2 samples from here on, not 3" in caplog.text
    tolerance = 1e-2 if search == "finite differences" else 1e-4
    for tensor, omega in halved.scales.items():
        assert omega == pytest.approx(whole.scales[tensor], rel=tolerance)


def test_kept_graphs_give_way_first(monkeypatch, caplog):
    failures = []
    product = curvature._double_backward

    def failing_once(*args):
        # The first call is the look at the path.
        failures.append(1)
        if len(failures) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return product(*args)

    monkeypatch.setattr(curvature, "available_memory", lambda device: 10**12)
    made = case("vit")
    config = NIOConfig(**PER_TENSOR, iterations=2, report_batches=1, sub_batches=2)
    plain = initialize(made.model, batches_of("vit", 3), made.loss_fn, config)
    monkeypatch.setattr(curvature, "_double_backward", failing_once)
    made = case("vit")
    with caplog.at_level(logging.WARNING):
        result = initialize(made.model, batches_of("vit", 3), made.loss_fn, config)
    assert len(failures) > 3
    assert [record.micro_batch_size for record in result.history] == [None, None]
    assert "Nothing is kept between the passes from here on" in caplog.text
    assert result.scales == pytest.approx(plain.scales, abs=1e-5)


def test_where_nothing_can_give_way_the_model_is_left_as_it_was():
    made = case("mlp")
    message = r"the first sub-batch: out of memory for 1 samples at once \(CUDA.*Give smaller batches"
    with unchanged(made.model), pytest.raises(NIOMemoryError, match=message):
        initialize(made.model, batches_of("mlp", 8), Device(made, 0), NIOConfig(sub_batches=2))
    with pytest.raises(NIOMemoryError, match="the first sub-batch: out of memory for 6 samples at once"):
        run("resnet", samples=2)


def test_the_diagnostic_backs_off_too():
    made = case("mlp", 12)
    for sub_batches in (2, None):
        whole = grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=sub_batches)
        halved = grad_cosine(made.model, made.batch, Device(made, 2), sub_batches=sub_batches)
        assert halved.value == pytest.approx(whole.value, abs=1e-5)
