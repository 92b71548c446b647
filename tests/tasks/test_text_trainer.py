"""Trainer of language models: losses, metrics, NIO by token, and resumed runs."""

import math

import pytest
import torch
from torch.nn import functional

from nio_hf.tasks import build_trainer
from tests.tasks.recipes import TEXT_MODELS, text_recipe, weights


def trainer_of(folder, name, *overrides):
    return build_trainer(text_recipe(folder, name, *overrides))


def _loss_by_token(trainer, batch):
    """Mean over the predicted tokens, one by one."""
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels, shifted = batch["labels"], "bert" not in type(trainer.model).__name__.lower()
    losses = [
        float(functional.cross_entropy(logits[row, place - shifted], labels[row, place]))
        for row in range(len(labels))
        for place in range(shifted, labels.shape[1])
        if labels[row, place] != -100
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_loss_of_nio_and_of_the_evaluation_is_the_mean_over_tokens(name, tmp_path):
    trainer = trainer_of(tmp_path, name)
    trainer.model.eval()
    batches = list(trainer.get_eval_dataloader())
    means = [_loss_by_token(trainer, batch) for batch in batches]
    with torch.no_grad():
        total, tokens = trainer.compute_nio_loss(trainer.model, batches[0])
        counts = [float(trainer.compute_nio_loss(trainer.model, batch)[1]) for batch in batches]
    assert float(total / tokens) == pytest.approx(means[0], rel=1e-4)
    assert len(set(counts)) > 1, "a short block would not be told from others"
    expected = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-3)
    if name == "bert":
        assert "eval_bits_per_byte" not in metrics, "a masked model sees the bytes on both sides"
    else:
        assert metrics["eval_bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-4)
    assert {f"eval_{metric}" for metric in trainer.metric_names} <= metrics.keys()


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_nio_runs_and_is_the_same_in_parts(name, tmp_path):
    """Sub-batches have different numbers of predicted tokens: parts are weighted by them."""
    scales = []
    for parts in ("null", "1"):
        trainer = trainer_of(tmp_path, name, "--nio", "true", "--nio_micro_batch_size", parts)
        result = trainer.run_nio()
        scales.append(result.scales)
        assert any(omega != 1 for omega in result.scales.values())
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(name, workers, tmp_path):
    options = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "6", "--dataloader_num_workers", workers]
    options += ["--ema_decay", "0.9", "--nio", "true"]
    whole = trainer_of(tmp_path, name, *options)
    whole.train()
    resumed = trainer_of(tmp_path, name, *options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-6"))
    assert torch.equal(weights(resumed), weights(whole))


def test_a_step_is_the_same_however_its_blocks_are_accumulated(tmp_path):
    found = []
    for size, steps in ((8, 1), (2, 4)):
        options = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)]
        options += [f"--model_config.{part}_pdrop=0" for part in ("resid", "embd", "attn")]
        trainer = trainer_of(tmp_path, "gpt2", *options, "--optim", "sgd", "--learning_rate", "0.1")
        trainer.train()
        found.append(weights(trainer))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_a_race_may_be_held(tmp_path):
    options = ["--max_steps", "30", "--learning_rate", "1e-2", "--nio", "true", "--nio_race_steps", "4"]
    trainer = trainer_of(tmp_path, "gpt2", *options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1
    assert trainer.nio_result.race is not None


def test_a_causal_model_writes_behind_its_prompt_the_same_each_time(tmp_path):
    trainer = trainer_of(tmp_path, "gpt2")
    state = torch.get_rng_state()
    text = trainer.sample()
    assert torch.equal(state, torch.get_rng_state())
    assert text.startswith("def ")
    assert text == trainer.sample()
    assert trainer.model.training
    assert trainer_of(tmp_path, "bert").sample() is None
    assert trainer_of(tmp_path, "gpt2", "--sample_prompt", "''").sample() is not None
    long = "".join(map(str, range(40)))
    continued = trainer_of(tmp_path, "gpt2", "--sample_prompt", f"'{long}'").sample()
    assert continued.startswith(long[-31:])
    assert trainer_of(tmp_path, "gpt2", "--sample_prompt", "null").sample() is None
