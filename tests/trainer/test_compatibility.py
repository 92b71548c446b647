"""What works together with NIO, as the table in docs/trainer.md has it, and a user's own code."""

import functools

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import BatchFeature, TrainerCallback, default_data_collator

from nio_hf import NIOTrainer
from nio_hf.errors import ModelError, NIOMemoryError
from nio_hf.hub.run_folder import INIT_DIR_NAME
from tests.trainer import toys
from tests.trainer.toys import (
    CLASSES,
    PUBLISHED,
    Observed,
    ToyImages,
    build,
    load_state,
    refused,
    snapshot,
    trainer_of,
    unchanged,
)
from tests.versions import CHECKPOINTING, QUERIES, VALUES, checkpoints_activations
from tests.zoo import vision_model

SMOOTHING = 0.1
INDUCTOR_WARNING = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"
trained = functools.partial(toys.trained, trainer_class=Observed, **PUBLISHED)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """ViT and Swin, trained with nothing beside NIO."""
    models = {name: trained(tmp_path_factory.mktemp(name), model=build(name)) for name in ("vit", "swin")}
    for trainer in models.values():
        _check(trainer, trainer)
        assert sum(abs(omega - 1) > 1e-3 for omega in trainer.results[0].scales.values()) > 10
    return models


@pytest.fixture
def compiled_graphs():
    """The number of graphs that torch.compile made since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "precision", "computed_in"),
    # On the CPU fp16 is accepted without a word, and there is no autocast.
    [("vit", "bf16", torch.bfloat16), ("swin", "bf16", torch.bfloat16), ("vit", "fp16", torch.float32)],
)
def test_half_precision_is_for_training_and_nio_stays_in_fp32(name, precision, computed_in, plain, tmp_path):
    model = build(name)
    seen = _watch_dtypes(model)
    trainer = trained(tmp_path, model=model, **{precision: True})
    assert seen == {"nio": {torch.float32}, "training": {computed_in}}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _check(trainer, plain[name])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_fp16_on_cuda_scales_the_gradients_of_training_only(name, tmp_path):
    expected = trained(tmp_path / "fp32", model=build(name), use_cpu=False)
    model = build(name)
    seen = _watch_dtypes(model)
    trainer = trained(tmp_path / "fp16", model=model, use_cpu=False, fp16=True, max_steps=10)
    assert trainer.accelerator.scaler is not None
    assert seen == {"nio": {torch.float32}, "training": {torch.float16}}
    _check(trainer, expected)


def test_another_precision_of_nio_would_be_noticed(plain, tmp_path):
    trainer = trained(tmp_path, bf16=True, nio_precision="bf16")
    assert abs(trainer.results[0].before.value - plain["vit"].results[0].before.value) > 1e-5
    assert _difference(trainer.results[0], plain["vit"].results[0]) > 1e-4


def test_initialising_again_after_a_training_in_bf16_is_in_fp32(tmp_path):
    trainer = trained(tmp_path / "trained", bf16=True)
    copy = build("vit")
    copy.load_state_dict(trainer.model.state_dict())
    fresh = trainer_of(tmp_path / "fresh", model=copy, **PUBLISHED)
    patched = trainer.model.forward
    assert trainer.inspect().measured.parts == fresh.inspect().measured.parts
    assert trainer.model.forward == patched
    assert _difference(trainer.run_nio(), fresh.run_nio()) < 1e-5


@pytest.mark.filterwarnings(INDUCTOR_WARNING)
@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_a_compiled_training_starts_from_the_same_initialisation(backend, tmp_path, compiled_graphs):
    expected = trained(tmp_path / "plain", model=build("vit", num_hidden_layers=1), max_steps=1)
    assert compiled_graphs() == 0
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    trainer = trained(tmp_path / backend, model=build("vit", num_hidden_layers=1), max_steps=1, **compiled)
    assert compiled_graphs() > 0
    _check(trainer, expected)
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=0, atol=3e-4)


@pytest.mark.parametrize("settings", [None, {"use_reentrant": False, "every_n_layers": 2}], ids=["all", "every second"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_activation_checkpointing_changes_no_scale(name, settings, plain, tmp_path):
    checkpointing = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": settings}
    trainer = trained(tmp_path, model=build(name), **checkpointing)
    assert checkpoints_activations(trainer.model)
    _check(trainer, plain[name])


@pytest.mark.parametrize(
    "search",
    [{}, {**PUBLISHED, "nio_curvature": "exact"}, {**PUBLISHED, "nio_curvature": "finite_difference"}],
    ids=["default", "exact", "finite_difference"],
)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_reentrant_activation_checkpointing_is_refused(name, search, tmp_path):
    reentrant = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(tmp_path, model=build(name), **search, **reentrant)
    with refused(trainer, ModelError, r"reentrant activation checkpointing .* Checkpoint with use_reentrant=False"):
        trainer.train()


def test_initialisation_does_not_depend_on_gradient_accumulation(plain, tmp_path):
    trainer = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert trainer.state.global_step == 2
    _check(trainer, plain["vit"])


def test_a_training_that_starts_again_in_smaller_batches_keeps_nio_and_its_history(plain, tmp_path):
    class Small(Observed):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = trained(tmp_path, trainer_class=Small, auto_find_batch_size=True)
    assert trainer._train_batch_size <= 5
    assert len(trainer.begun_with) > 1
    logged = [entry["nio_iteration"] for entry in trainer.state.log_history if "nio_iteration" in entry]
    assert logged == [record.iteration for record in trainer.nio_result.history]
    _check(trainer, plain["vit"])


def test_out_of_memory_inside_nio_does_not_shrink_the_training_batch(plain, tmp_path):
    sizes = []

    class Full(Observed):
        def compute_nio_loss(self, model, inputs):
            sizes.append(len(inputs["labels"]))
            if sizes[-1] > 1 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_nio_loss(model, inputs)

    trainer = trained(tmp_path, trainer_class=Full, auto_find_batch_size=True)
    assert {1, 2} <= set(sizes)
    assert trainer._train_batch_size == 8
    _check(trainer, plain["vit"], tolerance=1e-4)


def test_each_trial_of_a_search_equals_a_run_of_its_own_in_a_folder_of_its_own(tmp_path):
    pytest.importorskip("optuna")
    tried = [{"learning_rate": 1e-4, "nio_lr": 0.01}, {"learning_rate": 1e-2, "nio_lr": 0.01}]
    tried += [{"learning_rate": 1e-4, "nio_lr": 0.02}]
    losses = []

    def space(trial):
        return {name: trial.suggest_float(name, value, value) for name, value in tried[trial.number].items()}

    def objective(metrics):
        losses.append(metrics["eval_loss"])
        return losses[-1]

    search = _searching(tmp_path / "search", save_strategy="steps", save_steps=1)
    best = search.hyperparameter_search(space, objective, 3, "minimize", "optuna")
    assert len(search.results) == len(set(losses)) == 3
    assert best.objective == min(losses)
    for number, settings in enumerate(tried):
        alone = _searching(tmp_path / f"alone-{number}", **settings)
        alone.train()
        assert _difference(search.results[number], alone.results[0]) < 1e-5
        _close(search.initialised[number], alone.initialised[0])
        assert losses[number] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
        saved = load_state(tmp_path / "search" / f"run-{number}" / INIT_DIR_NAME)
        assert [tensor.omega for tensor in saved.tensors] == [*search.results[number].scales.values()]
    assert _difference(search.results[0], search.results[1]) < 1e-5
    assert _difference(search.results[0], search.results[2]) > 1e-3
    sealed = [path.parent.relative_to(tmp_path / "search") for path in tmp_path.glob("search/*/*/nio_manifest.json")]
    folders = [f"run-{number}/{name}" for number in (0, 1, 2) for name in (INIT_DIR_NAME, "checkpoint-1")]
    assert sorted(map(str, sealed)) == sorted(folders)


class FailingOnce(TrainerCallback):
    """Ends the first training of a search with an error, behind NIO, and keeps what the others have logged of NIO."""

    def __init__(self):
        self.failed = False
        self.iterations = []

    def on_step_begin(self, *args, **kwargs):
        if not self.failed:
            self.failed = True
            raise ArithmeticError("this trial fails")

    def on_train_end(self, args, state, control, **kwargs):
        self.iterations.append(sum("nio_grad_cosine" in entry for entry in state.log_history))


@pytest.mark.parametrize(("nio", "logged"), [([True, True], [2]), ([True, False, True], [0, 2])])
def test_a_trial_behind_one_that_failed_logs_its_own_nio_or_none(nio, logged, tmp_path):
    pytest.importorskip("optuna")
    failing = FailingOnce()
    _searching(tmp_path, callbacks=[failing]).hyperparameter_search(
        lambda trial: {"nio": trial.suggest_int("nio", nio[trial.number], nio[trial.number])},
        lambda metrics: metrics["eval_loss"],
        len(nio),
        "minimize",
        "optuna",
        catch=(ArithmeticError,),
    )
    assert failing.iterations == logged


@pytest.mark.parametrize("way", ["subclass", "function"])
def test_nio_uses_the_loss_of_training(way, plain, tmp_path):
    """Label smoothing of one's own leads where `label_smoothing_factor` does, and elsewhere than no smoothing."""

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=SMOOTHING)

    class Smoothing(Observed):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels = inputs.pop("labels")
            return loss(model(**inputs), labels)

    own = {"trainer_class": Smoothing} if way == "subclass" else {"compute_loss_func": loss}
    trainer = trained(tmp_path / "own", **own)
    expected = trained(tmp_path / "argument", label_smoothing_factor=SMOOTHING)
    _check(trainer, expected)
    assert _difference(expected.results[0], plain["vit"].results[0]) > 1e-4
    _close(snapshot(trainer.model), snapshot(expected.model))


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_an_optimizer_made_before_nio_updates_the_scaled_parameters(plain, tmp_path):
    model = build("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    keep = KeepGradients()
    given = {"model": model, "optimizers": (optimizer, scheduler), "callbacks": [keep]}
    trainer = trained(tmp_path, **given, max_steps=1, max_grad_norm=0.0)
    _check(trainer, plain["vit"])
    for name, parameter in model.named_parameters():
        expected = trainer.initialised[0][name] - 0.1 * keep.gradients[name]
        torch.testing.assert_close(parameter.data, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_model_with_adapters_is_refused(way, tmp_path):
    trainer = trainer_of(tmp_path, model=_with_adapters(build("vit"), way))
    with refused(trainer, ModelError, r"has adapters \(PEFT\).*before adapters are added, or set nio=False"):
        trainer.train()


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_adapters_added_after_nio_train_on_the_initialised_weights(way, plain, tmp_path):
    base = trainer_of(tmp_path / "base", **PUBLISHED)
    base.run_nio()
    frozen = dict(base.model.named_parameters())
    adapted = _with_adapters(base.model, way)
    trainer = trained(tmp_path / "adapted", model=adapted, nio=False, learning_rate=1e-2)
    assert trainer.results == []
    for name, parameter in frozen.items():
        torch.testing.assert_close(parameter.data, plain["vit"].initialised[0][name], rtol=1e-5, atol=0)
    trained_ones = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained_ones) == 8
    assert all(parameter.any() for parameter in trained_ones), "lora_B is zero before training"


def test_a_second_training_goes_on_without_another_initialisation(plain, tmp_path):
    trainer = trained(tmp_path)
    after_first = snapshot(trainer.model)
    trainer.train()
    assert unchanged(trainer.begun_with[1], after_first)
    assert not unchanged(snapshot(trainer.model), after_first)
    _check(trainer, plain["vit"])


class Net(nn.Module):
    """A module that is no model of transformers, with a config whose `num_labels` means nothing to it."""

    def __init__(self):
        super().__init__()
        self.config = build("vit").config
        self.config.num_labels = 2
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, pixel_values, labels):
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class NoisyCollator:
    """Draws from a generator that it makes when it is called first, as a collator that masks tokens does."""

    def __init__(self):
        self.generator = None
        self.draws = []

    def __call__(self, rows):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(0)
        self.draws.append(float(torch.rand((), generator=self.generator)))
        return default_data_collator(rows)


