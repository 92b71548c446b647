"""The recipes for CIFAR-10 and Imagenette on real images, shortened to seconds.

The same with some hundred steps is in `benchmarks/recipe_runs.py`, its results are committed.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from nio_hf.recipe.loading import load_recipe
from nio_hf.train import train
from nio_hf.validate import validate_recipe

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
RUNS = {
    "vit-tiny/cifar10/nio": (
        {"train": "cifar10/train.parquet", "test": "cifar10/test.parquet"},
        "--image_column image --per_device_train_batch_size 16 --global_batch_size 32 --nio_batch_size 16 "
        "--max_eval_samples 64",
    ),
    "swin-tiny/imagenette/nio": (
        {"train": "imagenette224/train.parquet", "validation": "imagenette224/validation.parquet"},
        "--dataset_revision null --bf16 false --per_device_train_batch_size 2 --global_batch_size 4 "
        "--nio_batch_size 4 --nio_sub_batches 2 --max_eval_samples 8 --per_device_eval_batch_size 4",
    ),
}
SHORTENED = (
    "--max_steps 4 --save_strategy steps --save_steps 2 --eval_strategy no --logging_steps 1 "
    "--nio_report_batches 1 --dataloader_num_workers 1 --dataloader_pin_memory false --disable_tqdm true --use_cpu"
)


def options_for(name, output_dir):
    files, options = RUNS[name]
    missing = [file for file in files.values() if not (DATA / file).is_file()]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} in shared/data beside the checkout")
    data = [part for split, file in files.items() for part in (f"--data_files.{split}", str(DATA / file))]
    return ["--dataset_name", "parquet", *data, *options.split(), *SHORTENED.split(), "--output_dir", str(output_dir)]


@pytest.mark.parametrize(
    "name", ["vit-tiny/cifar10/nio", pytest.param("swin-tiny/imagenette/nio", marks=pytest.mark.slow)]
)
def test_a_recipe_runs_from_real_images_to_a_model_and_goes_on_where_it_was(name, tmp_path):
    run = train(load_recipe(name, options_for(name, tmp_path / "whole")))
    history = run.result.history
    assert [record.iteration for record in history] == list(range(1, len(history) + 1))
    assert history[-1].outcome == "accepted"
    assert 0 <= run.metrics["eval_accuracy"] <= run.metrics["eval_top5_accuracy"] <= 1
    # From scratch, ten classes: the loss is that of chance or not far from it.
    assert run.result.before.loss == pytest.approx(torch.log(torch.tensor(10.0)).item(), abs=0.5)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    options = [*options_for(name, tmp_path / "resumed"), "--resume_from_checkpoint", str(checkpoint)]
    resumed = train(load_recipe(name, options))
    assert resumed.result.before == run.result.before, "the NIO run that the checkpoint started from"
    whole, again = (load_file(tmp_path / kind / "model.safetensors") for kind in ("whole", "resumed"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert resumed.metrics["eval_accuracy"] == run.metrics["eval_accuracy"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
    assert len(model.config.id2label) == 10
    assert "LABEL_0" not in model.config.id2label.values()
    AutoImageProcessor.from_pretrained(tmp_path / "whole", backend="pil")


@pytest.mark.parametrize("name", RUNS)
def test_validation_with_data_reads_a_batch_and_runs_nio(name, tmp_path):
    options = options_for(name, tmp_path)
    validation = validate_recipe(name, options, with_data=True)
    assert validation.error is None, str(validation.error)
    assert "a short run of NIO: GradCosine" in validation.summary
    assert list(tmp_path.iterdir()) == []
