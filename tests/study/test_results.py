"""Results on the disk: nothing is lost, nothing counts twice."""

import json

import pytest

from nio_hf.errors import RecipeError
from nio_hf.hub.run_folder import versions
from nio_hf.study.arms import ARMS
from nio_hf.study.plan import Run
from nio_hf.study.results import RESULTS_NAME, Results
from tests.study.outcomes import outcome

TASK = {"recipe": "r", "steps": 100, "settings": {"weight_decay": 0.05}}
RUN = Run("selection", "nio", 1e-3, 0.0, 0)
OTHER = Run("selection", "nio", 2e-3, 0.0, 0)


def _filled(directory):
    results = Results(directory, TASK)
    results.add(RUN, ARMS["nio"], outcome(50.0, diagnostics={"angular_update": [0.1]}))
    results.add(OTHER, ARMS["nio"], outcome(None))
    return directory / RESULTS_NAME


def test_what_was_added_is_there_again_and_counts_once(tmp_path):
    file = _filled(tmp_path)
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert records[1]["versions"] == versions()
    records[1]["outcome"]["value"] = 1.0
    with file.open("a", encoding="utf-8") as again:
        again.write(json.dumps(records[1]) + "\n")
    results = Results(tmp_path, TASK)
    assert results.get(RUN, ARMS["nio"]) == outcome(50.0, diagnostics={"angular_update": [0.1]})
    assert results.get(OTHER, ARMS["nio"]) == outcome(None)
    assert results.get(Run("verdict", "nio", 1e-3, 0.0, 0), ARMS["nio"]) is None


def test_a_line_that_was_cut_off_is_as_if_it_had_not_been_written(tmp_path):
    file = _filled(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    results = Results(tmp_path, TASK)
    assert results.get(RUN, ARMS["nio"]) is not None
    assert results.get(OTHER, ARMS["nio"]) is None
    results.add(OTHER, ARMS["nio"], outcome(None))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("value", ['"abc"', "NaN", "[]"])
def test_an_outcome_that_is_no_number_is_refused_with_its_line(tmp_path, value):
    file = _filled(tmp_path)
    file.write_text(file.read_text(encoding="utf-8").replace('"value": 50.0', f'"value": {value}'))
    with pytest.raises(RecipeError, match=r"line 2: is no results file: value is"):
        Results(tmp_path, TASK)


@pytest.mark.parametrize(
    ("task", "differs"),
    [
        ({**TASK, "steps": 200}, "something else: steps is 100 there, 200 here"),
        ({**TASK, "recipe": "other"}, "recipe is .* there, 'other' here"),
        ({**TASK, "settings": {}}, "weight_decay is 0.05 there, None here"),
        ({**TASK, "purpose": "tune"}, "purpose is 'compare' there, 'tune' here"),
    ],
)
def test_results_of_another_comparison_are_refused(tmp_path, task, differs):
    before = _filled(tmp_path).read_bytes()
    with pytest.raises(RecipeError, match=differs):
        Results(tmp_path, task)
    assert (tmp_path / RESULTS_NAME).read_bytes() == before


def test_an_arm_that_means_something_else_now_is_refused(tmp_path):
    _filled(tmp_path)
    with pytest.raises(RecipeError, match="runs of gi_adam with other settings"):
        Results(tmp_path, TASK).get(RUN, ARMS["gi_adam"])


FORMER = '{"format": 1, "task": {}}\n{"run": {}, "accuracy": 1}\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *((text, "is no results file") for text in ("{}\n", "no json\n", "no json", '{"mine": 1}\n{', "\n")),
        ('{"format": 3, "task": {}}\n', "format 3, known is 2"),
        ('{"format": 2}\n', "no 'task'"),
        (FORMER, r"line 1: is no results file: format 1 is that of a former version, known is 2\. Move it away"),
    ],
)
def test_another_file_is_refused_and_kept(tmp_path, text, found):
    file = tmp_path / RESULTS_NAME
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=found):
        Results(tmp_path, TASK)
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("length", [0, 1, 20, 40])
def test_a_file_that_ends_in_its_first_line_is_begun_again(tmp_path, length):
    file = _filled(tmp_path)
    first = file.read_bytes().splitlines(keepends=True)[0]
    file.write_bytes(first[:length])
    assert Results(tmp_path, TASK).get(RUN, ARMS["nio"]) is None
    assert file.read_bytes() == first
