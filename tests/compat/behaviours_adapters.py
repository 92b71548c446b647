"""Adapters of PEFT. NIO refuses them, so that they are trained without it."""

import json
import warnings

import torch

from tests.compat.sides import Nio, behaviour
from tests.compat.toys import Scores, StopAt, bert, checkpoints, files, outcome, weights

try:
    import peft
except ImportError:
    peft = None

BEST = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def _adapted(*names, **settings):
    """A model with an adapter of each name, the first of them active."""
    config = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False, lora_dropout=0.1, **settings
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = peft.get_peft_model(bert(), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    model.set_adapter(names[0])
    return model


def _trained_weights(model):
    return {name: tensor for name, tensor in weights(model).items() if "lora" in name or "modules_to_save" in name}


ADAPTERS = {
    "default": ("default",),
    "another name": ("mine",),
    "several": ("default", "second"),
    "several with other names": ("first", "second"),
}

if peft is not None:

    @behaviour(nio=Nio.NOT_RUN, cases=ADAPTERS)
    def adapters_are_trained(side, folder, names):
        """The weights of a training of adapters, and the files of its checkpoints and its model."""
        model = _adapted(*names)
        trainer = side.trained(folder, model=model, save_strategy="steps", save_steps=3)
        trainer.save_model(str(folder / "saved"))
        return [outcome(trainer), checkpoints(folder), files(folder / "checkpoint-3"), files(folder / "saved")]

    RESUMES = {f"{name}, {by}": (names, by) for name, names in ADAPTERS.items() for by in ("true", "path")}

    @behaviour(nio=Nio.NOT_RUN, cases=RESUMES)
    def adapters_are_resumed(side, folder, case):
        """The resume of a training of adapters, and whether the active one ends as without interruption."""
        names, last = case
        whole = _trained_weights(side.trained(folder / "whole", model=_adapted(*names)).model)
        side.trained(folder, model=_adapted(*names), save_strategy="steps", save_steps=4, callbacks=[StopAt(4)])
        trainer = side.trainer(folder, model=_adapted(*names))
        trainer.train(resume_from_checkpoint=last == "true" or str(folder / "checkpoint-4"))
        after = _trained_weights(trainer.model)
        return [outcome(trainer), {name: torch.equal(whole[name], after[name]) for name in whole}]

    @behaviour(nio=Nio.NOT_RUN, cases=ADAPTERS)
    def best_adapters(side, folder, names):
        """The adapters after the best of them should be loaded."""
        scores = Scores(0.9, 0.1, 0.2)
        trainer = side.trained(folder, model=_adapted(*names), compute_metrics=scores, **BEST)
        return [outcome(trainer), trainer.state.best_global_step]

    @behaviour(nio=Nio.NOT_RUN)
    def adapter_beside_a_trained_module(side, folder):
        """A resume with an adapter and a module that is trained whole."""
        settings = {"modules_to_save": ["classifier"]}
        changes = {"save_strategy": "steps", "save_steps": 4}
        side.trained(folder, model=_adapted("default", **settings), callbacks=[StopAt(4)], **changes)
        trainer = side.trainer(folder, model=_adapted("default", **settings))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        return outcome(trainer)

    @behaviour(nio=Nio.NOT_RUN)
    def card_of_an_adapter(side, folder):
        """An adapter is saved with its configuration and with a card."""
        trainer = side.trained(folder, model=_adapted("default"))
        trainer.save_model()
        trainer.create_model_card(tags=["mine"])
        config = json.loads((folder / "adapter_config.json").read_text())
        return [files(folder), config["peft_type"], config["r"], "mine" in (folder / "README.md").read_text()]
