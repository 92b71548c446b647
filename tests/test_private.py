"""Private names of other libraries: their list is complete, and each means what the package assumes."""

import ast
import importlib
import inspect
import os
import pkgutil
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, Trainer

import nio_hf
from tests.trainer.toys import build
from tests.versions import checkpoint_activations

PACKAGE = Path(nio_hf.__file__).parent
TRAINER_OVERRIDES = {
    # The moment when the model is whole, nothing wraps it, no optimizer exists, and it is known whether the training
    # resumes. No public hook has all four.
    "_prepare_for_training": ("NIO", ["max_steps", "train_dataloader", "resume_from_checkpoint"]),
    # It deletes old checkpoints before callbacks have written into the new one, and leaves half of one on a full disk.
    "_save_checkpoint": ("durable", ["model", "trial"]),
    # It leaves tensors that the library has renamed as they are, as does the next.
    "_load_from_checkpoint": ("durable", ["resume_from_checkpoint", "model"]),
    "_load_best_model": ("durable", []),
    # It pushes before callbacks have written into the checkpoint, and absolute paths.
    "_push_from_checkpoint": ("hub", ["checkpoint_folder"]),
    # An order of the data that depends on seed and epoch alone.
    "_get_train_sampler": ("training", ["train_dataset"]),
}
"""{overridden method of Trainer: (owner, first parameters)}; a comment says why."""

TRAINER_CALLS = {
    # Each trial of a search saves in a folder of its own.
    "_get_output_dir": ["trial"],
    # Batches of NIO go to the device as those of the training do, with the same columns.
    "_prepare_inputs": ["inputs"],
    "_remove_unused_columns": ["dataset", "description"],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
}
"""{called method of Trainer: given parameters}; a comment says why."""

FOREACH = {
    **{"add": torch.add, "add_": torch.add, "sub": torch.sub, "mul": torch.mul, "mul_": torch.mul, "div": torch.div},
    **{"norm": lambda one, _: one.norm(), "sign": lambda one, _: one.sign()},
    **{"copy_": lambda _, other: other, "addcmul_": lambda one, other: one + other * other},
}
"""{arithmetic of torch on lists of tensors, as its own optimizers use it: the same on one tensor and another}."""

OTHERS = {
    "_BatchNorm": "torch: the base of all batch normalisation layers.",
    "_attn_implementation": "transformers: the attention that a model computes with.",
    "_bit_generator": "numpy: the state of a RandomState that is no Mersenne twister.",
    "_commit_hash": "transformers: the revision on the Hub that a model was loaded from.",
    "_compiled_call_impl": "torch: whether a module is compiled.",
    "_exit": "the standard library: an end of a process that waits for nothing.",
    **dict.fromkeys((f"_foreach_{name}" for name in FOREACH), "torch: arithmetic on lists of tensors."),
    "_forward_cls": "torch: the operation that a custom node of a graph belongs to.",
    "_gradient_checkpointing_func": "transformers: how a layer checkpoints its activations.",
    "_hf_peft_config_loaded": "transformers: whether a model has adapters.",
    "_indices": "datasets: whether rows were selected or shuffled, and stand in another order on the disk.",
    "_original_forward": "accelerate: the forward that it has patched.",
    "_overloadpacket": "torch: which operation is counted.",
    "_register_atexit": "the standard library: an end of a process that waits for a push.",
    "_resolve_features": "datasets: the columns of a stream without known features.",
}
"""{any other private name: its library and its meaning}."""

OWN = {"_accuracy", "_runtime", "_time", "_nio_init", "_nio_lock", "_nio_push", "_fields", "_type"}
"""Texts and names in the package that look like private names."""


def test_the_list_of_private_names_is_complete():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")]
    own = {name for tree in trees for name in _defined(tree)} | OWN
    used = {name for tree in trees for name in _private_names(tree)} - own
    assert used == OTHERS.keys() | TRAINER_CALLS.keys()


def test_the_list_of_overridden_methods_is_complete():
    names = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "nio_hf.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    found = {
        name
        for kind in classes
        if kind.__module__.startswith("nio_hf.") and "Trainer" in kind.__name__
        for name in vars(kind)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert found == TRAINER_OVERRIDES.keys()


def test_the_documentation_counts_them():
    page = (PACKAGE.parent / "docs" / "trainer.md").read_text(encoding="utf-8")
    for mixin, owner in (("NIOTrainerMixin", "NIO"), ("DurableTrainerMixin", "durable"), ("HubTrainerMixin", "hub")):
        (row,) = [line for line in page.splitlines() if line.startswith("| `nio_hf") and f"{mixin}` |" in line]
        assert row.endswith(f"| {sum(own == owner for own, _ in TRAINER_OVERRIDES.values())} |")


def test_methods_of_trainer_have_the_parameters_that_are_given():
    overridden = {name: parameters for name, (_, parameters) in TRAINER_OVERRIDES.items()}
    for name, expected in (overridden | TRAINER_CALLS).items():
        found = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
        assert found[: len(expected)] == expected, name


def test_names_of_other_libraries_tell_what_they_are_taken_for():
    model = build("vit")
    assert issubclass(torch.nn.BatchNorm2d, _BatchNorm)
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert '"_commit_hash"' in inspect.getsource(PreTrainedConfig)
    assert model._hf_peft_config_loaded is False
    checkpoint_activations(model)
    assert any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules())
    assert torch.nn.Linear(1, 1)._compiled_call_impl is None
    assert callable(os._exit)
    assert "model._original_forward = model.forward" in inspect.getsource(Accelerator.prepare_model)
    assert callable(getattr(threading, "_register_atexit"))  # noqa: B009
    assert hasattr(np.random.RandomState(0), "_bit_generator")
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"number": 1}]))
    assert stream._resolve_features().features is not None
    rows = datasets.Dataset.from_dict({"number": [1, 2]})
    assert rows._indices is None
    assert rows.select([1, 0])._indices is not None


@pytest.mark.parametrize("name", FOREACH)
def test_lists_of_tensors_are_computed_with_at_once(name):
    ones, others = [torch.ones(2), torch.full((3,), -2.0)], [torch.full((2,), 3.0), torch.full((3,), 4.0)]
    values = [tensor.clone() for tensor in ones]
    given = {"norm": (), "sign": (), "addcmul_": (others, others)}.get(name, (others,))
    computed = getattr(torch, f"_foreach_{name}")(values, *given)
    for found, one, other in zip(values if name.endswith("_") else computed, ones, others, strict=True):
        torch.testing.assert_close(found, FOREACH[name](one, other))


def test_the_operation_of_a_node_of_a_graph_is_known():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return 2 * values

        @staticmethod
        def backward(ctx, *gradients):
            return 2 * gradients[0]

    doubled = Double.apply(torch.ones(1, requires_grad=True))
    assert doubled.grad_fn._forward_cls is Double
    with FlopCounterMode(display=False):
        assert torch.ops.aten.mm.default._overloadpacket is torch.ops.aten.mm


def _defined(tree):
    """Names that the package defines: functions, classes, variables and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for part in (part for target in targets if target is not None for part in ast.walk(target)):
            if isinstance(part, ast.Name):
                found.add(part.id)
            elif isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "self":
                found.add(part.attr)
    return found


def _private_names(tree):
    """Private names that are looked up, imported, or passed to getattr and the like as a text."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("nio_hf"):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return {name for name in found - TRAINER_OVERRIDES.keys() if name.startswith("_") and not name.startswith("__")}
