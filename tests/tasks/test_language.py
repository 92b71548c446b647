"""From a recipe of text to its Trainer, with refusals on the way."""

import os
import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from nio_hf.errors import ModelError, NIOError, RecipeError
from nio_hf.hub.card import card_text
from nio_hf.hub.run_folder import read_run
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION, LOSS, MASKED_LM
from nio_hf.recipe.loading import load_recipe
from nio_hf.report.page import render_page
from nio_hf.tasks import build_trainer, describe_data
from nio_hf.tasks.language import find_block_size
from nio_hf.text.tokenizers import load_tokenizer
from nio_hf.train import train
from nio_hf.validate import validate_recipe
from tests.tasks.recipes import text_recipe
from tests.trainer.toys import load_state


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model_config.vocab_size", "200", "vocab_size: a vocabulary of 200, and the tokeniser has 260"),
        ("block_size", "33", "block_size: 33 tokens, and the model has 32 positions"),
        ("tokenizer", "/nowhere", "tokenizer: '/nowhere' cannot be loaded"),
        ("text_column", "texts", "text_column: 'texts' is no column"),
    ],
)
def test_what_does_not_go_together_is_refused_before_nio(setting, value, message, tmp_path):
    with pytest.raises(NIOError, match=re.escape(message)):
        build_trainer(text_recipe(tmp_path, "gpt2", f"--{setting}", value))


def test_the_positions_of_roberta_begin_behind_that_of_the_padding():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=300, max_position_embeddings=34, **sizes))
    recipe = load_recipe("bert-tiny/stdlib/nio", ["--block_size", "null"])
    assert find_block_size(recipe, model) == 32
    with pytest.raises(ModelError, match="33 tokens, and the model has 32 positions"):
        find_block_size(recipe.replace({"block_size": 33}), model)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("mlm_probability: 0.2", "mlm_probability: is a setting of masked language modelling, and the task is causal"),
        ("image_column: text", "image_column: is a setting of images, and the task is causal-lm. Leave it out"),
        ("mixup_alpha: 0.8", "mixup_alpha: is a setting of images"),
        ("block_size: 1", "block_size: 1. Give a whole number of at least 2"),
        ("num_proc: 0", "num_proc: 0. Give a whole number of at least 1"),
    ],
)
def test_settings_of_another_task_and_out_of_range_are_refused(more, message, tmp_path):
    with pytest.raises(RecipeError, match=re.escape(message)):
        text_recipe(tmp_path, "gpt2", more=more)


def test_the_task_is_found_where_the_architecture_can_learn_one_only(tmp_path):
    def task_of(text):
        (tmp_path / "recipe.yaml").write_text(f"{text}\noutput_dir: {tmp_path / 'output'}\nuse_cpu: true\n")
        return load_recipe(str(tmp_path / "recipe.yaml")).task

    texts = ("model_type: gpt2", "model_type: vit", "task: masked-lm\nmodel_type: bert")
    assert [task_of(text) for text in texts] == [CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM]
    for text, message in (
        ("model_type: bert", "task: nothing, and bert can learn causal-lm and masked-lm. Set task"),
        ("task: causal-lm\nmodel_type: bert", "'bert' is an encoder, and the task is causal-lm. Set task: masked-lm"),
        ("task: masked-lm\nmodel_type: gpt2", "'gpt2' is no architecture of transformers for masked-lm"),
    ):
        with pytest.raises(RecipeError, match=message):
            task_of(text)


