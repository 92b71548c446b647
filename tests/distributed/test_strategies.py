"""Trainings under each strategy of Accelerate, in real processes."""

import itertools

import pytest
import torch
from transformers import AutoModelForImageClassification

from nio_hf.hub.run_folder import INIT_DIR_NAME
from tests.distributed.launched import COMPUTED, PUBLISHED, make_trainer
from tests.distributed.launching import DISTRIBUTED_TYPES, launch, trained, training_in
from tests.trainer.toys import load_state

SEARCHES = {"published": PUBLISHED, "computed": COMPUTED}
SHORT = {"max_steps": 2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{search: NIO in this process, its scales and the weights that it makes}."""
    found = {}
    for search, arguments in SEARCHES.items():
        trainer = make_trainer(training_in(tmp_path_factory.mktemp(search), "single", arguments=arguments))
        scales = [tensor.omega for tensor in trainer.run_nio().tensors]
        assert max(abs(omega - 1) for omega in scales) > 0.02
        found[search] = scales, trainer.model.state_dict()
    return found


QUICK = ("ddp", "computed", 2)
SLOW = [
    *[("ddp", "published", 2), ("fsdp2", "computed", 2), ("zero2", "published", 2), ("zero3", "computed", 2)],
    *itertools.product(["ddp", "fsdp2", "zero2", "zero3", "zero1"], SEARCHES, [3]),
]


@pytest.mark.parametrize(
    ("strategy", "search", "processes"), [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_processes_find_the_scales_of_one_and_train(strategy, search, processes, tmp_path, alone):
    reports = trained(tmp_path, strategy, processes, arguments=SEARCHES[search])
    scales, expected = alone[search]
    for report in reports:
        assert report["num_processes"] == processes
        assert report["distributed_type"].endswith(DISTRIBUTED_TYPES[strategy])
        assert report["partitioned"] == (strategy == "zero3")
        assert report["scales"] == reports[0]["scales"]
        assert report["scales"] == pytest.approx(scales, rel=1e-5)
        assert report["initialised"] == reports[0]["initialised"]
        assert report["trained"] == reports[0]["trained"] != report["initialised"]

    initialised = tmp_path / "output" / INIT_DIR_NAME
    assert [tensor.omega for tensor in load_state(initialised).tensors] == reports[0]["scales"]
    loaded = AutoModelForImageClassification.from_pretrained(initialised).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    after = AutoModelForImageClassification.from_pretrained(tmp_path / "output").state_dict()
    assert any(not torch.equal(after[name], loaded[name]) for name in loaded)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_seed_the_optimizer_as_one_does(strategy, tmp_path):
    """A step of two processes sees as many samples as one of a process with batches of twice the size."""
    settings = {"nio_seed_optimizer": "gi_adam", **SHORT}
    alone = trained(tmp_path / "alone", "single", 1, arguments={**settings, "per_device_train_batch_size": 8})
    together = trained(tmp_path / "together", strategy, 2, arguments=settings)
    for report in together:
        assert report["distributed_type"].endswith(DISTRIBUTED_TYPES[strategy])
        assert report["seeds"] == pytest.approx(alone[0]["seeds"], rel=1e-3)
        assert report["trained"] == together[0]["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_another_method_gives_two_processes_the_weights_of_one(strategy, tmp_path):
    settings = {"nio_method": "gradinit", "nio_method_kwargs": {"iterations": 4}, **SHORT}
    alone = trained(tmp_path / "alone", "single", 1, arguments=settings)
    together = trained(tmp_path / "together", strategy, 2, arguments=settings)
    for report in together:
        assert report["scales"] == pytest.approx(alone[0]["scales"], rel=1e-5)
        assert report["initialised"] == together[0]["initialised"]


@pytest.mark.slow
def test_two_processes_agree_on_the_winner_of_a_race_and_hold_the_one_of_one_process(tmp_path):
    settings = {**COMPUTED, **SHORT, "nio_race_steps": 3, "max_steps": 8, "dataloader_num_workers": 0}
    (alone,) = trained(tmp_path / "alone", "single", 1, arguments={**settings, "per_device_train_batch_size": 8})
    first, second = trained(tmp_path / "together", "ddp", 2, arguments=settings)
    assert first["race"] == second["race"]
    assert first["trained"] == second["trained"]
    assert first["race"]["winner"] == alone["race"]["winner"]
    # Dropout draws other numbers in several processes; the first step has seen none of its effects on the weights.
    for lane, other in zip(first["race"]["lanes"], alone["race"]["lanes"], strict=True):
        assert lane["losses"] == pytest.approx(other["losses"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "changes", "found"),
    [
        ("fsdp2", {"nio_race_steps": 3}, "nio_race_steps: given with FSDP or DeepSpeed"),
        ("zero2", {"nio_race_steps": 3}, "nio_race_steps: given with FSDP or DeepSpeed"),
        ("zero2", {"nio_seed_optimizer": "gi_adam"}, "nio_seed_optimizer: given with DeepSpeed"),
    ],
)
def test_what_a_sharded_model_cannot_have_is_refused(strategy, changes, found, tmp_path):
    outcome = launch(tmp_path, strategy, 2, arguments={**COMPUTED, **changes})
    assert outcome.status != 0
    assert found in outcome.output
    assert not (tmp_path / "output" / INIT_DIR_NAME).exists()
