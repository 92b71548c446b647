"""The benchmark of layer scales: its judgement in miniature, and that the documents say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.layer_scales import judge, landscape

FOLDER = Path(judge.__file__).parent


def test_the_page_says_what_the_results_say() -> None:
    assert judge.table() in (FOLDER / "README.md").read_text()


def test_the_readme_says_what_the_results_say() -> None:
    readme = (FOLDER.parents[1] / "README.md").read_text()
    found = {pair: f"{d.mean:+.2f} ({d.low:+.2f} to {d.high:+.2f})" for pair, d in judge.differences().items()}
    rows = [
        ("`initializer_range` x4", "range4", ("vit", "swin", "imagenette")),
        ("beside that, positions x32", "positions", ("vit",)),
        ("the former default", "former", ("vit", "swin")),
    ]
    for label, arm, names in rows:
        cells = [found[name, arm] for name in names]
        assert f"| {label} | {' | '.join(cells)} |" in readme


def test_what_judges_has_chosen_nothing() -> None:
    for name, arms in judge.ARMS.items():
        rows = judge.read(name)
        seeds = {choosing: {row["seed"] for row in rows if row["choosing"] is choosing} for choosing in (True, False)}
        assert not seeds[True] & seeds[False]
        assert {row["arm"] for row in rows} - {"first_rule"} == set(arms)


@pytest.mark.parametrize("arm", ["class", "nio"])
def test_an_arm_pays_its_initialisation(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "DIGITS_STEPS", 30)
    row = judge.carry_out(judge.Run("digits", arm, 1e-3, 3, choosing=True), Path())
    assert row["steps"] + row["cost"] == 30
    assert (row["cost"] > 8) == (arm == "nio")
    assert 0 <= row["accuracy"] <= 100


def test_random_configurations_are_the_same_at_each_call() -> None:
    first, again = landscape.configurations("vit"), landscape.configurations("vit")
    assert first == again
    random = [made for made in first if made.name.isdigit()]
    assert len(random) == landscape.CONFIGURATIONS["vit"]
    assert all(1 <= made.common <= landscape.COMMON for made in random)
    assert any(len(set(made.factors.values())) > 1 for made in random)
