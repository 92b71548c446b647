"""NIOTrainer beside Trainer: each behaviour is shown by both, and they agree.

Without NIO they agree bit for bit. With NIO the same is asked, or, where other weights lead to other numbers, all but
the numbers.
"""

import importlib

import pytest
from transformers import set_seed

from nio_hf.errors import NIOError
from tests.compat.comparing import differences
from tests.compat.sides import BEHAVIOURS, Nio, plain, with_nio, without_nio

SUBJECTS = (
    "training",
    "data",
    "checkpoints",
    "callbacks",
    "evaluation",
    "arguments",
    "saving",
    "adapters",
    "extensions",
)
for subject in SUBJECTS:
    importlib.import_module(f"tests.compat.behaviours_{subject}")

ON_PURPOSE = {
    "weights_of_a_checkpoint_are_edited": "a file that was changed is refused; the message says how to use it",
    "tags_of_an_older_card": "a card that somebody has written is left as it is",
}
"""{behaviour that differs: why}; the README names the others, which no script sees."""


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
def test_it_does_what_trainer_does(behaviour, tmp_path):
    trainers = _show(behaviour, plain(), tmp_path / "plain")
    if behaviour.name in ON_PURPOSE:
        assert _differs(trainers, behaviour, tmp_path / "without"), "it agrees, and can leave the list"
        return
    _agree("without NIO", trainers, _show(behaviour, without_nio(), tmp_path / "without"))
    if behaviour.nio is not Nio.NOT_RUN:
        side = with_nio()
        ours = _show(behaviour, side, tmp_path / "with")
        _agree("with NIO", trainers, ours, alike=behaviour.nio is Nio.ALIKE)
        trained = [trainer for trainer in side.trainers if trainer.state.global_step]
        assert not trained or any(trainer.nio_result is not None for trainer in trained), "NIO did not run"


def _differs(trainers, behaviour, folder):
    try:
        return bool(list(differences(trainers, _show(behaviour, without_nio(), folder))))
    except NIOError:
        return True


def _show(behaviour, side, folder):
    set_seed(0)
    folder.mkdir()
    value = behaviour.show(side, folder)
    assert value not in (None, [], {}, ""), "a behaviour shows something"
    return value


def _agree(where, trainers, ours, alike=False):
    found = list(differences(trainers, ours, alike))
    if found:
        pytest.fail("\n".join([where, *found[:10]]), pytrace=False)
