"""The commands with a Hub, each in a process of its own: push, load back, train from it, and failures."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from nio_hf.hub.push import CARD_NAME
from tests.hub.loopback import LoopbackHub

NIO = [sys.executable, "-m", "nio_hf.cli"]
RECIPE = "vit-tiny/digits/nio"
SMALL = ["--use_cpu", "true", "--max_steps", "3", "--disable_tqdm", "true"]
LOAD = """
import sys
from transformers import AutoModelForImageClassification, set_seed
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from nio_hf.trainer.digests import fingerprint
set_seed(3)
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], revision=sys.argv[2])
AutoImageProcessor.from_pretrained(sys.argv[1], revision=sys.argv[2], backend="pil")
print(model.config.nio["fingerprint"] == fingerprint(model), model.config.nio["fingerprint"])
"""
IMAGES = """
import datasets, numpy, PIL.Image
features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
pixels = numpy.random.default_rng(0).integers(0, 255, (100, 8, 8, 3), dtype="uint8")
columns = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": [0, 1] * 50}
datasets.Dataset.from_dict(columns, features=features).to_parquet("images.parquet")
"""


class Desk:
    """A folder with a Hub, and commands that run in it."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder

    def start(self, *command, token="hf_write", **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= self.hub.environment(self.folder / "home", token=token)
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(Path.cwd()), **variables}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *command, status=0, token="hf_write", **variables):
        process = self.start(*command, token=token, **variables)
        out, errors = process.communicate(timeout=240)
        assert process.returncode == status, errors[-3000:]
        assert "Traceback" not in errors
        return out + errors

    def nio(self, *command, **options):
        return self.run(*NIO, *command, **options)

    def loaded(self, repo, revision="main"):
        return self.run(sys.executable, "-c", LOAD, repo, revision)

    def files(self, repo, revision="main"):
        return self.hub.repositories[repo].files(revision)

    def card(self, repo):
        return ModelCard(self.files(repo)[CARD_NAME].decode())