def test_a_tokeniser_without_a_mask_is_refused_by_a_masked_recipe(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").mask_token is None
    recipe = text_recipe(tmp_path, "bert", "--tokenizer", str(tmp_path / "tokenizer"))
    with pytest.raises(ModelError, match=r"tokenizer: no mask_token. Choose the tokeniser of a masked model"):
        build_trainer(recipe)


def test_the_vocabulary_and_special_tokens_are_those_of_the_tokeniser(tmp_path):
    recipe = text_recipe(tmp_path, "gpt2")
    trainer = build_trainer(recipe)
    tokenizer, config = trainer.processing_class, trainer.model.config
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    facts = describe_data(recipe)
    assert (facts.choices, facts.evaluated, recipe.metric) == (len(tokenizer), None, LOSS)
    assert len(trainer.data.train[0]["input_ids"]) == 32


def test_a_recipe_of_text_trains_reports_and_goes_on_from_its_checkpoint(tmp_path):
    recipe = text_recipe(tmp_path, "gpt2", "--nio", "true")
    report = train(recipe)
    shown = {name for name, _, _ in report.rows}
    assert {"Evaluation loss", "Evaluation perplexity", "Evaluation bits per byte"} <= shown
    assert not any("ccuracy" in name for name in shown)
    assert (tmp_path / "output" / "nio_sample.txt").read_text().startswith("def ")
    kept = [line for line in recipe.path.read_text().splitlines() if not line.startswith(("model_", "output_dir"))]
    lines = [*kept, f"model_name_or_path: {tmp_path / 'output' / '_nio_init'}", f"output_dir: {tmp_path / 'second'}"]
    (tmp_path / "checkpoint.yaml").write_text("\n".join(lines))
    trainer = build_trainer(load_recipe(str(tmp_path / "checkpoint.yaml"), ["--nio", "true"]))
    trainer.train()
    assert trainer.nio_result is None, "the initialised checkpoint is known again"


def test_a_text_training_that_diverges_says_so_and_leaves_no_sample_of_an_earlier_one(tmp_path):
    short = ("--max_steps", "2", "--nio", "false")
    assert train(text_recipe(tmp_path, "gpt2", *short)).failure is None
    (sample,) = tmp_path.rglob("nio_sample.txt")
    run = train(text_recipe(tmp_path, "gpt2", *short, "--learning_rate", "1e30", "--max_grad_norm", "0"))
    assert "diverged" in str(run.failure)
    assert not sample.exists()
    assert sample.with_name("all_results.json").exists()


def test_page_and_card_show_a_sample_and_say_what_the_data_are(tmp_path):
    options = ["--dataset_name", "stdlib", "--max_train_samples", "20", "--max_eval_samples", "2", "--block_size", "32"]
    recipe = text_recipe(tmp_path, "gpt2", *options).path
    text = "\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("data"))
    recipe.write_text(text + "\n")
    train(load_recipe(str(recipe), options))
    run = read_run(tmp_path / "output")
    sample = (tmp_path / "output" / "nio_sample.txt").read_text()
    page, card = render_page(run), card_text(run, tmp_path / "output", {}, "somebody/model", "mit")
    assert '<h2 id="sample">What the model writes</h2>' in page
    assert f"```text\n{sample}\n" in card
    version = ".".join(map(str, sys.version_info[:3]))
    for shown in (page, card):
        assert "stdlib" in shown
        assert f"Python {version}, licence PSF-2.0" in shown
        assert "ccuracy" not in shown
    assert "AutoTokenizer, GPT2LMHeadModel" in card
    assert "pipeline_tag: text-generation" in card


def test_a_recipe_of_text_is_validated_with_its_data(tmp_path):
    recipe = text_recipe(tmp_path, "gpt2", "--nio", "true")
    found = validate_recipe(str(recipe.path), ["--nio", "true"], with_data=True)
    assert found.error is None, str(found.error)
    assert "blocks of 32 tokens read" in found.summary
    assert "a short run of NIO: GradCosine" in found.summary


@pytest.mark.slow
def test_two_processes_find_the_scales_of_one(tmp_path):
    found = []
    for processes in (1, 2):
        recipe = text_recipe(tmp_path / str(processes), "bert", more="dataloader_pin_memory: false\n")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launch, "-m", "nio_hf.cli", "init", str(recipe.path), "--nio", "true"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load_state(tmp_path / str(processes) / "output" / "_nio_init"))
    scales = [[tensor.omega for tensor in result.tensors] for result in found]
    assert max(scales[0]) > 1.5
    assert scales[1] == pytest.approx(scales[0], rel=1e-5)
    assert found[1].after.loss == pytest.approx(found[0].after.loss, rel=1e-5)
