"""Records of a run, and their trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nio_hf import GradCosine, NIOConfig, NIOResult, initialize
from tests.core.cases import batches_of, case


def measurement(*values: float) -> GradCosine:
    parts = [GradCosine(value, 2 * value, (value, 3 * value), 4 * value, 8) for value in values]
    return GradCosine.mean(parts)


@pytest.fixture(scope="module")
def result() -> NIOResult:
    made = case("vit")
    config = NIOConfig(iterations=2, holdout_batches=2, sub_batches=2)
    return initialize(made.model, batches_of("vit", 4), made.loss_fn, config)


def test_mean_of_measurements_keeps_them() -> None:
    mean = measurement(0.1, 0.2, 0.6)
    assert mean.value == pytest.approx(0.3)
    assert mean.grad_norm == pytest.approx(0.6)
    assert mean.norms == pytest.approx((0.3, 0.9))
    assert mean.loss == pytest.approx(1.2)
    assert (mean.batch_size, mean.sub_batches, len(mean.parts)) == (8, 2, 3)


def test_standard_errors_are_those_of_the_textbook() -> None:
    before, after = measurement(0.1, 0.2, 0.6), measurement(0.4, 0.3, 0.8)
    # Deviations of 0.1, 0.2, 0.6 from 0.3, squared: 0.04, 0.01, 0.09; rises of 0.3, 0.1, 0.2 about 0.2.
    assert before.standard_error == pytest.approx(math.sqrt(0.14 / 2 / 3))
    made = dataclasses.replace(_blank(), before=before, after=after)
    assert made.gain == pytest.approx(0.2)
    assert made.gain_standard_error == pytest.approx(math.sqrt(0.02 / 2 / 3))


def test_one_measurement_has_no_standard_error() -> None:
    assert math.isnan(measurement(0.1).standard_error)
    assert math.isnan(
        dataclasses.replace(_blank(), before=measurement(0.1), after=measurement(0.2)).gain_standard_error
    )


def test_a_result_survives_json(result: NIOResult) -> None:
    text = json.dumps(result.to_dict())
    loaded = NIOResult.from_dict(json.loads(text))
    unnamed = [dataclasses.replace(tensor, name="") for tensor in loaded.tensors]
    assert unnamed == [dataclasses.replace(tensor, name="") for tensor in result.tensors]
    assert [tensor.reason for tensor in loaded.excluded] == [tensor.reason for tensor in result.excluded]
    for field in dataclasses.fields(NIOResult):
        if field.name not in ("tensors", "excluded"):
            assert getattr(loaded, field.name) == getattr(result, field.name), field.name
    assert list(loaded.scales.values()) == list(result.scales.values())


def test_saved_results_hold_no_parameter_names(result: NIOResult) -> None:
    text = json.dumps(result.to_dict())
    assert len(result.scales) > 10
    assert not [name for name in [*result.scales, *(t.name for t in result.excluded)] if name in text]


def test_scales_are_those_of_the_tensors(result: NIOResult) -> None:
    assert result.scales == {tensor.name: tensor.omega for tensor in result.tensors}
    shapes = {name: tuple(parameter.shape) for name, parameter in case("vit").model.named_parameters()}
    assert all(shapes[tensor.name] == tensor.shape for tensor in (*result.tensors, *result.excluded))
    assert result.peak_memory > 2**20
    assert 0 < sum(record.seconds for record in result.history) < result.seconds


def _blank() -> NIOResult:
    one = measurement(0.1)
    return NIOResult(NIOConfig(), (), (), (), one, one, None, "exact", 0.0, 0, "improved", "")