@pytest.fixture
def desk(tmp_path):
    with LoopbackHub() as hub:
        yield Desk(hub, tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A Hub with `user/init`, which `nio-hf init` pushed."""
    with LoopbackHub() as hub:
        desk = Desk(hub, tmp_path_factory.mktemp("desk"))
        shown = desk.nio("init", RECIPE, *SMALL, "--push_to_hub", "user/init", "--private")
        assert f"On the Hub: {hub.endpoint}/user/init" in shown
        yield desk


def test_init_pushes_all_that_belongs_to_an_initialised_checkpoint(shared):
    files = shared.files("user/init")
    local = shared.folder / "outputs" / "vit-tiny-digits-nio" / "_nio_init"
    expected = {"model.safetensors", "config.json", "preprocessor_config.json", "nio_state.json", "nio_run.json"}
    expected |= {"nio_recipe.yaml", "plots/nio_history.png", "plots/nio_scales.png", CARD_NAME}
    assert files.keys() - {".gitattributes"} == expected
    assert all(files[name] == (local / name).read_bytes() for name in expected)
    assert shared.hub.repositories["user/init"].private
    card = shared.card("user/init")
    assert "not a trained model" in card.text
    assert card.data.tags == ["nio", "initialization", "untrained", "vit"]
    for name in re.findall(r"\]\((plots/[^)]+)\)", card.text):
        assert name in files


@pytest.mark.slow
def test_it_is_loaded_back_bit_for_bit_by_who_may_see_it(shared):
    state = json.loads(shared.files("user/init")["nio_state.json"])
    assert f"True {state['mark']['fingerprint']}" in shared.loaded("user/init")
    stranger = {"token": None, "HF_HOME": str(shared.folder / "x")}
    process = shared.start(sys.executable, "-c", LOAD, "user/init", "main", **stranger)
    assert "user/init" in process.communicate(timeout=100)[1]
    assert process.returncode != 0


def test_a_training_starts_from_it_and_is_pushed_with_its_evaluation(shared):
    start = ["--model_name_or_path", "user/init", "--output_dir", "trained", "--push_to_hub", "user/trained"]
    shown = shared.nio("train", RECIPE, *SMALL, *start)
    assert "NIO is skipped: the model was loaded from an initialised checkpoint." in shown
    card = shared.card("user/trained")
    results = json.loads((shared.folder / "trained" / "all_results.json").read_text())
    accuracy = next(r for r in card.data.eval_results if r.metric_name == "Accuracy")
    assert accuracy.metric_value == pytest.approx(results["eval_accuracy"], abs=1e-6)
    assert "started from the initialised checkpoint `user/init`" in card.text
    assert "trained for 3 steps on `digits`" in card.text
    before = re.search(r"\| GradCosine \(D = 4, B/D = 16\) \|.*", card.text)
    assert before is not None
    assert before[0] in shared.files("user/init")[CARD_NAME].decode()
    assert "nio" not in json.loads(shared.files("user/trained")["config.json"]), "trained weights are not marked"


@pytest.mark.slow
def test_it_is_inspected_by_its_name_and_one_that_is_not_there_is_named(shared):
    shown = shared.nio("inspect", "user/init", "--use_cpu", "true")
    written = json.loads((shared.folder / "outputs/inspect/init/inspect/inspection.json").read_text())
    after = json.loads(shared.files("user/init")["nio_state.json"])["result"]["after"]
    assert written["measured"]["value"] == pytest.approx(after["value"], abs=1e-6)
    assert "By kind" in shown
    assert "user/nothing: cannot be loaded" in shared.nio("inspect", "user/nothing", "--use_cpu", "true", status=1)


@pytest.mark.slow
def test_another_number_of_classes_is_refused(shared):
    data = ["--dataset_name", "parquet", "--data_files", "images.parquet", "--label_column", "label"]
    shared.run(sys.executable, "-c", IMAGES)
    start = ["--model_name_or_path", "user/init", "--output_dir", "two"]
    shown = shared.nio("train", RECIPE, *SMALL, *data, *start, status=1)
    assert "'user/init' has 10 classes, the data set 2. Give a data set of as many classes, or initialise" in shown


@pytest.mark.slow
def test_push_by_hand_again_and_to_a_branch(shared):
    push = ["push", "outputs/vit-tiny-digits-nio", "user/by-hand"]
    shown = shared.nio(*push, "--license", "apache-2.0", "--tag", "mine")
    assert f"Pushed outputs/vit-tiny-digits-nio/_nio_init to {shared.hub.endpoint}/user/by-hand" in shown
    shared.nio(*push, "--revision", "v2", "--commit_message", "Second", "--tag", "other")
    repository = shared.hub.repositories["user/by-hand"]
    assert repository.commits[-1].title == "Second"
    assert shared.card("user/by-hand").data.license == "apache-2.0"
    assert shared.loaded("user/by-hand", "v2").startswith("True")


@pytest.mark.slow
def test_what_is_wrong_is_said_before_nio_starts(desk):
    shown = desk.nio("init", RECIPE, *SMALL, "--push_to_hub", "user/model", token="hf_read", status=1)
    assert "HubError: user/model: the token of user may only read" in shown
    assert desk.hub.repositories == {}
    assert not (desk.folder / "outputs" / "vit-tiny-digits-nio" / "_nio_init").exists()


@pytest.mark.slow
def test_the_end_of_a_script_waits_for_its_push(desk):
    script = (
        "import sys, safetensors.torch, torch\n"
        "from tests.trainer.toys import trained\n"
        "trainer = trained('out', push_to_hub=True, hub_model_id='user/model', hub_strategy='end')\n"
        "for name in 'ab':\n"
        "    safetensors.torch.save_file({'x': torch.rand(9)}, f'out/{name}.safetensors')\n"
        "trainer.push_to_hub(blocking=False)\n"
    )
    desk.hub.delay("POST /api/models/*/preupload/*", seconds=2, times=1)
    desk.run(sys.executable, "-c", script)
    assert {"a.safetensors", "b.safetensors", "model.safetensors"} <= desk.files("user/model").keys()


@pytest.mark.slow
def test_a_training_whose_push_fails_is_saved_and_its_command_pushes_it(desk):
    desk.hub.fail("POST /api/models/*/commit/*", status=403, times=None)
    shown = desk.nio("train", RECIPE, *SMALL, "--push_to_hub", "user/model", status=1)
    assert "Evaluation accuracy" in shown, "the report comes first"
    assert not [line for line in shown.splitlines() if line.endswith("nio-hf push")], "a command stays in one line"
    command = re.search(r"push it later: nio-hf (push .*)\.$", shown, re.MULTILINE)
    assert command is not None
    desk.hub.clear()
    desk.nio(*shlex.split(command[1]))
    assert "trained for 3 steps" in desk.files("user/model")[CARD_NAME].decode()


@pytest.mark.slow
def test_an_interrupted_upload_leaves_all_here(desk):
    desk.nio("init", RECIPE, *SMALL)
    desk.hub.delay("PUT /_lfs/*", seconds=30, times=1)
    process = desk.start(*NIO, "push", "outputs/vit-tiny-digits-nio", "user/model")
    deadline = time.monotonic() + 60
    while not any("objects/batch" in call.path for call in desk.hub.calls) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Push it later: nio-hf push outputs/vit-tiny-digits-nio/_nio_init user/model" in errors
    assert CARD_NAME not in desk.files("user/model")
    desk.nio("push", "outputs/vit-tiny-digits-nio/_nio_init", "user/model")
    assert "model.safetensors" in desk.files("user/model")
