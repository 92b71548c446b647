"""NIO with a loss function that divides by the number of labels, as Trainer asks it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from nio_hf import NIOResult, NIOTrainer
from nio_hf.errors import ConfigError
from tests.training.toys import ToyImages, arguments, build


class Ignoring(ToyImages):
    """Every third image has no label."""

    def __init__(self, samples: int = 64) -> None:
        super().__init__(samples)
        self.labels[::3] = -100


def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """What needs no number of labels."""
    return nn.functional.cross_entropy(outputs.logits, labels)


def divided(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """What cannot do without the number of labels."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("data", [ToyImages, Ignoring])
def test_a_loss_that_divides_by_the_number_of_labels_gives_the_scales_of_the_mean(
    data: type[ToyImages], tmp_path: Path
) -> None:
    expected, result = (_initialised(tmp_path / loss.__name__, loss, data) for loss in (mean, divided))
    assert any(abs(omega - 1) > 1e-3 for omega in expected.scales.values())
    for name, omega in expected.scales.items():
        assert result.scales[name] == pytest.approx(omega, rel=1e-4), name
    assert result.before.value == pytest.approx(expected.before.value, abs=1e-5)
    assert result.before.loss == pytest.approx(expected.before.loss, rel=1e-5)


def test_a_loss_is_told_the_labels_of_a_sub_batch_that_count(tmp_path: Path) -> None:
    told = []

    def watched(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        told.append((int((labels != -100).sum()), int(num_items_in_batch)))
        return divided(outputs, labels, num_items_in_batch)

    _initialised(tmp_path, watched, Ignoring)
    assert all(counted == given for counted, given in told)
    assert len({given for _, given in told}) > 1


def test_batches_computed_in_parts_give_the_same_scales(tmp_path: Path) -> None:
    whole, parts = (
        _initialised(tmp_path / str(size), divided, ToyImages, nio_micro_batch_size=size) for size in (None, 4)
    )
    assert whole.before.value == pytest.approx(parts.before.value, abs=1e-5)
    for name, omega in whole.scales.items():
        assert parts.scales[name] == pytest.approx(omega, rel=1e-3), name


def test_parts_whose_labels_do_not_count_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compute_nio_loss.* in parts, .* together.*Return \(loss_sum, weight\)"):
        _initialised(tmp_path, divided, Ignoring, nio_micro_batch_size=4)


def test_such_a_loss_is_trained_with_after_nio(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, divided, ToyImages)
    trainer.train()
    assert trainer.nio_result is not None
    assert trainer.state.global_step == 2


def test_a_loss_of_the_class_comes_before_the_function(tmp_path: Path) -> None:
    class Own(NIOTrainer):
        losses = 0

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            self.losses += 1
            return mean(model(pixel_values=inputs["pixel_values"]), inputs["labels"])

    def unused(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the class has a loss of its own")

    trainer = _trainer(tmp_path, unused, ToyImages, Own)
    trainer.run_nio()
    assert trainer.losses > 0


def _trainer(
    output_dir: Path, loss: Any, data: type[ToyImages], trainer_class: type[NIOTrainer] = NIOTrainer, **changes: Any
) -> Any:
    model = build("vit", num_hidden_layers=1)
    settings = {"nio_batch_size": 24, **changes}
    args = arguments(output_dir, **settings)
    return trainer_class(model=model, args=args, train_dataset=data(168), compute_loss_func=loss)


def _initialised(output_dir: Path, loss: Any, data: type[ToyImages], **changes: Any) -> NIOResult:
    return _trainer(output_dir, loss, data, **changes).run_nio()
