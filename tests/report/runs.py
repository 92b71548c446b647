"""Made-up runs of every shape, with plausible numbers."""

import math

from nio_hf.core.config import NIOConfig
from nio_hf.core.layerwise import GradientInspection, LayerGradient
from nio_hf.core.result import ExcludedTensor, GradCosine, GroupScale, InitResult, IterationRecord, TensorScale
from nio_hf.report.run import Facts, Run

KINDS = ("trunk", "head", "norm", "bias")
METRICS = {
    "eval_loss": 1.26041,
    "eval_accuracy": 0.4937,
    "eval_runtime": 0.41,
    "train_runtime": 61.24,
    "train_samples_per_second": 12_345.6,
    "epoch": 27.0,
}
RECIPE = "# An example.\nmodel_type: vit\nnio: true\n"
VERSIONS = {"nio_hf": "1.2.3", "torch": "2.13.0"}
LOG = (
    *({"step": step, "loss": 2.3 / (1 + 0.02 * step), "epoch": 0.1 * step} for step in range(10, 601, 10)),
    *({"step": step, "eval_loss": 2.0 - 0.001 * step, "eval_accuracy": 0.0008 * step} for step in range(100, 601, 100)),
)
BROKEN_LOG = (
    {"step": 1, "loss": math.nan},
    {"step": 2, "loss": math.inf, "grad_norm": math.nan},
    {"step": 3, "loss": 2.0},
    {"step": 3, "eval_loss": math.nan, "eval_accuracy": 0.1},
)


def measured(value, parts=4):
    """GradCosine over report batches; of a single one the standard error is NaN."""
    spread = [0.02 * (index - (parts - 1) / 2) for index in range(parts)]
    return GradCosine.mean([GradCosine(value + off, 6.0 + value, (5.0, 6.0, 7.0, 8.0), 2.31, 64) for off in spread])


def result(blocks=2, iterations=5, parts=4, status="changed", *, groups=1, config=None):
    """An outcome of NIO with 12 tensors in each block; of the computed scales, unless the settings say otherwise."""
    config = NIOConfig() if config is None else config
    tensors = 12 * blocks
    scales = {f"group {i}": math.exp(0.4 * math.sin(7 * i)) for i in range(groups)}
    places = [(scale, name) for name, scale in scales.items()]
    return InitResult(
        config=config,
        groups=tuple(GroupScale(*pair, tensors // groups, 192 * tensors // groups) for pair in scales.items()),
        tensors=tuple(
            TensorScale(f"t{i}", KINDS[i % len(KINDS)], 1 + i // 12, (48, 4), *places[i % groups])
            for i in range(tensors)
        ),
        excluded=(ExcludedTensor("frozen", "trunk", (4,), "frozen"),),
        history=tuple(
            step(i) if config.search == "published" else candidate(i, i == iterations - 1) for i in range(iterations)
        ),
        before=measured(0.0123, parts),
        after=measured(0.2176, parts),
        cost=33.5,
        seconds=7.25,
        peak_memory=3 * 2**29,
        status=status,
        message="GradCosine rose. GradCosine 0.0123 -> 0.2176 on the report batches.",
        description="NIO computed scales of the weights.",
    )


def candidate(i, is_last):
    """Computed scales that a bound refuses, the loss of the second being NaN; the last are accepted."""
    tried = f"all x{4**0.5**i:.3g}"
    if i == 1 and not is_last:
        return IterationRecord(i + 1, tried, "loss_bound", math.nan, scale=4**0.5**i, cost=4.0)
    outcome = "accepted" if is_last else "least_norm" if i % 2 else "loss_bound"
    return IterationRecord(i + 1, tried, outcome, 2.3 + 0.01 * i, 0.3 * math.sin(i), 6 + 0.05 * i, cost=4.0)


def step(i):
    """A step of a search that goes on whatever it measures."""
    outcome = "lower_norm" if i % 9 == 8 else "accepted"
    loss = math.nan if i % 9 == 7 else 2.3
    return IterationRecord(i + 1, "a step of 0.003", outcome, loss, 0.3 * math.sin(i), 6 + 0.05 * i, cost=4.0)


def inspection(blocks=3):
    """An inspection with one tensor of each kind in each block; the gradient of the last is zero."""
    count = blocks * len(KINDS)
    layers = [
        LayerGradient(f"t{i}", KINDS[i % len(KINDS)], i // len(KINDS), 1200, 1 / (count - 1), 0.3 / (count - 1), 2.0)
        for i in range(count - 1)
    ]
    layers.append(LayerGradient("last", KINDS[-1], blocks - 1, 48, 0.0, 0.0, 0.0))
    return GradientInspection(measured(0.3), tuple(layers))


def run(name="vit-digits", *, steps=(0, 0), metrics=None, log=(), **parts):
    """A run with the given parts alone; steps are the number of trained and of planned steps."""
    parts = {"facts": Facts("ViTForImageClassification"), "steps": steps[0], "max_steps": steps[1], **parts}
    return Run(name, metrics=metrics or {}, log_history=log, **parts)


def full_run(blocks=12, iterations=100):
    facts = Facts(
        model="ViTForImageClassification",
        model_type="vit",
        parameters=340_954,
        classes=10,
        dataset="uoft-cs/cifar10",
        dataset_config="plain_text",
        dataset_split="test",
        recipe="vit-tiny/cifar10/nio",
        arguments={"learning_rate": 0.001, "max_steps": 600, "label_names": ["labels"]},
        processes=2,
        device="cuda",
        started_from="outputs/init/nio_init",
    )
    return run(
        facts=facts,
        result=result(blocks, iterations, groups=4),
        versions=VERSIONS,
        steps=(600, 600),
        metrics=METRICS,
        log=LOG,
        recipe=RECIPE,
        inspection=inspection(blocks),
    )
