"""What is refused when a model or its checkpoints are sharded."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nio_hf.core import Collective, initialize
from nio_hf.errors import ConfigError, ModelError, NIOMemoryError
from nio_hf.trainer import replica
from nio_hf.trainer.replica import make_replica
from tests.core.cases import batches_of, case
from tests.distributed.launching import launch
from tests.distributed.ranks import run_ranks
from tests.trainer.toys import build, refused, trainer_of


def _initialise_sharded():
    made = case("vit")
    fully_shard(made.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert all(isinstance(parameter, DTensor) for parameter in made.model.parameters())
    with pytest.raises(ModelError, match="sharded over processes"):
        initialize(made.model, batches_of("vit", 6), made.loss_fn, collective=Collective.current())
    with pytest.raises(ModelError, match="sharded over processes"):
        make_replica(made.model, torch.device("cpu"), Collective.current())
    return True


def test_a_model_that_is_sharded_already_is_refused():
    assert run_ranks(2, _initialise_sharded) == [True, True]


def _replica_on_a_small_device():
    """Rank 1 has no memory left; what it says."""
    rank = Collective.current().rank
    replica.available_memory = lambda device: 1000 if rank == 1 else 10**12
    with pytest.raises(NIOMemoryError) as refused:
        make_replica(build("vit"), torch.device("cpu"), Collective.current())
    return str(refused.value)


def test_a_device_that_is_too_small_stops_all_with_the_numbers():
    messages = run_ranks(2, _replica_on_a_small_device)
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1, NIO: needs 0.0 GiB of cpu")
    assert "Initialise once on a machine with more memory" in messages[0]


def _weights_of_replica():
    rank = Collective.current().rank
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    # Broadcasting takes no strided tensors.
    model[0].weight = torch.nn.Parameter(torch.randn(4, 3).t())
    model[1].running_mean += rank
    copy = make_replica(model, torch.device("cpu"), Collective.current())
    return {name: tensor.tolist() for name, tensor in copy.state_dict().items()}


def test_ranks_that_built_other_models_work_on_the_one_of_rank_0():
    replicas = run_ranks(3, _weights_of_replica)
    assert replicas[0] == replicas[1] == replicas[2]
    assert replicas[0]["1.running_mean"] == [0, 0, 0]


def test_sharded_checkpoints_of_fsdp_are_refused_before_training(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    plugin = type("Plugin", (), {"state_dict_type": "StateDictType.SHARDED_STATE_DICT"})()
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with refused(trainer, ConfigError, "Set it to FULL_STATE_DICT"):
        trainer.train()


@pytest.mark.slow
def test_nio_after_deepspeed_has_taken_the_weights_is_refused(tmp_path):
    outcome = launch(tmp_path, "zero2", 2, arguments={"max_steps": 2, "save_strategy": "no"}, nio_again=True)
    assert outcome.status != 0
    assert "ModelError: model: DeepSpeed holds a copy of its weights already" in outcome.output
    assert outcome.output.count("Call run_nio() before train()") == 1
