"""The model card: metadata for the Hub and text for people."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from nio_hf.errors import HubError, OutputError
from nio_hf.hub import Destination
from nio_hf.hub.card import MARKER, card_text, write_card
from nio_hf.hub.push import CARD_NAME, card_on_hub, push_folder
from nio_hf.report import draw_run
from nio_hf.report.run import Facts, Run
from tests.report.runs import result

FACTS = Facts(
    model="ViTForImageClassification",
    model_type="vit",
    parameters=1_234_567,
    classes=10,
    dataset="uoft-cs/cifar10",
    dataset_config="plain_text",
    dataset_split="test",
    recipe="vit-tiny/cifar10/nio",
    processes=2,
)
METRICS = {"eval_accuracy": 0.8765432, "eval_loss": 0.5, "eval_runtime": 3.0, "train_runtime": 321.0}
INITIALISED = Run(
    "my-vit", FACTS, result(groups=3), {"nio_hf": "0.1.0", "torch": "2.13.0"}, recipe="learning_rate: 0.001\n"
)
TRAINED = dataclasses.replace(INITIALISED, steps=90, max_steps=90, metrics=METRICS)
VARIANTS = [INITIALISED, TRAINED, dataclasses.replace(TRAINED, result=None, recipe=None)]


def trained(**changes):
    return dataclasses.replace(TRAINED, **changes)


def text(run, **options):
    return card_text(run, Path("/run"), {}, **{"repo_id": "user/my-vit", "license_id": "unknown", **options})


def parsed(run, **options):
    return ModelCard(text(run, **options))


def test_the_first_line_says_that_an_initialised_checkpoint_is_not_trained():
    first = parsed(INITIALISED).text.strip().splitlines()[0]
    assert first.startswith("**This is an initialised checkpoint, not a trained model.")
    assert "trained for 90 steps on `uoft-cs/cifar10`" in parsed(TRAINED).text.strip().splitlines()[0]
    for changes, said in (
        ({"steps": 30}, "not finished: step 30 of 90"),
        ({"steps": 30, "has_ended": True}, "was trained for 30 of 90 steps"),
        ({"kept_step": 60}, "The weights are those of step 60, the best evaluation."),
    ):
        assert said in parsed(trained(**changes)).text.strip().splitlines()[0]
    untrained = parsed(dataclasses.replace(INITIALISED, result=None)).text
    assert untrained.strip().startswith("**This model is not trained.")


def test_the_metadata_of_an_initialised_checkpoint():
    data = parsed(INITIALISED, tags=["mine", "nio"]).data
    assert data.library_name == "transformers"
    assert data.tags == ["nio", "initialization", "untrained", "vit", "mine"]
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.license == "unknown"
    assert data.eval_results is None
    assert data.get("pipeline_tag") is None, "there is nothing to try"
    assert data.get("base_model") is None


def test_the_metadata_of_a_trained_model_has_its_evaluation():
    card = parsed(TRAINED, license_id="apache-2.0")
    data = card.data
    assert (data.license, data.pipeline_tag, data.metrics) == ("apache-2.0", "image-classification", ["accuracy"])
    assert "untrained" not in data.tags
    (one,) = data.eval_results
    assert one.metric_name == "Accuracy", "neither seconds nor, beside it, the loss are a result"
    assert (one.metric_value, one.metric_type) == (0.876543, "accuracy")
    assert [one.dataset_name, one.dataset_config, one.dataset_split] == ["uoft-cs/cifar10", "plain_text", "test"]
    diverged = parsed(trained(metrics={**METRICS, "eval_loss": math.nan}))
    assert [one.metric_name for one in diverged.data.eval_results] == ["Accuracy"]
    raw = yaml.safe_load(card.content.split("---")[1])
    assert raw["model-index"][0]["name"] == "my-vit"


def test_the_numbers_are_those_of_the_run():
    content = text(TRAINED)
    outcome = TRAINED.result
    assert f"| GradCosine (D = 4, B/D = 16) | {outcome.before.value:.4f}" in content
    assert f"| {outcome.after.value:.4f} ±" in content
    assert f"in 7.2 seconds, {100 * 7.25 / (7.25 + 321):.1f}% of the time of NIO and training together." in content
    assert "NIO took the arithmetic of 33.5 training steps of 64 samples" in content
    assert "| group 1 | 8 | 1,536 | 1.301 |" in content
    assert "1,234,567 parameters, 10 classes, data set `uoft-cs/cifar10` (plain_text)" in content
    assert "| accuracy | 0.8765 |" in content
    assert outcome.message in content
    assert outcome.description in content
    assert "On 4 report batches of 64 samples" in content
    one_class = trained(facts=dataclasses.replace(FACTS, classes=1))
    assert "1,234,567 parameters, 1 class, " in text(one_class)
    many = trained(result=result(4, groups=48))
    assert "Scales of 48 groups by kind of tensors:\n\n| kind | tensors |" in text(many)


@pytest.mark.parametrize("run", [INITIALISED, TRAINED])
def test_it_says_how_to_load_reproduce_and_cite(run):
    content = text(run)
    assert 'ViTForImageClassification.from_pretrained("user/my-vit")' in content
    assert "learning_rate: 0.001" in content
    assert f"nio-hf {'train' if run.is_trained else 'init'} nio_recipe.yaml" in content
    assert "nio_hf 0.1.0, torch 2.13.0." in content
    assert "arXiv:2210.05956" in content
    assert "{{The nio_hf developers}}" in content
    for heading in ("Limitations", "Licence", "Citation", "How to load it", "How to reproduce it"):
        assert f"\n## {heading}\n" in content
    assert "Not chosen yet" in content
    assert "Not chosen yet" not in text(run, license_id="mit")


@pytest.mark.parametrize("run", VARIANTS)
def test_it_is_clean_markdown_without_talk_of_fine_tuning(run):
    content = text(run)
    assert "fine-tuned" not in content.lower()
    assert "[]()" not in content
    assert "\n\n\n" not in content
    assert "None" not in content
    assert all(line == line.rstrip() for line in content.splitlines())
    lines = content.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|") and not lines[number - 1].startswith("|"):
            assert lines[number - 1] == "", f"a table without an empty line before it: {line}"


def test_models_are_loaded_in_their_own_way(tmp_path):
    assert "AutoImageProcessor" not in text(TRAINED)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert 'AutoImageProcessor.from_pretrained("user/my-vit"' in card_text(TRAINED, tmp_path, {}, "user/my-vit", "mit")
    language = dataclasses.replace(FACTS, model="BertForMaskedLM", model_type="bert", classes=None, dataset=None)
    content = text(trained(facts=language, metrics={"eval_loss": 2.5}))
    assert "from transformers import BertForMaskedLM" in content
    assert ModelCard(content).data.pipeline_tag == "fill-mask"
    assert ModelCard(content).data.eval_results[0].dataset_name == "unknown"
    own = dataclasses.replace(FACTS, model="MyNet", model_type=None)
    content = text(dataclasses.replace(INITIALISED, facts=own))
    assert ModelCard(content).data.library_name is None
    assert "safetensors.torch.load_model(model" in content


@pytest.mark.parametrize("dataset", ["digits", "imagefolder", "/data/images", "./images", None])
def test_only_data_sets_of_the_hub_are_linked(dataset):
    run = trained(facts=dataclasses.replace(FACTS, dataset=dataset))
    assert parsed(run).data.datasets is None


def test_plots_are_embedded_by_a_path_in_the_repository(tmp_path):
    run = trained(log_history=[{"step": 1, "loss": 2.0}])
    write_card(run, tmp_path, draw_run(run, tmp_path / "plots"))
    content = (tmp_path / CARD_NAME).read_text()
    for name in ("nio_history", "nio_scales", "training"):
        assert f"](plots/{name}.png)" in content
        assert (tmp_path / "plots" / f"{name}.png").is_file()


def test_the_hub_accepts_every_card(hub, tmp_path):
    for number, run in enumerate(VARIANTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_card(run, folder, {}, "user/model", license_id="apache-2.0")
        push_folder(folder, Destination("user/model"), "Card", waits=())
    loaded = ModelCard.load(tmp_path / "1" / CARD_NAME)
    assert hub.repositories["user/model"].files()[CARD_NAME].decode() == (tmp_path / "2" / CARD_NAME).read_text()
    assert loaded.data.eval_results


def test_a_card_of_your_own_is_left_alone(hub, tmp_path):
    destination = Destination("user/model")
    assert card_on_hub(destination) is None
    assert write_card(INITIALISED, tmp_path, {}, "user/model", license_id="mit")
    push_folder(tmp_path, destination, "1", waits=())
    assert write_card(TRAINED, tmp_path, {}, "user/model", card_on_hub(Destination("user/model", revision="new")))
    assert ModelCard.load(tmp_path / CARD_NAME).data.license == "mit", "the licence is that of the card on the Hub"
    own = (tmp_path / CARD_NAME).read_text().replace(MARKER, "").replace("# model", "# My own words")
    (tmp_path / CARD_NAME).write_text(own)
    assert write_card(INITIALISED, tmp_path, {}, "user/model", card_on_hub(destination))
    assert (tmp_path / CARD_NAME).read_text() == own
    push_folder(tmp_path, destination, "2", waits=())
    (tmp_path / CARD_NAME).unlink()
    assert not write_card(INITIALISED, tmp_path, {}, "user/model", card_on_hub(destination))
    assert not (tmp_path / CARD_NAME).exists(), "what was written on the Hub stays there"


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_sent(hub, tmp_path):
    write_card(INITIALISED, tmp_path, {}, license_id="my-licence")
    with pytest.raises(HubError, match="license"):
        push_folder(tmp_path, Destination("user/model"), "Card", waits=())
    assert CARD_NAME not in hub.repositories["user/model"].files()


def test_a_recipe_cannot_end_its_block():
    recipe = "run_name: |\n  a\n  ```\n  {{ 7*7 }}\n"
    content = text(dataclasses.replace(INITIALISED, recipe=recipe))
    block = re.search(r"^(`{4,})yaml\n(.*?)\n\1$", content, re.DOTALL | re.MULTILINE)
    assert block is not None
    assert yaml.safe_load(block[2]) == yaml.safe_load(recipe)


def test_a_card_that_cannot_be_written(tmp_path):
    (tmp_path / CARD_NAME).mkdir()
    with pytest.raises(OutputError, match=CARD_NAME):
        write_card(INITIALISED, tmp_path, {})
