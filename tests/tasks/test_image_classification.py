"""From a recipe to model, image processor and augmentation."""

import dataclasses
import json

import pytest
import torch
from transformers.models.swin.modeling_swin import SwinDropPath

from nio_hf.errors import ModelError
from nio_hf.recipe.settings import AugmentationSettings, ModelSettings
from nio_hf.tasks.image_classification import add_stochastic_depth, build_model, load_model
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.processors import make_image_processor, pixel_format
from tests import zoo

CLASSES = ("bird", "cat", "dog")
VIT = ModelSettings(model_type="vit", model_config={**zoo.TRANSFORMER, "num_hidden_layers": 3}, drop_path_rate=0.4)
SWIN = ModelSettings(model_type="swin", model_config={**zoo.SWIN, "depths": [2, 2]}, drop_path_rate=0.4)


def test_gradients_of_a_swin_stay_sane_when_images_are_moved_out_of_their_frame():
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(SWIN, drop_path_rate=0.0), CLASSES)
    processor = make_image_processor(model.config, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    settings = AugmentationSettings(randaugment_magnitude=10, randaugment_layers=2, randaugment_prob=1.0)
    augment = BatchAugmentation(pixel_format(processor), settings, 3)
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    batch = augment({"pixel_values": images, "labels": torch.zeros(32, dtype=torch.long)})
    torch.nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert norm < 100, "8 with the bytes, 11,000 with the mean itself"


def rates_of(model):
    return [module.drop_prob for module in model.modules() if isinstance(module, SwinDropPath)]


@pytest.mark.parametrize("model_type", ["vit", "deit"])
def test_stochastic_depth_rises_with_depth_and_is_of_training_only(model_type, tmp_path):
    settings = dataclasses.replace(VIT, model_type=model_type)
    model, processor = load_model(settings, CLASSES)
    assert type(model).__name__.endswith("TForImageClassification"), "of the heads of DeiT the plain one"
    assert rates_of(model) == pytest.approx([0.0, 0.2, 0.4])
    plain = build_model(dataclasses.replace(settings, drop_path_rate=None), CLASSES)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(16, 3, 32, 32)
    assert torch.equal(model.eval()(images).logits, plain.eval()(images).logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(ModelSettings(model_name_or_path=str(tmp_path), drop_path_rate=0.2), CLASSES)
    assert rates_of(again) == pytest.approx([0.0, 0.1, 0.2])
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)


def test_both_branches_of_a_layer_are_dropped_for_a_sample_each_by_its_own_draw():
    torch.manual_seed(2)
    model = build_model(dataclasses.replace(VIT, drop_path_rate=0.5), CLASSES)
    layer = model.vit.layers[-1]
    middle = []
    layer.layernorm_after.register_forward_pre_hook(lambda module, inputs: middle.append(inputs[0]))
    hidden = torch.randn(1, 5, 16).expand(2000, -1, -1)
    with torch.no_grad():
        layer.eval()(hidden)
        after = layer.train()(hidden)
    first = (middle[1] == hidden).flatten(1).all(1)
    second = (after == middle[1]).flatten(1).all(1)
    for dropped in (first, second):
        assert abs(dropped.float().mean() - 0.5) < 0.05
    assert abs((first & second).float().mean() - 0.25) < 0.04
    kept = (middle[1] - hidden)[~first]
    torch.testing.assert_close(kept, (2 * (middle[0] - hidden))[~first], atol=1e-5, rtol=1e-4)


def test_a_swin_takes_the_rate_of_the_recipe_and_a_model_without_layers_refuses_it(tmp_path):
    swin, processor = load_model(SWIN, CLASSES)
    before = repr(swin)
    add_stochastic_depth(swin, 0.1)
    assert repr(swin) == before
    assert swin.config.drop_path_rate == 0.4
    swin.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(ModelSettings(model_name_or_path=str(tmp_path), drop_path_rate=0.1), CLASSES)
    assert again.config.drop_path_rate == 0.1
    config = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    with pytest.raises(ModelError) as raised:
        build_model(ModelSettings(model_type="resnet", model_config=config, drop_path_rate=0.1), CLASSES)
    assert str(raised.value) == (
        "drop_path_rate: ResNetForImageClassification has no layers of a ViT or DeiT for stochastic depth. "
        "Leave it out, or choose an architecture that has it."
    )


def test_a_configuration_that_no_model_can_be_built_from_is_our_error():
    broken = dataclasses.replace(VIT, model_config={**VIT.model_config, "hidden_act": "relux"})
    with pytest.raises(ModelError, match=r"model_config: no model can be built from it: .*relux"):
        build_model(broken, CLASSES)


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, processor = load_model(VIT, CLASSES)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "mine.Mine", "AutoModelForImageClassification": "mine.M"}
    config |= {"model_type": "mine", "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(ModelSettings(model_name_or_path=str(tmp_path)), CLASSES)
    assert not (tmp_path / "ran").exists()
    with pytest.raises((ModelError, AttributeError)):
        load_model(ModelSettings(model_name_or_path=str(tmp_path), trust_remote_code=True), CLASSES)
    assert (tmp_path / "ran").exists()
