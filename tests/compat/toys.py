"""Models, data and callbacks that are small enough for a training step of a few milliseconds."""

from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    set_seed,
)

from tests.zoo import text_model, vision_model

CLASSES = 3
VOCABULARY = 30
LENGTH = 6
IMAGE = 16

# Models


def bert(**config):
    """A classifier of texts with dropout."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "num_labels": CLASSES}
    set_seed(0)
    return BertForSequenceClassification(BertConfig(**sizes | config))


def gpt2():
    """A language model whose head is tied to its embeddings."""
    set_seed(0)
    return text_model("gpt2", vocab_size=VOCABULARY, n_positions=16, pad_token_id=0)


def t5():
    """An encoder and a decoder."""
    set_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


def vit():
    """A classifier of images whose checkpoints have other names than its parameters."""
    set_seed(0)
    return vision_model("vit", CLASSES, image_size=IMAGE)


def swinv2():
    """A classifier of images whose head does not know the number of items in a batch."""
    set_seed(0)
    return vision_model("swinv2", CLASSES, image_size=IMAGE, depths=[1, 1], window_size=2)


def resnet():
    """A classifier of images with batch normalisation."""
    set_seed(0)
    return vision_model("resnet", CLASSES)


class Perceptron(nn.Module):
    """A classifier of bags of words in plain torch, without a configuration."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, CLASSES))

    def forward(self, input_ids, labels=None):
        logits = self.body(self.embeddings(input_ids).mean(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def perceptron():
    set_seed(0)
    return Perceptron()


def two_layer_head():
    """A model whose head is not the one that its configuration describes."""
    model = bert()
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, CLASSES))
    return model


def large_vocabulary():
    """A model whose embeddings were swapped without a word to its configuration."""
    model = bert()
    model.bert.embeddings.word_embeddings = nn.Embedding(VOCABULARY + 7, 16)
    return model


class Widened(BertForSequenceClassification):
    """A model whose constructor takes more than a configuration."""

    def __init__(self, config, width):
        super().__init__(config)
        self.classifier = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, CLASSES))


def widened():
    config = bert().config
    set_seed(0)
    return Widened(config, width=5)


def edited_configuration():
    """A model whose configuration was edited after it had been built."""
    model = bert()
    model.config.num_hidden_layers = 1
    model.config.intermediate_size = 64
    return model


class _Upcast(nn.Module):
    def forward(self, hidden):
        return hidden.float()


def half_body():
    """A frozen body in bfloat16 with a trained head in float32."""
    model = bert().bfloat16()
    set_seed(1)
    model.classifier = nn.Sequential(_Upcast(), nn.Linear(16, CLASSES))
    model.bert.requires_grad_(False)
    return model


# Data


class Texts(Dataset):
    """Token ids, in which the first says the class, and a label."""

    def __init__(self, samples=32, **columns):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(CLASSES, VOCABULARY, (samples, LENGTH), generator=generator)
        self.labels = [index % CLASSES for index in range(samples)]
        self.input_ids[:, 0] = torch.tensor(self.labels)
        self.columns = columns
        self.order = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.order.append(index)
        return {"input_ids": self.input_ids[index], "labels": self.labels[index], **self.columns}


class Prose(Texts):
    """Token ids that are their own labels."""

    def __getitem__(self, index):
        return {"input_ids": self.input_ids[index], "labels": self.input_ids[index]}


class Images(Texts):
    """Noise, brighter where the class says so, and a label."""

    def __init__(self, samples=32):
        super().__init__(samples)
        self.images = torch.randn(samples, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
        for image, label in zip(self.images, self.labels, strict=True):
            image[label] += 1

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


MODELS = {
    "bert": (bert, Texts),
    "gpt2": (gpt2, Prose),
    "t5": (t5, Prose),
    "vit": (vit, Images),
    "swinv2": (swinv2, Images),
    "resnet": (resnet, Images),
    "perceptron": (perceptron, Texts),
}
"""{name: (what makes a model, the class of its data)}."""


class Uneven(Texts):
    """Texts of different lengths, to be padded."""

    def __init__(self, samples=32):
        super().__init__(samples)
        self.lengths = torch.randint(2, 13, (samples,), generator=torch.Generator().manual_seed(0)).tolist()

    def __getitem__(self, index):
        self.order.append(index)
        return {"input_ids": [1 + (index + i) % 20 for i in range(self.lengths[index])], "labels": index % CLASSES}


def pad(samples):
    """A batch of texts of different lengths, padded at their ends."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [[*sample["input_ids"], *[0] * (longest - len(sample["input_ids"]))] for sample in samples]
    ids = torch.tensor(rows)
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


class Stream(IterableDataset):
    """Texts that come one after the other, their number unknown."""

    def __init__(self, samples=32):
        self.texts = Texts(samples)

    def __iter__(self):
        for index in range(len(self.texts)):
            yield self.texts[index]


class SizedStream(Stream):
    """Texts that come one after the other, their number known."""

    def __len__(self):
        return len(self.texts)


def table(samples=32, **columns):
    """Texts as a table of `datasets`, with further columns of one value each."""
    texts = Texts(samples)
    return datasets.Dataset.from_dict(
        {"input_ids": texts.input_ids.tolist(), "labels": texts.labels}
        | {name: [value] * samples for name, value in columns.items()}
    )


def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


# Observations

CLOCKS = ("runtime", "per_second", "preparation_time")
EXTRA_FILES = ("nio_manifest.json", "nio_run.json", "nio_state.json")
"""Files that NIOTrainer writes beside those of Trainer."""
EXTRA_FOLDERS = ("_nio_init", "plots")
"""Folders that NIOTrainer writes beside those of Trainer."""


def weights(model):
    module = model.model if isinstance(model, Trainer) else model
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def without_clocks(metrics):
    """The metrics; those that a clock decides say only that they are there."""
    return {name: "measured" if _is_clock(name) else value for name, value in metrics.items()}


def history(trainer):
    """The log history without the entries of NIO."""
    entries = [without_clocks(entry) for entry in trainer.state.log_history]
    return [entry for entry in entries if not any(name.startswith("nio") for name in entry)]


def outcome(trainer):
    """What a training leaves: weights, log history, steps and epochs."""
    state = trainer.state
    return {"weights": weights(trainer), "history": history(trainer), "step": state.global_step, "epoch": state.epoch}


def checkpoints(folder):
    """The names of the checkpoints in a folder, by step."""
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: (len(name), name))


def files(folder):
    """The files below a folder that are not in the lists of extra ones."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = (path for path in paths if path.name not in EXTRA_FILES and path.parts[0] not in EXTRA_FOLDERS)
    return frozenset(path.as_posix() for path in kept)


def name_of(path):
    return None if path is None else Path(path).name


def _is_clock(name):
    return any(part in name for part in CLOCKS)


# Metrics and callbacks


def accuracy(prediction):
    """The share of right answers."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


class Scores:
    """A metric that takes the given values, one evaluation after the other."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, prediction):
        return {"score": self.values.pop(0)}


class Draws(TrainerCallback):
    """Remembers a random number drawn at the beginning of each step."""

    def __init__(self):
        self.drawn = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.drawn.append(float(torch.rand(())))


class StopAt(TrainerCallback):
    """Ends the training at a step, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


class AtBegin(TrainerCallback):
    """Does something when the training begins, after whatever comes before it."""

    def __init__(self, action):
        self.action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self.action()
