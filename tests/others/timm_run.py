"""NIO on models of timm, in a process of its own: prints what was found as JSON."""

import json
import sys
import tempfile

import timm
import torch
from torch.nn import functional
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, set_seed

from nio_hf import NIOTrainer
from nio_hf.core.groups import kinds_of
from tests.trainer.toys import CLASSES, snapshot, trainer_of

ARCHITECTURE = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}


class PlainTrainer(NIOTrainer):
    """For a model that takes images and returns logits."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        logits = model(inputs["pixel_values"])
        loss = functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def _trained(trainer_class, model):
    before = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"model": model, "nio_batch_size": 16, "remove_unused_columns": False}
        trainer = trainer_of(folder, trainer_class, **settings)
        scales = trainer.run_nio().scales
        is_applied = all(
            torch.allclose(tensor, before[name] * scales.get(name, 1.0)) for name, tensor in model.named_parameters()
        )
        loss = trainer.train().training_loss
    named = {name.removeprefix("timm_model."): scale for name, scale in scales.items()}
    kinds = {name.removeprefix("timm_model."): kind for name, kind in kinds_of(model).items()}
    return {"kinds": kinds, "scales": named, "is_applied": is_applied, "loss": loss}


def main():
    set_seed(0)
    plain = timm.create_model(ARCHITECTURE, num_classes=CLASSES, **SIZES)
    set_seed(0)
    config = TimmWrapperConfig(architecture=ARCHITECTURE, num_labels=CLASSES, model_args=SIZES)
    wrapped = TimmWrapperForImageClassification(config)
    spread = {
        "timm": plain.patch_embed.proj.weight.std().item(),
        "transformers": wrapped.timm_model.patch_embed.proj.weight.std().item(),
    }
    found = {"spread": spread, "plain": _trained(PlainTrainer, plain), "wrapped": _trained(NIOTrainer, wrapped)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
