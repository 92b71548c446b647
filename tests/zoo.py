"""Tiny models of every family, untrained, with batches and losses that fit them."""

import torch
import transformers
from torch import nn

DROP_PATH = {"drop_path_rate": 0.4}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TRANSFORMER = {**LAYERS, "image_size": 32, "patch_size": 8}
VIT = {**TRANSFORMER, "intermediate_size": 32, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
STAGES = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4, "mlp_ratio": 2.0}
SWIN = {**STAGES, "image_size": 32, "patch_size": 4}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "bos_token_id": 0, "eos_token_id": 0}
CONVOLUTIONAL = {"hidden_sizes": [8, 16], "depths": [1, 1]}

VISION = {
    "vit": ("ViT", VIT),
    "deit": ("DeiT", VIT),
    "beit": ("Beit", {**TRANSFORMER, **DROP_PATH, "intermediate_size": 32, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2", {**TRANSFORMER, **DROP_PATH, "mlp_ratio": 2, "attention_probs_dropout_prob": 0.2}),
    "swin": ("Swin", {**SWIN, **DROP_PATH}),
    "swinv2": ("Swinv2", {**SWIN, **DROP_PATH}),
    "convnext": ("ConvNext", {**CONVOLUTIONAL, **DROP_PATH, "num_stages": 2}),
    "resnet": ("ResNet", {**CONVOLUTIONAL, "embedding_size": 8, "layer_type": "basic"}),
}
TEXT = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForMaskedLM", {**LAYERS, "intermediate_size": 32, "max_position_embeddings": 12}),
}
VOCABULARY = 23


def vision_model(name, num_labels=5, **config):
    """A classifier of 32 x 32 images; `config` overrides fields of its configuration."""
    family, fields = VISION[name]
    settings = getattr(transformers, f"{family}Config")(**{**fields, "num_labels": num_labels, **config})
    return getattr(transformers, f"{family}ForImageClassification")(settings)


def text_model(name, **config):
    """A language model whose head is tied to its token embeddings."""
    class_name, fields = TEXT[name]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**{**fields, "vocab_size": VOCABULARY, **config}))


def mlp(inputs=6, num_labels=5):
    """Three linear layers, a normalisation and dropout, in plain torch."""
    return nn.Sequential(
        nn.Linear(inputs, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, num_labels),
    )


def images(samples, num_labels=5, seed=0):
    """Noise images with a bright stripe whose place tells the label."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(samples, 3, 32, 32, generator=generator)
    labels = torch.randint(0, num_labels, (samples,), generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, 6 * label : 6 * label + 6] += 1.0
    return {"pixel_values": pixels, "labels": labels}


def sentences(samples, seed=0):
    """Random tokens; the later samples have more labels, the others are masked by -100."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (samples, 8), generator=generator)
    labels = tokens.clone()
    for index in range(samples):
        labels[index, 2 + index % 7 :] = -100
    return {"input_ids": tokens, "labels": labels}


def vectors(samples, inputs=6, num_labels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, inputs, generator=generator)
    return values, torch.randint(0, num_labels, (samples,), generator=generator)


def image_loss(model, batch):
    """Mean cross-entropy over the images, in the precision of the model."""
    pixels = batch["pixel_values"].to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(pixel_values=pixels).logits, batch["labels"])


def text_loss(model, batch):
    """(sum of the cross-entropy, number) of the labelled tokens."""
    logits = model(input_ids=batch["input_ids"]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return loss, (batch["labels"] != -100).sum()


def vector_loss(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs.to(next(model.parameters()).dtype)), labels)
