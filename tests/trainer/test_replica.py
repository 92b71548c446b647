"""Whether NIO fits into memory, which is found out before anything happens."""

import pytest
import torch
from torch import nn

from nio_hf import NIOTrainer
from nio_hf.core import Collective
from nio_hf.core.memory import available_memory
from nio_hf.errors import NIOMemoryError
from nio_hf.trainer.replica import COPIES, check_memory, make_replica, replica_bytes
from tests.trainer.toys import ToyImages, arguments, build, snapshot, unchanged

CPU = torch.device("cpu")
GIB = 2**30


def test_a_copy_is_counted_in_fp32_with_buffers_and_tied_weights_once():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10), nn.Linear(10, 10, bias=False))
    size = 4 * (100 + 10 + 10 + 10 + 10 + 100) + 8
    assert replica_bytes(model) == size
    assert replica_bytes(model.half()) == size
    model[2].weight = model[0].weight
    assert replica_bytes(model) == size - 400


def test_parameters_in_fp64_take_eight_bytes():
    assert replica_bytes(nn.Linear(10, 10).double()) == 8 * 110


@pytest.mark.parametrize(("missing", "refused"), [(0, False), (1, True)])
def test_the_limit_is_four_copies(missing, refused, monkeypatch):
    model = nn.Linear(10, 10)
    _leave(monkeypatch, 4 * 4 * 110 - missing)
    assert COPIES == 4
    if refused:
        with pytest.raises(NIOMemoryError):
            check_memory(model, CPU)
    else:
        check_memory(model, CPU)


def test_the_message_has_the_numbers_and_the_remedy(monkeypatch):
    with torch.device("meta"):
        model = nn.Linear(2**14, 2**14, bias=False)
    _leave(monkeypatch, 3 * GIB // 2)
    with pytest.raises(NIOMemoryError) as raised:
        check_memory(model, CPU)
    assert str(raised.value) == (
        "NIO: needs 4.0 GiB of cpu and the activations of a sub-batch: 4 copies of 268,435,456 numbers in fp32; 1.5 "
        "GiB are free. Initialise once on a machine with more memory, then train from that checkpoint: "
        "model_name_or_path: OUTPUT_DIR/_nio_init."
    )
    with pytest.raises(NIOMemoryError, match=r"Initialise once with `nio-hf init RECIPE --device cpu`, then train"):
        check_memory(model, torch.device("cuda"))


@pytest.mark.parametrize(("processes", "refused"), [(None, False), ("1", False), ("2", False), ("3", True)])
def test_processes_of_a_machine_share_its_memory(processes, refused, monkeypatch):
    _leave(monkeypatch, 2 * 4 * 4 * 110)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    if refused:
        with pytest.raises(NIOMemoryError):
            check_memory(nn.Linear(10, 10), CPU)
    else:
        check_memory(nn.Linear(10, 10), CPU)


def test_processes_do_not_share_the_memory_of_a_gpu(monkeypatch):
    _leave(monkeypatch, 4 * 4 * 110)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_memory(nn.Linear(10, 10), torch.device("cuda"))


def test_where_nothing_is_known_nothing_is_refused(monkeypatch):
    _leave(monkeypatch, None)
    check_memory(nn.Linear(10, 10), CPU)


def test_a_process_reads_what_is_free():
    available = available_memory(CPU)
    assert available is None or available > 0


@pytest.mark.parametrize("start", ["run_nio", "train"])
def test_a_refusal_comes_before_anything_is_written_or_changed(start, tmp_path, monkeypatch):
    class Unused(NIOTrainer):
        def compute_nio_loss(self, *args, **kwargs):
            raise AssertionError("NIO has started")

    trainer = Unused(model=build("vit"), args=arguments(tmp_path), train_dataset=ToyImages())
    before = snapshot(trainer.model)
    _leave(monkeypatch, 1000)
    with pytest.raises(NIOMemoryError, match="GiB are free"):
        getattr(trainer, start)()
    assert list(tmp_path.iterdir()) == []
    assert unchanged(before, snapshot(trainer.model))
    assert trainer.nio_result is None


def test_the_memory_error_does_not_shrink_the_training_batch(tmp_path, monkeypatch):
    args = arguments(tmp_path, auto_find_batch_size=True)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    _leave(monkeypatch, 1000)
    with pytest.raises(NIOMemoryError):
        trainer.train()
    assert trainer._train_batch_size == 8


def test_a_replica_is_a_copy_of_its_own_and_leaves_the_model(monkeypatch):
    model = build("vit")
    before = snapshot(model)
    replica = make_replica(model, CPU, Collective())
    assert unchanged(before, snapshot(replica))
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.add_(1)
    assert unchanged(before, snapshot(model))


def _leave(monkeypatch, available):
    """Let a machine have so many bytes of memory."""
    monkeypatch.setattr("nio_hf.trainer.replica.available_memory", lambda device: available)
