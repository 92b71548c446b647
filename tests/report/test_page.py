"""The page of a run: complete for any run, and without anything from elsewhere."""

import base64
import dataclasses
import io
import itertools
import math
import typing
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from nio_hf.core.layerwise import GradientInspection
from nio_hf.core.result import Status
from nio_hf.errors import OutputError
from nio_hf.report import page
from nio_hf.report.page import render_page, write_page
from nio_hf.report.run import Facts
from nio_hf.report.tables import layer_rows, scale_table, summary_rows
from tests.report.runs import BROKEN_LOG, LOG, METRICS, RECIPE, VERSIONS, full_run, inspection, measured, result, run

PAPER = "https://arxiv.org/abs/2210.05956"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
VOID = {"meta", "img", "br", "hr", "link", "input"}
LOADING = {"src", "srcset", "href", "action", "data", "poster", "background", "style"}
NASTY = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """A parsed page: its tags, its text, and its tables as rows of text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags = []
        self.text = {}
        self.rows = []
        self._open = []
        self._row = []
        self.feed(html)
        self.close()
        assert self._open == [], "tags are not closed"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of {tag} is there twice"
        self.tags.append((tag, dict(attrs)))
        self.text.setdefault(tag, []).append("")
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            self._row.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "tr":
            self.rows.append(tuple(self._row))

    def handle_data(self, data):
        for tag in self._open:
            self.text[tag][-1] += data
        if {"td", "th"} & set(self._open):
            self._row[-1] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(shown):
    html = render_page(shown)
    assert html.startswith("<!DOCTYPE html>")
    return Page(html)


def image_of(attributes):
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))


def sections(read_page):
    return [heading["id"] for heading in read_page.attributes("h2")]


@pytest.fixture
def no_plots(monkeypatch):
    """Replace the plots by white images."""

    def draw(what, target):
        Image.new("L", (16, 16), 255).save(target, "PNG", dpi=(160, 160))

    for name in ("plot_history", "plot_scales", "plot_training", "plot_inspection"):
        monkeypatch.setattr(page, name, draw)


def test_a_page_with_everything_is_in_order_and_loads_nothing():
    shown = read(full_run(blocks=3, iterations=9))
    assert sections(shown) == ["summary", "nio", "training", "layers", "reproduce", "reading"]
    assert shown.attributes("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in shown.attributes("meta")
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in shown.attributes("meta")
    assert "viewport" in [meta.get("name") for meta in shown.attributes("meta")]
    assert shown.text["title"] == ["vit-digits | NIO report"]
    assert shown.text["h1"] == ["vit-digits"]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in shown.tags}
    assert "url(" not in shown.text["style"][0]
    assert "@import" not in shown.text["style"][0]
    ids = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in shown.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in LOADING & set(attributes):
            value = attributes[name]
            is_link = tag == "a" and (value == PAPER or (value.startswith("#") and value[1:] in ids))
            assert is_link or (tag == "img" and value.startswith("data:image/png;base64,")), (tag, name, value[:80])


def test_headings_tables_and_images_can_be_read_aloud():
    shown = read(full_run(blocks=3, iterations=9))
    levels = [int(tag[1]) for tag, _ in shown.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(late - early <= 1 for early, late in itertools.pairwise(levels))
    assert len(shown.text["caption"]) == len(shown.attributes("table"))
    assert all(shown.text["caption"])
    assert {cell.get("scope") for cell in shown.attributes("th")} == {"col", "row"}
    assert len(shown.text["figcaption"]) == len(shown.attributes("img")) == 4
    for attributes, caption in zip(shown.attributes("img"), shown.text["figcaption"], strict=True):
        assert len(attributes["alt"]) > 40
        assert len(caption.strip()) > 40
        with image_of(attributes) as image:
            width, height = int(attributes["width"]), int(attributes["height"])
            assert width / height == pytest.approx(image.width / image.height, rel=0.01)
            assert len(image.convert("L").resize((64, 64)).getcolors()) > 5, "nothing is drawn"


def test_the_values_are_those_of_the_run():
    whole = full_run(blocks=3, iterations=9)
    shown = read(whole)
    rows = [row[:1] + tuple("" if cell == "\N{EN DASH}" else cell for cell in row[1:]) for row in shown.rows]
    expected = [
        *summary_rows(whole.result, whole.metrics),
        *scale_table(whole.result).rows,
        *layer_rows(whole.inspection, "kind"),
        *layer_rows(whole.inspection, "depth"),
        *((name, str(value)) for name, value in dataclasses.asdict(whole.result.config).items()),
        *((name, str(value)) for name, value in whole.facts.arguments.items()),
        ("eval_loss", "1.260"),
        ("eval_accuracy", "49.37%"),
        ("eval_runtime", "0.4100 s"),
        ("train_runtime", "61.24 s"),
        ("train_samples_per_second", "12,346"),
        ("epoch", "27"),
    ]
    assert [row for row in expected if row not in rows] == []
    facts = dict(zip(shown.text["dt"], shown.text["dd"], strict=True))
    assert facts["Model"] == "ViTForImageClassification (vit)"
    assert facts["Parameters"] == "340,954"
    assert facts["Classes"] == "10"
    assert facts["Data set"] == "uoft-cs/cifar10 (configuration plain_text, evaluated on test)"
    assert facts["Device"] == "cuda, 2 processes"
    assert facts["Recipe"] == "vit-tiny/cifar10/nio"
    assert facts["Started from"] == "outputs/init/nio_init"
    assert facts["Iterations"] == "9"
    assert facts["Groups that share a scale"] == "4"
    assert facts["Reported on"] == "4 batches of 64 samples"
    assert facts["Peak memory"] == "1.50 GiB"
    assert facts["torch"] == "2.13.0"
    text = shown.text["body"][0]
    assert whole.result.message in text
    assert whole.result.description in text
    assert "33.5 training steps of 64 samples, its reports included, in 7.2 seconds, 10.6% of the time of NIO" in text
    gain, error = whole.result.gain, whole.result.gain_standard_error
    assert f"GradCosine changed by +{gain:.4f} ± {error:.4f}, with the standard error" in text
    assert "Left as they were: 1 frozen." in text
    assert "GradCosine 0.3000, gradient norm 6.3, loss 2.3100" in text
    assert RECIPE in shown.text["code"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("steps", [(0, 0), (300, 600), (600, 600)])
@pytest.mark.parametrize("outcome", [None, result(), result(parts=1)], ids=["no NIO", "NIO", "one batch"])
def test_a_run_is_shown_with_whatever_it_has(outcome, steps):
    for metrics, log, recipe, inspected in itertools.product(
        (None, METRICS), ((), LOG), (None, RECIPE), (None, inspection())
    ):
        shown = read(run(result=outcome, steps=steps, metrics=metrics, log=log, recipe=recipe, inspection=inspected))
        expected = {
            "summary": outcome or metrics,
            "nio": outcome,
            "training": metrics or log,
            "layers": inspected,
            "reproduce": recipe,
            "reading": True,
        }
        assert sections(shown) == [name for name, there in expected.items() if there]
        links = [link["href"].removeprefix("#") for link in shown.attributes("a")]
        assert links == [*sections(shown), PAPER]
        text = shown.text["body"][0]
        assert outcome is not None or "None" not in text
        assert "nan" not in text
        assert ("GradCosine changed by" in text) == (outcome is not None and len(outcome.before.parts) > 1)


@pytest.mark.usefixtures("no_plots")
def test_the_headline_says_how_far_the_training_came():
    headlines = {
        (0, 0): "This model is not trained. Its predictions mean nothing yet.",
        (1, 1): "This model was trained for 1 step.",
        (1200, 1200): "This model was trained for 1,200 steps.",
        (300, 1200): "This training is not finished: step 300 of 1,200.",
    }
    for steps, headline in headlines.items():
        assert headline in read(run(steps=steps)).text["p"]
    initialised = "This is an initialised checkpoint, not a trained model. Its predictions mean nothing yet."
    assert initialised in read(run(result=result())).text["p"]
    facts = Facts("ViTForImageClassification", dataset="user/images")
    assert "This model was trained for 1 step on user/images." in read(run(steps=(1, 1), facts=facts)).text["p"]
    ended = dataclasses.replace(run(steps=(300, 1200)), has_ended=True, kept_step=200)
    kept = "This model was trained for 300 of 1,200 steps. The weights are those of step 200, the best evaluation."
    assert kept in read(ended).text["p"]
    assert "Training" in read(run(steps=(1, 1), metrics=METRICS)).text["h2"]
    assert "Evaluation" in read(run(metrics=METRICS)).text["h2"]
    assert "No loss was logged. Lower logging_steps to see one." in read(run(steps=(1, 1), metrics=METRICS)).text["p"]


@pytest.mark.usefixtures("no_plots")
def test_every_status_has_its_word_and_colour():
    looks = set()
    for status in typing.get_args(Status):
        shown = read(run(result=result(status=status)))
        assert any(f"Status of NIO: {status.replace('_', ' ')}" in text for text in shown.text["strong"])
        classes = [attributes.get("class") or "" for attributes in shown.attributes("div")]
        looks |= {name for name in classes if name.startswith("status ")}
    assert len(looks) == 4, "the two ways in which NIO did not come to its end look alike"
    assert all(f".{look.split()[1]} {{" in shown.text["style"][0] for look in looks)


@pytest.mark.parametrize(
    "shown",
    [
        run(result=result(iterations=0, parts=1, status="data_exhausted")),
        run(result=dataclasses.replace(result(), groups=(), tensors=(), excluded=())),
        run(result=result(1, 1, 1), steps=(3, 3), log=BROKEN_LOG, metrics={"eval_loss": math.nan, "x": math.inf}),
        run(steps=(3, 3), log=[{"step": 1, "grad_norm": 2.0}, {"step": 1, "loss": math.nan}]),
        run(inspection=GradientInspection(measured(0.3, 1), ())),
    ],
    ids=["no iteration", "no tensor", "not finite", "nothing finite", "no layer"],
)
def test_odd_runs_are_drawn(shown):
    for attributes in read(shown).attributes("img"):
        image_of(attributes).verify()


@pytest.mark.usefixtures("no_plots")
def test_what_is_not_finite_is_said():
    shown = read(run(steps=(3, 3), log=BROKEN_LOG, metrics={"eval_loss": math.nan, "x": math.inf}))
    assert "3 values are not finite and not drawn." in shown.text["figcaption"][0]
    assert ("eval_loss", "nan") in shown.rows
    assert ("x", "inf") in shown.rows
    assert "not finite" not in read(run(steps=(3, 3), log=LOG)).text["figcaption"][0]


@pytest.mark.usefixtures("no_plots")
def test_text_of_the_user_is_no_html():
    facts = Facts(
        NASTY, NASTY, dataset=NASTY, dataset_config=NASTY, dataset_split=NASTY, recipe=NASTY, device=NASTY,
        started_from=NASTY, arguments={NASTY: NASTY, "names": [NASTY]},
    )  # fmt: skip
    told = dataclasses.replace(result(), message=NASTY, description=NASTY, title=NASTY)
    more = {"versions": {NASTY: NASTY, "nio_hf": NASTY}, "metrics": {NASTY: 1.0}, "recipe": NASTY}
    shown = read(run(NASTY, facts=facts, result=told, steps=(1, 1), **more))
    assert "script" not in shown.text
    assert shown.text["h1"] == [NASTY]
    assert shown.text["title"] == [f"{NASTY} | NIO report"]
    assert NASTY in shown.text["code"]
    assert (NASTY, NASTY) in shown.rows
    assert (NASTY, "1") in shown.rows


@pytest.mark.usefixtures("no_plots")
def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    write_page(run("run-\udcff"), path)
    assert "run-\N{REPLACEMENT CHARACTER}" in Page(path.read_text(encoding="utf-8")).text["h1"]
    write_page(run(versions=VERSIONS), path)
    assert path.read_text(encoding="utf-8") == render_page(run(versions=VERSIONS))

    def full(self, *args, **kwargs):
        with self.open("w") as handle:
            handle.write("half")
        raise OSError(28, "No space left on device")

    held = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"report\.html: .*No space left on device\. Free space or choose another"):
        write_page(run("other"), path)
    assert path.read_bytes() == held
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("name", ["file/report.html", "folder"])
def test_a_path_that_cannot_be_written_is_an_error_of_ours(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="Free space or choose another --output"):
        write_page(run(), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
