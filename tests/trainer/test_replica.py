"""Whether NIO fits into memory, which is found out before anything happens."""

import pytest
import torch
from torch import nn

from nio_hf.core import Collective
from nio_hf.errors import NIOMemoryError
from nio_hf.trainer.replica import check_memory, make_replica, replica_bytes
from tests.trainer.toys import build, refused, snapshot, trainer_of, unchanged

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEEDED = 4 * 4 * 110
"""Bytes of four copies of a layer in fp32 that has 10 inputs and 10 outputs."""


@pytest.fixture
def leave(monkeypatch):
    """Lets a machine have so many bytes of memory, which so many processes share."""

    def set_memory(available, processes=None):
        monkeypatch.setattr("nio_hf.trainer.replica.available_memory", lambda device: available)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)

    return set_memory


def test_a_copy_is_counted_in_fp32_or_fp64_with_buffers_and_tied_weights_once():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10), nn.Linear(10, 10, bias=False))
    size = 4 * (100 + 10 + 10 + 10 + 10 + 100) + 8
    assert replica_bytes(model) == size
    assert replica_bytes(model.half()) == size
    model[2].weight = model[0].weight
    assert replica_bytes(model) == size - 400
    assert replica_bytes(nn.Linear(10, 10).double()) == 8 * 110


@pytest.mark.parametrize(
    ("available", "processes", "device"),
    [
        (NEEDED, None, CPU),
        (2 * NEEDED, "2", CPU),
        (NEEDED, "8", GPU),
        pytest.param(None, None, CPU, id="not known"),
    ],
)
def test_four_copies_for_each_process_of_the_machine_suffice(available, processes, device, leave):
    leave(available, processes)
    check_memory(nn.Linear(10, 10), device)


@pytest.mark.parametrize(("available", "processes"), [(NEEDED - 1, None), (2 * NEEDED, "3")])
def test_less_memory_is_refused(available, processes, leave):
    leave(available, processes)
    with pytest.raises(NIOMemoryError):
        check_memory(nn.Linear(10, 10), CPU)


def test_the_message_has_the_numbers_and_the_remedy(leave):
    with torch.device("meta"):
        model = nn.Linear(2**14, 2**14, bias=False)
    leave(3 * 2**30 // 2)
    with pytest.raises(NIOMemoryError) as raised:
        check_memory(model, CPU)
    assert str(raised.value) == (
        "NIO: needs 4.0 GiB of cpu and the activations of a sub-batch: 4 copies of 268,435,456 numbers in fp32; 1.5 "
        "GiB are free. Initialise once on a machine with more memory, then train from that checkpoint: "
        "model_name_or_path: OUTPUT_DIR/_nio_init."
    )
    with pytest.raises(NIOMemoryError, match=r"Initialise once with `nio-hf init RECIPE --device cpu`, then train"):
        check_memory(model, GPU)


@pytest.mark.parametrize("start", ["run_nio", "train"])
def test_a_refusal_comes_before_anything_is_written_or_changed(start, tmp_path, leave):
    trainer = trainer_of(tmp_path, auto_find_batch_size=True)
    trainer.compute_nio_loss = lambda *args: pytest.fail("NIO has started")
    leave(1000)
    with refused(trainer, NIOMemoryError, "GiB are free"):
        getattr(trainer, start)()
    assert list(tmp_path.iterdir()) == []
    assert trainer._train_batch_size == 8


def test_a_replica_is_a_copy_of_its_own_and_leaves_the_model():
    model = build("vit")
    before = snapshot(model)
    replica = make_replica(model, CPU, Collective())
    assert unchanged(before, snapshot(replica))
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.add_(1)
    assert unchanged(before, snapshot(model))