class ImageStream(IterableDataset):
    """Few images, one after the other."""

    def __iter__(self):
        data = ToyImages(40)
        return iter([data[index] for index in range(len(data))])


def test_a_model_of_ones_own_is_not_held_to_a_config_it_does_not_follow(tmp_path):
    trainer_of(tmp_path, model=Net()).run_nio()


def test_a_collator_with_a_generator_of_its_own_draws_the_same_in_training(tmp_path):
    without, initialised = NoisyCollator(), NoisyCollator()
    trained(tmp_path / "plain", data_collator=without, nio=False)
    trained(tmp_path / "nio", data_collator=initialised)
    assert without.draws == initialised.draws != []


def test_batches_keep_their_type_and_become_fp32(tmp_path):
    seen = set()

    class ByAttribute(NIOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.add((type(inputs), inputs.pixel_values.dtype))
            return nn.functional.cross_entropy(model(inputs.pixel_values.float()).logits, inputs.labels)

    def collate(rows):
        images = torch.stack([row["pixel_values"] for row in rows]).half()
        return BatchFeature({"pixel_values": images, "labels": torch.tensor([row["labels"] for row in rows])})

    trainer_of(tmp_path, ByAttribute, data_collator=collate, remove_unused_columns=False).run_nio()
    assert seen == {(BatchFeature, torch.float32)}


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_streams_are_iterated_as_often_as_it_takes(kind, tmp_path):
    stream = ImageStream() if kind == "torch" else datasets.IterableDataset.from_generator(lambda: iter(ImageStream()))
    result = trainer_of(tmp_path, train_dataset=stream, nio_search="published", nio_iterations=6).run_nio()
    assert len(result.history) == 6


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("compute_nio_loss", "the first sub-batch: out of memory for 2 samples at once"),
        ("prepare_nio_batch", r"NIO: out of memory .* Set nio_micro_batch_size, or lower nio_batch_size"),
    ],
)
def test_an_out_of_memory_of_nio_on_the_cpu_does_not_shrink_the_training_batch(where, message, tmp_path):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    trainer = trainer_of(tmp_path, type("Full", (NIOTrainer,), {where: full}), auto_find_batch_size=True)
    with pytest.raises(NIOMemoryError, match=message):
        trainer.train()
    assert trainer._train_batch_size == 8


