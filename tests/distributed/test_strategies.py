"""Trainings under each strategy of Accelerate, in real processes."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from nio_hf.hub.run_folder import INIT_DIR_NAME
from tests.distributed.launched import COMPUTED, PUBLISHED, make_trainer
from tests.distributed.launching import DISTRIBUTED_TYPES, launch, save_model
from tests.trainer.toys import load_state

STRATEGIES = ["ddp", "fsdp2", "zero2", "zero3"]
SEARCHES = {"published": PUBLISHED, "computed": COMPUTED}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{search: NIO in this process, its scales and the weights that it makes}."""
    found = {}
    for search, arguments in SEARCHES.items():
        folder = tmp_path_factory.mktemp(search)
        save_model(folder)
        settings = {"strategy": "single", "model_dir": str(folder / "model"), "output_dir": str(folder / "output")}
        trainer = make_trainer({**settings, "arguments": arguments})
        scales = [tensor.omega for tensor in trainer.run_nio().tensors]
        assert max(abs(omega - 1) for omega in scales) > 0.02
        found[search] = scales, trainer.model.state_dict()
    return found


def _check(folder, strategy, search, processes, alone):
    outcome = launch(folder, strategy, processes, arguments=SEARCHES[search])
    assert outcome.status == 0, outcome.output[-3000:]
    scales, expected = alone[search]
    assert len(outcome.reports) == processes
    for report in outcome.reports:
        assert report["num_processes"] == processes
        assert report["distributed_type"].endswith(DISTRIBUTED_TYPES[strategy])
        assert report["partitioned"] == (strategy == "zero3")
        assert report["scales"] == outcome.reports[0]["scales"]
        assert report["scales"] == pytest.approx(scales, rel=1e-5)
        assert report["initialised"] == outcome.reports[0]["initialised"]
        assert report["trained"] == outcome.reports[0]["trained"] != report["initialised"]

    initialised = folder / "output" / INIT_DIR_NAME
    assert [tensor.omega for tensor in load_state(initialised).tensors] == outcome.reports[0]["scales"]
    loaded = AutoModelForImageClassification.from_pretrained(initialised).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    trained = AutoModelForImageClassification.from_pretrained(folder / "output").state_dict()
    assert any(not torch.equal(trained[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize(
    ("strategy", "search"),
    [
        pytest.param("ddp", "published", marks=pytest.mark.slow),
        ("ddp", "computed"),
        pytest.param("fsdp2", "computed", marks=pytest.mark.slow),
        pytest.param("zero2", "published", marks=pytest.mark.slow),
        pytest.param("zero3", "computed", marks=pytest.mark.slow),
    ],
)
def test_two_processes_find_the_scales_of_one_and_train(strategy, search, tmp_path, alone):
    _check(tmp_path, strategy, search, 2, alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_seed_the_optimizer_as_one_does(strategy, tmp_path):
    """A step of two processes sees as many samples as one of a process with batches of twice the size."""
    settings = {"nio_seed_optimizer": "gi_adam", "max_steps": 2, "save_strategy": "no"}
    alone = launch(tmp_path / "alone", "single", 1, arguments={**settings, "per_device_train_batch_size": 8})
    together = launch(tmp_path / "together", strategy, 2, arguments=settings)
    assert together.status == alone.status == 0, together.output[-3000:]
    assert len(together.reports) == 2
    for report in together.reports:
        assert report["distributed_type"].endswith(DISTRIBUTED_TYPES[strategy])
        assert report["seeds"] == pytest.approx(alone.reports[0]["seeds"], rel=1e-3)
        assert report["trained"] == together.reports[0]["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_another_method_gives_two_processes_the_weights_of_one(strategy, tmp_path):
    options = {"iterations": 4}
    settings = {"nio_method": "gradinit", "nio_method_kwargs": options, "max_steps": 2, "save_strategy": "no"}
    alone = launch(tmp_path / "alone", "single", 1, arguments=settings)
    together = launch(tmp_path / "together", strategy, 2, arguments=settings)
    assert together.status == alone.status == 0, together.output[-3000:]
    for report in together.reports:
        assert report["scales"] == pytest.approx(alone.reports[0]["scales"], rel=1e-5)
        assert report["initialised"] == together.reports[0]["initialised"]


@pytest.mark.slow
def test_two_processes_agree_on_the_winner_of_a_race_and_hold_the_one_of_one_process(tmp_path):
    settings = {**COMPUTED, "nio_race_steps": 3, "max_steps": 8, "save_strategy": "no", "dataloader_num_workers": 0}
    alone = launch(tmp_path / "alone", "single", 1, arguments={**settings, "per_device_train_batch_size": 8})
    together = launch(tmp_path / "together", "ddp", 2, arguments=settings)
    assert together.status == alone.status == 0, together.output[-3000:]
    assert len(together.reports) == 2
    expected, (first, second) = alone.reports[0]["race"], together.reports
    assert first["race"] == second["race"]
    assert first["trained"] == second["trained"]
    assert first["race"]["winner"] == expected["winner"]
    # Dropout draws other numbers in several processes; the first step has seen none of its effects on the weights.
    for lane, other in zip(first["race"]["lanes"], expected["lanes"], strict=True):
        assert lane["losses"] == pytest.approx(other["losses"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_a_race_of_a_model_in_shards_is_refused(strategy, tmp_path):
    outcome = launch(tmp_path, strategy, 2, arguments={**COMPUTED, "nio_race_steps": 3})
    assert outcome.status != 0
    assert "nio_race_steps: given with FSDP or DeepSpeed" in outcome.output
    assert not (tmp_path / "output" / INIT_DIR_NAME).exists()


@pytest.mark.slow
def test_deepspeed_has_no_second_moment_to_seed(tmp_path):
    outcome = launch(tmp_path, "zero2", 2, arguments={"nio_seed_optimizer": "gi_adam"})
    assert outcome.status != 0
    assert "nio_seed_optimizer: given with DeepSpeed" in outcome.output
    assert not (tmp_path / "output" / INIT_DIR_NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "zero1"])
def test_three_processes_find_the_scales_of_one_and_train(strategy, search, tmp_path, alone):
    _check(tmp_path, strategy, search, 3, alone)
