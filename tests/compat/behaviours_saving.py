"""What a Trainer saves when a script asks for it."""

import json

import safetensors.torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding

from tests.compat.sides import Nio, behaviour
from tests.compat.toys import (
    bert,
    files,
    gpt2,
    half_body,
    outcome,
    perceptron,
    resnet,
    tokenizer,
    two_layer_head,
    vit,
    weights,
)

MODELS = {
    "bert": bert,
    "gpt2": gpt2,
    "vit": vit,
    "resnet": resnet,
    "several dtypes": half_body,
    "another head": two_layer_head,
    "no configuration": perceptron,
}


@behaviour(nio=Nio.SAME, cases=MODELS, nio_cases=("bert", "vit"))
def model_is_saved_untrained(side, folder, model):
    """The files and tensors of a model that is saved without training."""
    trainer = side.trainer(folder, model=model())
    trainer.save_model(str(folder / "saved"))
    return [files(folder / "saved"), safetensors.torch.load_file(folder / "saved" / "model.safetensors")]


@behaviour()
def model_is_saved_after_training(side, folder):
    """A trained model is saved into the folder of the training, and loaded from there."""
    trainer = side.trained(folder)
    trainer.save_model()
    loaded = BertForSequenceClassification.from_pretrained(folder)
    return [files(folder), weights(loaded), loaded.config.architectures, loaded.config.hidden_size]


@behaviour(nio=Nio.SAME, cases={"processing class": True, "collator": False})
def tokenizer_is_saved(side, folder, given):
    """The tokenizer is saved with the model and in checkpoints, that of a collator, too."""
    words = tokenizer()
    padding = DataCollatorWithPadding(words)
    collate = padding
    changes = {"processing_class": words} if given else {"data_collator": collate}
    trainer = side.trained(folder, save_strategy="steps", save_steps=4, max_steps=4, **changes)
    trainer.save_model()
    loaded = AutoTokenizer.from_pretrained(folder / "checkpoint-4")
    return [files(folder), loaded("w3 w7 w99")["input_ids"]]


@behaviour(nio=Nio.SAME)
def state_is_saved(side, folder):
    """`save_state` writes the state of the training, before and after it."""
    trainer = side.trainer(folder)
    trainer.save_state()
    before = json.loads((folder / "trainer_state.json").read_text())
    trainer.train()
    trainer.save_state()
    after = json.loads((folder / "trainer_state.json").read_text())
    names = ("global_step", "max_steps", "epoch", "total_flos", "best_metric", "num_train_epochs")
    return [before["global_step"], {name: after[name] for name in names}, sorted(after)]


@behaviour()
def end_of_an_example_script(side, folder):
    """What the example scripts do at their end: save, log, evaluate, describe."""
    trainer = side.trainer(folder, save_strategy="epoch", max_steps=-1, num_train_epochs=1)
    result = trainer.train()
    trainer.save_model()
    metrics = {**result.metrics, "train_samples": 32}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-classification", dataset="toys")
    return [files(folder), sorted(json.loads((folder / "all_results.json").read_text())), outcome(trainer)]


# Model cards

DESCRIPTION = {
    "language": "de",
    "license": "mit",
    "tags": ["mine", "tiny"],
    "model_name": "a small model",
    "finetuned_from": "someone/base",
    "tasks": "text-classification",
    "dataset_tags": "glue",
    "dataset": "GLUE MRPC",
    "dataset_args": "mrpc",
}


def _card(folder):
    """What a card says that the script gave: metadata, and words of the text."""
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    tags = data.get("tags", [])
    named = {name: data.get(name) for name in ("language", "license", "base_model", "datasets")}
    words = ("a small model", "someone/base", "GLUE MRPC")
    return [named, [tag in tags for tag in ("mine", "tiny")], [word in card.content for word in words]]


MOMENTS = ("untrained", "evaluated", "trained", "trained and saved")


@behaviour(cases=MOMENTS, nio_cases=("untrained", "trained and saved"))
def model_card(side, folder, moment):
    """The card says what the script gave, whatever was done before."""
    trainer = side.trainer(folder)
    if moment == "evaluated":
        trainer.evaluate()
    if moment.startswith("trained"):
        trainer.train()
    if moment == "trained and saved":
        trainer.save_model()
    trainer.create_model_card(**DESCRIPTION)
    return _card(folder)


@behaviour()
def model_card_with_results(side, folder):
    """The results of an evaluation are in the metadata of the card, under task and data set."""
    trainer = side.trained(folder, compute_metrics=lambda _: {"accuracy": 0.75})
    trainer.save_model()
    trainer.evaluate()
    trainer.create_model_card(**DESCRIPTION)
    results = ModelCard.load(folder / "README.md").data.eval_results or []
    found = [[r.task_type, r.dataset_type, r.dataset_name, r.metric_type, str(r.metric_value)] for r in results]
    return [len(found), found]


@behaviour(nio=Nio.SAME)
def model_card_without_arguments(side, folder):
    """A card is written without a word from the script."""
    trainer = side.trained(folder)
    trainer.create_model_card()
    text = (folder / "README.md").read_text()
    return [text.startswith("---\n"), text.count("---\n") >= 2, ModelCard.load(folder / "README.md").data.library_name]


@behaviour(nio=Nio.SAME)
def tags_of_an_older_card(side, folder):
    """The tags of a card that is there already are kept beside new ones."""
    trainer = side.trainer(folder)
    (folder / "README.md").write_text("---\ntags:\n- older\n---\n# Mine\n")
    trainer.create_model_card(tags="newer")
    tags = ModelCard.load(folder / "README.md").data.tags
    return [tag in tags for tag in ("older", "newer")]


# Operations