def _check(trainer, expected, tolerance=1e-5):
    """NIO ran once, made what it makes in the other trainer, and training went on from there in every scaled tensor."""
    assert len(trainer.results) == 1
    assert trainer.results[0].scales.keys() == expected.results[0].scales.keys()
    assert _difference(trainer.results[0], expected.results[0]) < tolerance
    for name in ("before", "after"):
        one, other = (getattr(result, name).value for result in (trainer.results[0], expected.results[0]))
        assert one == pytest.approx(other, abs=10 * tolerance), name
    _close(trainer.initialised[0], expected.initialised[0], tolerance)
    assert unchanged(trainer.begun_with[0], trainer.initialised[0])
    weights = trainer.model.state_dict()
    assert not [name for name in trainer.results[0].scales if torch.equal(weights[name], trainer.initialised[0][name])]


def _difference(result, expected):
    """The largest relative difference of a scale."""
    return max(abs(result.scales[name] / omega - 1) for name, omega in expected.scales.items())


def _close(weights, expected, tolerance=1e-5):
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=tolerance, atol=1e-7)


def _watch_dtypes(model):
    """What the linear layers compute in: NIO runs them in evaluation mode, on a copy that has the same hooks."""
    seen = {"nio": set(), "training": set()}

    def watch(module, inputs, output):
        seen["training" if module.training else "nio"].add(output.dtype)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(watch)
    return seen


def _searching(output_dir, **given):
    """A trainer for a search, whose model is made from the random state as it is."""
    quick = {**PUBLISHED, "nio_iterations": 2, "nio_report_batches": 1, "max_steps": 1, "eval_dataset": ToyImages(8)}
    model = {"model_init": lambda: vision_model("vit", CLASSES, num_hidden_layers=1)}
    return trainer_of(output_dir, Observed, **{**quick, **model, **given})


def _with_adapters(model, way):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=f".*({QUERIES}|{VALUES})", r=2)
    if way == "get_peft_model":
        return peft.get_peft_model(model, config)
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"this release of transformers wants another one of peft: {error}")
    return model
