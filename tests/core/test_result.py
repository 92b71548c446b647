"""Records of a run, and their trip through JSON."""

import dataclasses
import json
import math

import pytest

from nio_hf import GradCosine, NIOConfig, NIOResult, initialize
from nio_hf.core.result import IterationRecord
from tests.core.cases import PER_TENSOR, batches_of, case
from tests.versions import VALUES

SETTINGS = {
    "balance": {},
    "mapping": {"groups": {"values": VALUES, "positions": "position"}},
    "published": {**PER_TENSOR, "iterations": 2},
}


def measurement(*values):
    parts = [GradCosine(value, 2 * value, (value, 3 * value), 4 * value, 8) for value in values]
    return GradCosine.mean(parts)


def blank():
    one = measurement(0.1)
    return NIOResult(NIOConfig(), (), (), (), (), one, one, 0.0, 0.0, 0, "improved", "")


@pytest.fixture(scope="module", params=SETTINGS)
def result(request):
    made = case("vit")
    config = NIOConfig(report_batches=2, sub_batches=2, **SETTINGS[request.param])
    return initialize(made.model, batches_of("vit", 4), made.loss_fn, config)


def test_mean_of_measurements_keeps_them():
    mean = measurement(0.1, 0.2, 0.6)
    assert mean.value == pytest.approx(0.3)
    assert mean.grad_norm == pytest.approx(0.6)
    assert mean.norms == pytest.approx((0.3, 0.9))
    assert mean.loss == pytest.approx(1.2)
    assert (mean.batch_size, mean.sub_batches, len(mean.parts)) == (8, 2, 3)


def test_standard_errors_are_those_of_the_textbook():
    before, after = measurement(0.1, 0.2, 0.6), measurement(0.4, 0.3, 0.8)
    # Deviations of 0.1, 0.2, 0.6 from 0.3, squared: 0.04, 0.01, 0.09; rises of 0.3, 0.1, 0.2 about 0.2.
    assert before.standard_error == pytest.approx(math.sqrt(0.14 / 2 / 3))
    made = dataclasses.replace(blank(), before=before, after=after)
    assert made.gain == pytest.approx(0.2)
    assert made.gain_standard_error == pytest.approx(math.sqrt(0.02 / 2 / 3))


def test_one_measurement_has_no_standard_error():
    assert math.isnan(measurement(0.1).standard_error)
    assert math.isnan(blank().gain_standard_error)


def test_a_result_survives_json_with_numbers_for_the_names_of_tensors(result):
    loaded = NIOResult.from_dict(json.loads(json.dumps(result.to_dict())))
    numbered = {tensor.name: f"tensor {index}" for index, tensor in enumerate(result.tensors)}
    expected = dataclasses.replace(
        result,
        groups=tuple(dataclasses.replace(group, name=numbered.get(group.name, group.name)) for group in result.groups),
        tensors=tuple(
            dataclasses.replace(tensor, name=numbered[tensor.name], group=numbered.get(tensor.group, tensor.group))
            for tensor in result.tensors
        ),
        excluded=tuple(
            dataclasses.replace(tensor, name=f"tensor {index}") for index, tensor in enumerate(result.excluded)
        ),
    )
    assert loaded == expected
    assert loaded.to_dict() == result.to_dict()


def test_a_loss_that_is_not_finite_survives_json():
    record = IterationRecord(1, "all x4", "loss_bound", math.nan)
    saved = dataclasses.replace(blank(), history=(record,)).to_dict()
    (loaded,) = NIOResult.from_dict(json.loads(json.dumps(saved, allow_nan=False))).history
    assert math.isnan(loaded.loss)
    assert dataclasses.replace(loaded, loss=0.0) == dataclasses.replace(record, loss=0.0)


def test_a_field_that_is_missing_or_unknown_is_an_error():
    fields = blank().to_dict()
    with pytest.raises(KeyError):
        NIOResult.from_dict({**fields, "more": 1})
    del fields["cost"]
    with pytest.raises(TypeError):
        NIOResult.from_dict(fields)


def test_saved_results_hold_no_parameter_names(result):
    text = json.dumps(result.to_dict())
    assert len(result.scales) > 2
    assert not [name for name in [*result.scales, *(t.name for t in result.excluded)] if name in text]


def test_scales_are_those_of_the_tensors_and_their_groups(result):
    assert result.scales == {tensor.name: tensor.omega for tensor in result.tensors}
    omega = {group.name: group.omega for group in result.groups}
    assert all(tensor.omega == omega[tensor.group] for tensor in result.tensors)
    for group in result.groups:
        members = [tensor for tensor in result.tensors if tensor.group == group.name]
        assert group.tensors == len(members) > 0
        assert group.parameters == sum(math.prod(tensor.shape) for tensor in members)
    shapes = {name: tuple(parameter.shape) for name, parameter in case("vit").model.named_parameters()}
    assert all(shapes[tensor.name] == tensor.shape for tensor in (*result.tensors, *result.excluded))
    assert result.peak_memory > 2**20
    assert all(record.seconds > 0 for record in result.history)
    assert sum(record.seconds for record in result.history) < result.seconds
