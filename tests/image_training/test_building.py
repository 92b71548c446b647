"""From a recipe to model, image processor and augmentation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from nio_hf.errors import ModelError
from nio_hf.recipe.settings import AugmentationSettings, ModelSettings
from nio_hf.tasks.image_classification import build_model, load_model, make_augmentation
from nio_hf.vision.processors import make_image_processor
from nio_hf.vision.stochastic_depth import StochasticDepth

CLASSES = ("bird", "cat", "dog")
VIT = ModelSettings(
    model_type="vit",
    model_config={
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    drop_path_rate=0.4,
)
SWIN = ModelSettings(
    model_type="swin",
    model_config={
        "image_size": 32,
        "patch_size": 4,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "embed_dim": 8,
        "window_size": 4,
    },
    drop_path_rate=0.4,
)


@pytest.mark.parametrize("mean", [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5], [0.4, 0.2, 0.6]])
def test_what_rand_augment_fills_in_is_not_0_once_normalised(mean: list[float]) -> None:
    processor = make_image_processor(AutoConfig.for_model("swin", image_size=32), image_mean=mean)
    settings = AugmentationSettings(randaugment_magnitude=10, randaugment_layers=1, randaugment_prob=1.0)
    augment = make_augmentation(settings, processor, classes=2)
    filled = torch.tensor(augment._rand_augment._fill)
    assert torch.equal((filled * 255).round(), (filled * 255))
    assert ((filled - torch.tensor(mean)).abs() < 1.1 / 255).all()
    assert ((filled - torch.tensor(mean)).abs() > 1e-4).all()


def test_gradients_of_a_swin_stay_sane_when_images_are_moved_out_of_their_frame() -> None:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(SWIN, drop_path_rate=0.0), CLASSES)
    processor = make_image_processor(model.config, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    settings = AugmentationSettings(randaugment_magnitude=10, randaugment_layers=2, randaugment_prob=1.0)
    augment = make_augmentation(settings, processor, classes=3)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    batch = augment({"pixel_values": images, "labels": torch.zeros(32, dtype=torch.long)})
    torch.nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert norm < 100, "6 with the bytes, 2400 with the mean itself"


def test_stochastic_depth_rises_with_depth_whatever_the_architecture(tmp_path: Path) -> None:
    vit, processor = load_model(VIT, CLASSES)
    rates = [module.p for module in vit.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    assert build_model(SWIN, CLASSES).config.drop_path_rate == 0.4
    vit.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(ModelSettings(model_name_or_path=str(tmp_path), drop_path_rate=0.2), CLASSES)
    assert [m.p for m in again.modules() if isinstance(m, StochasticDepth)] == pytest.approx([0.0, 0.1, 0.2])
    for left, right in zip(vit.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_loaded_swin_takes_the_rate_of_the_recipe(tmp_path: Path) -> None:
    swin, processor = load_model(SWIN, CLASSES)
    swin.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(ModelSettings(model_name_or_path=str(tmp_path), drop_path_rate=0.1), CLASSES)
    assert again.config.drop_path_rate == 0.1


def test_a_configuration_that_no_model_can_be_built_from_is_our_error() -> None:
    broken = dataclasses.replace(VIT, model_config={**VIT.model_config, "hidden_act": "relux"})
    with pytest.raises(ModelError, match=r"model_config: no model can be built from it: .*relux"):
        build_model(broken, CLASSES)


def test_an_architecture_with_several_heads_gets_the_plain_one() -> None:
    settings = dataclasses.replace(VIT, model_type="deit")
    assert type(build_model(settings, CLASSES)).__name__ == "DeiTForImageClassification"


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, processor = load_model(VIT, CLASSES)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageClassification": "mine.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(ModelSettings(model_name_or_path=str(tmp_path)), CLASSES)
    assert not (tmp_path / "ran").exists()
    with pytest.raises((ModelError, AttributeError)):
        load_model(ModelSettings(model_name_or_path=str(tmp_path), trust_remote_code=True), CLASSES)
    assert (tmp_path / "ran").exists()
