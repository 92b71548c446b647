"""Trainer of image classifiers: batches, loss, average of the weights, and resumed runs."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForImageClassification, TrainerCallback
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from nio_hf.errors import CheckpointError, ConfigError, DataError
from nio_hf.recipe.loading import load_recipe
from nio_hf.tasks.image_classification import build_trainer
from nio_hf.tasks.image_trainer import ImageTrainer
from nio_hf.train import train
from nio_hf.trainer import race
from nio_hf.vision.samples import read_image
from tests.tasks.recipes import CLASSES, make_folder, weights, write_recipe

PLAIN = ["--randaugment_magnitude", "null", "--color_jitter", "0", "--random_erasing", "0", "--mixup_alpha", "0"]
PLAIN += ["--cutmix_alpha", "0", "--optim", "sgd", "--learning_rate", "0.5", "--nio", "false"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


def trainer_of(folder, images, *overrides, more=""):
    folder.mkdir(exist_ok=True)
    return build_trainer(load_recipe(write_recipe(folder, images, more), overrides))


class SoftLabels:
    """An augmentation that normalises, and softens each label in a way that depends on it alone."""

    def __call__(self, batch, *, mix=True):
        hard = functional.one_hot(batch["labels"], len(CLASSES)).float()
        soft = 0.7 * hard + 0.3 * hard.roll(1, 1)
        return {**batch, "pixel_values": batch["pixel_values"].float() / 255, "labels": soft}


def test_a_step_is_the_same_however_its_samples_are_accumulated(images, tmp_path):
    found = []
    for size in (8, 4, 2):
        options = [*PLAIN, "--max_steps", "1", "--global_batch_size", "8"]
        trainer = trainer_of(tmp_path / str(size), images, *options, "--per_device_train_batch_size", str(size))
        trainer._augmentation = SoftLabels()
        before = weights(trainer)
        trainer.train()
        found.append((weights(trainer) - before, trainer.state.log_history[0]["loss"]))
    for change, loss in found[1:]:
        torch.testing.assert_close(change, found[0][0], rtol=1e-4, atol=1e-7)
        assert loss == pytest.approx(found[0][1], rel=1e-5)


def test_a_step_is_augmented_the_same_however_its_samples_are_accumulated(images, tmp_path):
    unmixed = ["--mixup_alpha", "0", "--cutmix_alpha", "0", "--nio", "false", "--optim", "sgd"]
    found = []
    for size in (12, 4, 1):
        options = [*unmixed, "--max_steps", "3", "--global_batch_size", "12", "--logging_steps", "3"]
        trainer = trainer_of(tmp_path / str(size), images, *options, "--per_device_train_batch_size", str(size))
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


@pytest.mark.parametrize(("size", "options", "warned"), [(36, [], True), (35, [], False), (64, ["3"], False)])
def test_an_epoch_of_one_step_is_reported(size, options, warned, images, tmp_path, caplog):
    steps = ["--max_steps", *(options or ["-1"])]
    trainer_of(tmp_path, images, *PLAIN, *steps, "--per_device_train_batch_size", str(size))
    assert (f"An epoch is one step: 36 images for batches of {size}." in caplog.text) == warned


def test_evaluation_neither_smooths_nor_augments_and_inference_sees_what_it_saw(images, tmp_path):
    trainer = trainer_of(tmp_path, images, "--nio", "false")
    metrics = trainer.evaluate()
    losses = []
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            logits = trainer.model(pixel_values=batch["pixel_values"]).logits
            losses += functional.cross_entropy(logits, batch["labels"], reduction="none")
    assert metrics["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert "eval_top5_accuracy" not in metrics
    trainer.save_model()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "output", backend="pil")
    path = images / "validation" / "bird" / "0.jpg"
    inferred = processor(read_image({"bytes": None, "path": str(path)}, "it"), return_tensors="pt")["pixel_values"]
    assert torch.equal(inferred[0], trainer.eval_dataset[0]["pixel_values"])
    assert trainer.model.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize(
    ("nio_augment", "streaming"), [("clean", "false"), ("augmented", "true"), ("mixed", "false"), ("mixed", "true")]
)
def test_batches_of_nio_are_the_same_in_every_run_and_soft_only_where_asked(nio_augment, streaming, images, tmp_path):
    options = ["--nio_augment", nio_augment, "--streaming", streaming, "--nio_report_batches", "3"]

    def batches(workers, seed):
        trainer = trainer_of(tmp_path / f"{workers}-{seed}", images, *options, "--dataloader_num_workers", str(workers))
        torch.manual_seed(seed)
        return [trainer.prepare_nio_batch(batch, n) for n, batch in enumerate(trainer.get_nio_dataloader()) if n < 3]

    first, again = batches(0, 1), batches(2, 2)
    assert len(first) == 3
    for left, right in zip(first, again, strict=True):
        assert torch.equal(left["pixel_values"], right["pixel_values"])
        assert torch.equal(left["labels"], right["labels"])
        assert left["pixel_values"].dtype == torch.float32
        assert left["labels"].is_floating_point() == (nio_augment == "mixed")
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])
    if nio_augment == "clean" and streaming == "false":
        data = trainer_of(tmp_path, images, *options).data.nio
        clean = torch.stack([data[index]["pixel_values"] for index in range(36)])
        assert all((clean == pixels).flatten(1).all(1).any() for pixels in first[0]["pixel_values"])


def test_the_order_and_the_draws_of_training_do_not_depend_on_nio(images, tmp_path):
    losses = []
    for nio in ("true", "false"):
        # With scales that stay 1 the only difference is that NIO ran.
        options = ["--nio", nio, "--nio_scale_range", "[1, 1]", "--learning_rate", "0"]
        trainer = trainer_of(tmp_path / nio, images, *options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("streaming", "optimizer"), [("false", "null"), ("true", "muon"), ("false", "radam")])
def test_a_lane_of_a_race_is_the_beginning_of_the_training(streaming, optimizer, images, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "leader", lambda lanes, steps: next(iter(lanes), None))
    options = ["--max_steps", "7", "--ema_decay", "0.9", "--drop_path_rate", "0.3", "--streaming", streaming]
    options += ["--optimizer", optimizer, "--logging_steps", "1", "--nio", "true"]
    trainer = trainer_of(tmp_path / "raced", images, *options, "--nio_race_steps", "3")
    trainer.train()
    plain = trainer_of(tmp_path / "plain", images, *options)
    plain.train()
    logged = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert trainer.nio_result.race.lanes[0].losses == pytest.approx(logged[:3], abs=1e-6)
    assert torch.equal(weights(trainer), weights(plain))
    averages = [each.evaluate_average(tmp_path / "ema")["eval_ema_loss"] for each in (trainer, plain)]
    assert averages[0] == averages[1]


@pytest.mark.parametrize(("streaming", "workers"), [("false", "0"), ("true", "2"), ("false", "2")])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(streaming, workers, images, tmp_path):
    options = ["--save_strategy", "steps", "--save_steps", "6", "--max_steps", "8", "--ema_decay", "0.9"]
    options += ["--drop_path_rate", "0.3", "--streaming", streaming, "--dataloader_num_workers", workers]
    whole = trainer_of(tmp_path / "run", images, *options)
    whole.train()
    resumed = trainer_of(tmp_path / "run", images, *options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "output" / "checkpoint-6"))
    assert torch.equal(weights(resumed), weights(whole))
    averages = [trainer.evaluate_average(tmp_path / "ema") for trainer in (whole, resumed)]
    assert averages[0]["eval_ema_loss"] == averages[1]["eval_ema_loss"]


def test_the_average_is_that_of_the_weights_after_each_step(images, tmp_path):
    trainer = trainer_of(tmp_path, images, *PLAIN, "--ema_decay", "0.75", "--max_steps", "3")
    seen = [weights(trainer)]

    class Record(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(weights(trainer))

    trainer.add_callback(Record())
    trainer.train()
    expected = seen[0]
    for after in seen[1:]:
        expected = 0.75 * expected + 0.25 * after
    trained = weights(trainer)
    metrics = trainer.evaluate_average(tmp_path / "ema")
    assert torch.equal(weights(trainer), trained)
    assert "eval_ema_accuracy" in metrics
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "ema", dtype=torch.float32)
    found = torch.cat([parameter.detach().flatten() for parameter in saved.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == 4


def test_resuming_with_an_average_that_was_not_saved_is_refused(images, tmp_path):
    options = ["--nio", "false", "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2"]
    trainer_of(tmp_path, images, *options).train()
    resumed = trainer_of(tmp_path, images, *options[:-2], "--max_steps", "3", "--ema_decay", "0.9")
    with pytest.raises(CheckpointError, match="no average of the weights"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))


def test_too_few_images_for_nio_are_met_with_the_largest_batch_that_fits(images, tmp_path):
    with pytest.raises(DataError, match=r"36 samples for 2 report batches of 64\. Lower nio_batch_size to 18, or"):
        trainer_of(tmp_path / "64", images, "--nio_batch_size", "64", "--nio_report_batches", "2").train()
    loader = trainer_of(tmp_path / "12", images, "--nio_batch_size", "12", "--nio_report_batches", "2")
    assert len(next(iter(loader.get_nio_dataloader()))["labels"]) == 12


def test_weight_decay_of_the_optimiser_is_that_of_the_recipe(images, tmp_path):
    more = "weight_decay: 0.05\nno_weight_decay: [vectors, cls_token]\n"
    trainer = trainer_of(tmp_path, images, more=more)
    groups = trainer.create_optimizer().param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] == 0.05 for parameter in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and "cls_token" not in name), name


def test_broken_images_end_the_run_with_their_name_or_are_counted(tmp_path):
    images = make_folder(tmp_path / "images")
    for file in images.glob("*/cat/3.jpg"):
        file.write_bytes(file.read_bytes()[:200])
    options = [*PLAIN[:-2], "--max_steps", "6"]
    for workers in ("0", "1"):
        trainer = trainer_of(tmp_path / workers, images, *options, "--dataloader_num_workers", workers)
        with pytest.raises(DataError) as raised:
            trainer.train()
        assert "train/cat/3.jpg" in str(raised.value)
        assert str(raised.value).endswith("Replace or remove it, or set skip_broken_images: true.")
        assert "\n" not in str(raised.value)
    options += ["--skip_broken_images", "true", "--nio", "false"]
    run = train(load_recipe(write_recipe(tmp_path, images), options))
    assert ("Images skipped, broken", "", "2") in run.rows
    assert run.metrics["eval_accuracy"] * 35 == pytest.approx(round(run.metrics["eval_accuracy"] * 35))
    losses = []
    for size in ("1", "7", "36"):
        trainer = trainer_of(tmp_path / f"eval-{size}", images, *options, "--per_device_eval_batch_size", size)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_an_average_of_sharded_weights_is_refused(images, tmp_path, monkeypatch):
    original = ImageTrainer.create_accelerator_and_postprocess

    def sharded(trainer):
        original(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(ImageTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ConfigError, match=r"0\.9 with weights that are sharded over devices"):
        trainer_of(tmp_path, images, *PLAIN, "--ema_decay", "0.9")
