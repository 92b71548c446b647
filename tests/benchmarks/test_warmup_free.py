"""The study of warmup: its parts in miniature, and that the pages say what the results say."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.warmup_free import images, lab, search, study, tables, texts
from benchmarks.warmup_free.images import GROUPS, ImageTask
from benchmarks.warmup_free.lab import ARMS, RESULTS, Run
from benchmarks.warmup_free.study import Part
from benchmarks.warmup_free.texts import MODELS, TextTask

FOLDER = Path(lab.__file__).parent
BLOCKS = torch.arange(512 * texts.BLOCK).view(512, texts.BLOCK) % 97
"""Text of which each byte follows from the one before."""


def test_the_page_says_what_the_runs_say():
    page = (FOLDER / "README.md").read_text()
    assert [block for block in tables.blocks() if block not in page] == []
    reports = [block for file in RESULTS.glob("*/comparison.md") for block in file.read_text().split("\n\n")]
    verdicts = [block.strip() for block in reports if "| verdict |" in block]
    assert verdicts
    assert [block for block in verdicts if block not in page] == []


def test_the_readme_says_what_the_runs_say():
    readme = (FOLDER.parents[1] / "README.md").read_text()
    head = "| NIO minus | points |\n|---|---|\n"
    rows = readme.partition(head)[2].partition("\n\n")[0].splitlines()
    of_study = "\n".join(tables.blocks())
    assert len(rows) > 5
    assert [row for row in rows if f"\n{row.removesuffix('|')}" not in of_study] == []


def _digits(steps):
    return ImageTask("digits", "digits", steps=steps, depth=2, pixels=8)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study of the digits, with results of its own."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "LOCKS", tmp_path / "locks")
    (tmp_path / "locks").mkdir()
    parts = {
        "rivals-vit": Part(_digits(30), ("nio", "x4"), (1300, 1301, 1302)),
        "fixed": Part(_digits(30), ("x4",), (1400,), choosing=(0,), extends=False),
        "long": Part(_digits(60), ("x4", "published"), (1400,), rates_of="rivals-vit"),
    }
    monkeypatch.setattr(study, "HELD", parts)
    return tmp_path


def _write(folder, part, rows):
    """Lines of (arm, learning rate, seed, accuracy)."""
    with (folder / f"{part}.jsonl").open("a") as file:
        for arm, rate, seed, accuracy in rows:
            run = Run(part, arm, rate, seed, choosing=seed < 1000)
            file.write(json.dumps({**dataclasses.asdict(run), "accuracy": accuracy}) + "\n")


FALLING = ((5e-4, 3.0), (1e-3, 2.0), (2e-3, 1.0))


def test_the_grid_goes_on_while_the_best_rate_is_at_an_end(tiny):
    lines = [("x4", rate, seed, accuracy) for seed in (0, 1) for rate, accuracy in FALLING]
    _write(tiny, "rivals-vit", lines[:-1])
    assert study.grid("rivals-vit", "x4", study.rows("rivals-vit")) == ([5e-4, 1e-3, 2e-3], None)
    _write(tiny, "rivals-vit", lines[-1:])
    assert study.grid("rivals-vit", "x4", study.rows("rivals-vit")) == ([2.5e-4, 5e-4, 1e-3, 2e-3], None)
    _write(tiny, "rivals-vit", [("x4", 2.5e-4, seed, 2.5) for seed in (0, 1)])
    assert study.grid("rivals-vit", "x4", study.rows("rivals-vit")) == ([2.5e-4, 5e-4, 1e-3, 2e-3], 5e-4)
    assert study.grid("rivals-vit", "nio", study.rows("rivals-vit"))[1] is None


def test_a_part_may_keep_its_rates_or_have_those_of_another(tiny):
    _write(tiny, "fixed", [("x4", rate, 0, accuracy) for rate, accuracy in FALLING])
    assert study.grid("fixed", "x4", study.rows("fixed")) == ([5e-4, 1e-3, 2e-3], 5e-4)
    assert study.grid("long", "x4", study.rows("long")) == ([], None)
    assert list(study.held_jobs("long")) == []
    higher = [(1e-3, 1.0), (2e-3, 3.0), (4e-3, 2.0), (5e-4, 0.0)]
    _write(tiny, "rivals-vit", [("nio", rate, seed, accuracy) for rate, accuracy in higher for seed in (0, 1)])
    assert study.grid("long", "published", study.rows("long")) == ([], 2e-3), "an arm of its own has the rate of NIO"
    assert [job.name.count("published") for job in study.held_jobs("long")] == [1]


def test_a_part_is_carried_out_once_and_goes_on(tiny, monkeypatch):
    made = []

    def carry_out(run, task, data):
        made.append(run)
        if len(made) == 4:
            raise KeyboardInterrupt
        return {**dataclasses.asdict(run), "accuracy": 50 - abs(run.learning_rate - 1e-3)}

    monkeypatch.setattr(study, "carry_out", carry_out)
    with pytest.raises(KeyboardInterrupt):
        study.work(["rivals-vit"], Path(), float("inf"))
    study.work(["rivals-vit"], Path(), float("inf"))
    made.pop(3)
    assert len(made) == len(set(made)) == 2 * (3 * 2 + 3)
    assert [run.choosing for run in made] == sorted((run.choosing for run in made), reverse=True)
    assert {run.learning_rate for run in made if not run.choosing} == {1e-3}
    assert len((tiny / "rivals-vit.jsonl").read_text().splitlines()) == len(made)


def test_seeds_that_judge_have_chosen_nothing():
    for name, part in study.HELD.items():
        chosen = part.choosing if part.rates_of is None else study.HELD[part.rates_of].choosing
        assert not set(part.judging) & {*chosen, *study.CHOOSING}, name
        assert set(part.arms) <= ARMS.keys()
        assert part.rates_of in (None, *study.HELD)


DISTINCT_ARMS = ("x4", "positions8", "mimetic", "lsuv", "gi_adam", "muon", "schedule_free", "nio", "nio_warmup10")
"""Arms of which each has a part that no other has; the rest combines them."""


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(name, marks=() if name in DISTINCT_ARMS else pytest.mark.slow)
        for name in sorted(ARMS.keys() - {"searched", "structured", "published"})
    ],
)
def test_every_arm_trains_and_pays_its_initialisation(arm, tiny):
    row = lab.carry_out(Run("vit", arm, 1e-3, 3, choosing=False), _digits(40), Path())
    assert row["steps"] + np.ceil(row["cost"]) == 40
    looks_at_data = ARMS[arm].seeded or any(method in ("nio", "lsuv") for method, _ in ARMS[arm].draws)
    assert (row["cost"] > 0) == looks_at_data
    right = images.unpacked(row["right"], 360)
    assert 100 * right.mean() == pytest.approx(row["accuracy"], abs=0.01)
    assert row["losses"][-1] < row["losses"][0]


@pytest.mark.parametrize(
    ("model", "arm"), [("gpt2", "class"), ("llama", "residual"), ("bert", "residual"), ("bert", "nio_seeded")]
)
def test_text_trains_too(model, arm, monkeypatch):
    monkeypatch.setattr(texts, "load_blocks", lambda: tuple(BLOCKS.split([448, 64])))
    monkeypatch.setattr(texts, "CHOOSING_BLOCKS", 64)
    row = lab.carry_out(Run(model, arm, 2e-3, 3, choosing=False), TextTask(model, steps=20), Path())
    assert row["steps"] + np.ceil(row["cost"]) == 20
    assert "accuracy" not in row
    assert lab.score(row) == -row["loss"] > -math.log(texts.TOKENS)
    by_block = texts.unpacked_losses(row["right"])
    assert len(by_block) == 64
    # Blocks of masked text have different numbers of masked tokens.
    assert by_block.astype(float).mean() == pytest.approx(row["loss"], rel=0.05 if model == "bert" else 1e-3)


def test_a_text_training_that_fails_counts_as_guessing(monkeypatch):
    monkeypatch.setattr(texts, "load_blocks", lambda: tuple(BLOCKS.split([448, 64])))
    task = TextTask("gpt2", steps=4)
    monkeypatch.setattr(TextTask, "loss", lambda self, model, batch: model(**batch).loss * math.nan)
    row = lab.carry_out(Run("gpt2", "class", 2e-3, 3, choosing=False), task, Path())
    assert row["failed"]
    assert row["loss"] == pytest.approx(math.log(texts.TOKENS), abs=1e-4)


def test_residual_projections_are_scaled_as_gpt2_scales_them():
    for name in MODELS:
        model, other = (TextTask(name).build(0) for _ in range(2))
        lab.scale_residual_projections(model)
        pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
        found = {key: float(after.norm() / before.norm()) for (key, after), before in pairs if before.any()}
        scaled = {key for key, ratio in found.items() if ratio != 1}
        assert len(scaled) == 2 * texts.LAYERS
        assert [found[key] for key in scaled] == pytest.approx([1 / math.sqrt(2 * texts.LAYERS)] * len(scaled))


def test_the_whole_study_in_miniature(tiny, monkeypatch):
    """Search, choice and judgement, then tables and picture, on the digits with few steps."""
    arms = ("nio", "warmup10", "x4", "searched", "nio_warmup10")
    parts = {"rivals-vit": Part(_digits(14), arms, (1300, 1301), choosing=(0,), extends=False)}
    for arm in arms:
        monkeypatch.setitem(ARMS, arm, dataclasses.replace(ARMS[arm], rates=(1e-3,)))
    for module in (study, tables):
        monkeypatch.setattr(module, "HELD", parts)
        monkeypatch.setattr(module, "SEARCHED_BY", {"search-vit": "rivals-vit"})
    monkeypatch.setattr(study, "CHOOSING", (0,))
    monkeypatch.setattr(search, "MOST_CONFIGURATIONS", 3)
    monkeypatch.setattr(search, "RATES", {"digits": 1e-3})
    for module in (lab, search):
        monkeypatch.setattr(module, "SEARCHED", tiny / "searched.json")
    monkeypatch.setattr(tables, "RESULTS", tiny)
    monkeypatch.setattr(tables, "TEST_IMAGES", 360)
    monkeypatch.setattr(tables, "MODELS", {"rivals-vit": "ViT"})
    monkeypatch.setattr(tables, "LENGTHS", {"ViT": {14: "rivals-vit"}})
    monkeypatch.setattr(tables, "PLACES", {})
    study.work(["search-vit", "rivals-vit"], Path(), float("inf"))
    assert list(study.search_jobs("search-vit")) == []
    assert list(study.held_jobs("rivals-vit")) == []
    found = tables.judged("rivals-vit")
    assert list(found) == list(arms)
    family = tables.rivals(["rivals-vit"])
    assert {name for _, name in family} == {"warmup10", "x4", "searched"}
    own, other = found["nio"], found["x4"]
    expected = [a - b for a, b in zip(own.scores, other.scores, strict=True)]
    assert family["rivals-vit", "x4"].mean == pytest.approx(np.mean(expected))
    shares = own.by_sample - other.by_sample
    assert tables.samples_error(own, other) == pytest.approx(shares.std(ddof=1) / np.sqrt(360))
    assert shares.mean() == pytest.approx(np.mean(expected), abs=0.01)
    page = "\n\n".join(tables.page({"rivals-vit": "ViT"}, ["search-vit"]))
    assert "the direct search over 3 configurations finds" in page
    assert "| NIO, warmup 10%, minus NIO |" in page
    monkeypatch.setattr(tables, "TEXTS", {})
    assert tables.main() == 0
    assert (tiny / "rivals.png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_longer_trainings_and_of_races(tiny, monkeypatch):
    arms, judging = ("nio", "x4", "class"), (1400, 1401, 1402)
    parts = {
        "rivals-vit": Part(_digits(500), arms, judging, extends=False),
        "length-2500": Part(_digits(2500), ("nio", "x4"), judging, extends=False),
        "where-width192": Part(_digits(500), ("nio", "x4"), judging, extends=False),
    }
    lengths = {"ViT": {500: "rivals-vit", 2500: "length-2500", 9000: "length-9000"}}
    for module in (study, tables):
        monkeypatch.setattr(module, "HELD", {**parts, "length-9000": parts["length-2500"]})
    for name, value in (("RESULTS", tiny), ("LENGTHS", lengths), ("PLACES", {"where-width192": "width 192"})):
        monkeypatch.setattr(tables, name, value)
    ends = {"nio": 50.0, "x4": 48.0, "class": 40.0}
    middle = {"nio": 1.5, "x4": 1.4, "class": 2.0}
    for part, held in parts.items():
        with (tiny / f"{part}.jsonl").open("w") as file:
            for arm, rate, seed in itertools.product(held.arms, (5e-4, 1e-3, 2e-3), (0, 1, *judging)):
                run = Run(part, arm, rate, seed, seed in held.choosing)
                accuracy = ends[arm] - (rate != 1e-3) + (seed % 10) * (1 + (arm == "nio"))
                row = {"accuracy": accuracy, "cost": 8.67, "losses": [3.0] * 4 + [middle[arm]] + [0.1] * 15}
                file.write(json.dumps({**dataclasses.asdict(run), **row}) + "\n")
    family = tables.by_length("ViT")
    assert set(family) == {("rivals-vit", "x4"), ("length-2500", "x4")}, "arms of the longer trainings, where done"
    assert family["length-2500", "x4"].mean == pytest.approx(3.0)
    table = tables.rows_table(family, "steps", {"rivals-vit": "500", "length-2500": "2,500", "length-9000": "9,000"})
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 500", "| 2,500"]
    assert "| 51.00 ± 2.00 | 9 | +3.00 (" in table
    # 90% interval of 2, 3, 4 by Student's t with 2 degrees of freedom: 2.920 x 1 / sqrt(3).
    assert "+3.00 (+1.31 to +4.69)" in table
    raced = tables.race_table("rivals-vit", "ViT").splitlines()[2:]
    # The race prefers x4, which has the lower loss at its end and the lower accuracy in the end.
    assert raced[1] == "| 0.001 | `initializer_range` x4 2 | 51.0 | 48.5 | 40.5 | 48.5 | 51.0 |"
    tables.draw_lengths(["ViT"], tiny / "lengths.png")
    assert (tiny / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_seeding_and_warmup_change_the_first_steps_only_where_asked_for():
    share = lab._schedule(ARMS["warmup10"])
    assert [share(step, 100) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert lab._schedule(ARMS["class"])(0, 100) == 1.0
    assert lab._schedule(ARMS["schedule_free"])(99, 100) == 1.0


def test_a_direct_search_climbs_to_the_top():
    best = dict.fromkeys(GROUPS["vit"], 2.0) | {"positions": 7.0, "value": 3.0}

    def accuracy(exponents):
        return 50 - sum(abs(best[group] - exponent) for group, exponent in exponents)

    known = {}
    while (found := search.replay("vit", known, 2)).missing is not None:
        known[found.missing] = [accuracy(found.missing)] * 2
    assert dict(found.best) == best
    assert len(known) <= search.MOST_CONFIGURATIONS
    known.pop(found.best)
    assert search.replay("vit", known, 2).missing == found.best


def test_what_a_search_has_found_is_written_once(tmp_path, monkeypatch):
    """Workers that find it kept leave it alone: two that write at once would be in each other's way."""
    monkeypatch.setattr(search, "SEARCHED", tmp_path / "searched.json")
    search.save("vit", (("positions", 3.0),))
    monkeypatch.setattr(search, "write_atomically", lambda *args: pytest.fail("written again"))
    search.save("vit", (("positions", 3.0),))
    assert json.loads((tmp_path / "searched.json").read_text()) == {"vit": {"positions": 8.0}}


def test_the_scales_of_the_search_are_those_that_are_trained(tiny):
    task, exponents = _digits(4), dict.fromkeys(GROUPS["digits"], 1.0)
    plain = lab.carry_out_scaled(task, dict.fromkeys(exponents, 0.0), 1e-3, 0, Path())
    doubled = lab.carry_out_scaled(task, exponents, 1e-3, 0, Path())
    assert plain["losses"] != doubled["losses"]
    assert plain == lab.carry_out_scaled(task, dict.fromkeys(exponents, 0.0), 1e-3, 0, Path())


def test_an_augmented_batch_is_drawn_from_its_generator_and_looks_like_its_images():
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 10
    augment = images.Augmentation()
    first, again, other = (augment(pixels, labels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (16, 3, 32, 32)
    torch.testing.assert_close(first[1].sum(1), torch.ones(16))
    assert pixels.dtype == torch.uint8


def test_which_images_are_right_survives_packing():
    right = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.4
    assert (images.unpacked(images.packed(right), 1003) == right.numpy()).all()
