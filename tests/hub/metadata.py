"""What the Hub demands of the metadata of a model card, as its documentation says."""

from __future__ import annotations

import re
from typing import Any

import yaml

LICENCES = {
    *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause"),
    *("bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0"),
    *(
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "cdla-permissive-2.0",
    ),
    *(
        "creativeml-openrail-m",
        "ecl-2.0",
        "epl-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "isc",
        "lgpl",
    ),
    *("lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "openrail", "openrail++", "osl-3.0"),
    *("other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib"),
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a card."""
    front = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if front is None:
        return []
    try:
        data = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    errors = []
    if data.get("license", "mit") not in LICENCES:
        errors.append(f'"license" must be one of the known ones, not {data["license"]!r}')
    for key in ("tags", "datasets", "metrics", "language", "base_model"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
        elif key in ("datasets", "base_model") and not all(_NAME.fullmatch(value) for value in values):
            errors.append(f'"{key}" must be names of repositories')
    return errors + _index_errors(data.get("model-index", []))


def _index_errors(index: Any) -> list[str]:
    try:
        for model in index:
            assert isinstance(model["name"], str), "a model has no name"
            for result in model["results"]:
                assert isinstance(result["task"]["type"], str), "a task has no type"
                assert isinstance(result["dataset"]["name"], str), "a data set has no name"
                assert isinstance(result["dataset"]["type"], str), "a data set has no type"
                for metric in result["metrics"]:
                    assert isinstance(metric["type"], str), "a metric has no type"
                    assert isinstance(metric["value"], int | float | str), "a metric has no value"
    except (AssertionError, KeyError, TypeError) as error:
        return [f'"model-index": {error!r}']
    return []
