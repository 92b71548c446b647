"""What works together with NIO, as the table in docs/trainer.md has it."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from nio_hf.errors import ModelError
from nio_hf.hub.run_folder import INIT_DIR_NAME, STATE_NAME
from tests.trainer.toys import CLASSES, ToyImages, arguments, build, load_state, snapshot, unchanged
from tests.versions import CHECKPOINTING, QUERIES, VALUES, checkpoints_activations
from tests.zoo import vision_model

SMOOTHING = 0.1
SENSITIVE = {"nio_search": "published", "nio_groups": "tensor", "nio_iterations": 5, "nio_lr": 0.05}
"""Settings whose scales differ where a loss does; those that are computed may not."""
INDUCTOR_WARNING = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated and will be removed in v6:FutureWarning"


class Observed(NIOTrainer):
    """Keeps the weights that each run of NIO left, and those that each training began with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.results = []
        self.initialised = []
        self.begun_with = []
        self.add_callback(_OnTrainBegin(lambda model: self.begun_with.append(snapshot(model))))

    def run_nio(self, *args, **kwargs):
        result = super().run_nio(*args, **kwargs)
        self.results.append(result)
        self.initialised.append(snapshot(self.unwrapped_model))
        return result


class _OnTrainBegin(TrainerCallback):
    def __init__(self, action):
        self._action = action

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._action(model)


class _KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """ViT and Swin, trained with nothing beside NIO."""
    trained = {name: _trained(tmp_path_factory.mktemp(name), build(name)) for name in ("vit", "swin")}
    for trainer in trained.values():
        _check(trainer, trainer)
        assert sum(abs(omega - 1) > 1e-3 for omega in trainer.results[0].scales.values()) > 10
    return trained


@pytest.fixture
def compiled_graphs():
    """The number of graphs that torch.compile made since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_bf16_is_for_training_and_nio_stays_in_fp32(name, plain, tmp_path):
    model = build(name)
    seen = _watch_dtypes(model)
    trainer = _trained(tmp_path, model, bf16=True)
    assert seen == {"nio": {torch.float32}, "training": {torch.bfloat16}}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _check(trainer, plain[name])


def test_another_precision_of_nio_would_be_noticed(plain, tmp_path):
    trainer = _trained(tmp_path, build("vit"), bf16=True, nio_precision="bf16")
    assert abs(trainer.results[0].before.value - plain["vit"].results[0].before.value) > 1e-5
    assert _difference(trainer.results[0], plain["vit"].results[0]) > 1e-4


def test_initialising_again_after_a_training_in_bf16_is_in_fp32(tmp_path):
    trainer = _trained(tmp_path / "trained", build("vit"), bf16=True)
    copy = build("vit")
    copy.load_state_dict(trainer.model.state_dict())
    fresh = NIOTrainer(model=copy, args=arguments(tmp_path / "fresh", **SENSITIVE), train_dataset=ToyImages())
    patched = trainer.model.forward
    assert trainer.inspect().measured.parts == fresh.inspect().measured.parts
    assert trainer.model.forward == patched
    assert _difference(trainer.run_nio(), fresh.run_nio()) < 1e-5


def test_fp16_on_the_cpu_is_accepted_and_trains_in_fp32(plain, tmp_path):
    """Neither TrainingArguments nor Accelerate says so: there is no autocast and no gradient scaler."""
    model = build("vit")
    seen = _watch_dtypes(model)
    trainer = _trained(tmp_path, model, fp16=True)
    assert trainer.accelerator.mixed_precision == "fp16"
    assert trainer.accelerator.scaler is None
    assert seen == {"nio": {torch.float32}, "training": {torch.float32}}
    _check(trainer, plain["vit"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_fp16_on_cuda_scales_the_gradients_of_training_only(name, tmp_path):
    expected = _trained(tmp_path / "fp32", build(name), use_cpu=False)
    model = build(name)
    seen = _watch_dtypes(model)
    trainer = _trained(tmp_path / "fp16", model, use_cpu=False, fp16=True, max_steps=10)
    assert trainer.accelerator.scaler is not None
    assert seen == {"nio": {torch.float32}, "training": {torch.float16}}
    _check(trainer, expected)


@pytest.mark.filterwarnings(INDUCTOR_WARNING)
@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_a_compiled_training_starts_from_the_same_initialisation(backend, tmp_path, compiled_graphs):
    expected = _trained(tmp_path / "plain", build("vit", num_hidden_layers=1), max_steps=1)
    assert compiled_graphs() == 0
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    trainer = _trained(tmp_path / backend, build("vit", num_hidden_layers=1), max_steps=1, **compiled)
    assert compiled_graphs() > 0
    _check(trainer, expected)
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=0, atol=3e-4)


@pytest.mark.parametrize("settings", [{}, {"use_reentrant": False, "every_n_layers": 2}], ids=["all", "every second"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_activation_checkpointing_changes_no_scale(name, settings, plain, tmp_path):
    kwargs = settings or None
    trainer = _trained(tmp_path, build(name), **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": kwargs})
    assert checkpoints_activations(trainer.model)
    _check(trainer, plain[name])


@pytest.mark.parametrize(
    "search",
    [{}, {**SENSITIVE, "nio_curvature": "exact"}, {**SENSITIVE, "nio_curvature": "finite_difference"}],
    ids=["default", "exact", "finite_difference"],
)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_reentrant_activation_checkpointing_is_refused(name, search, tmp_path):
    reentrant = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    model = build(name)
    before = snapshot(model)
    args = arguments(tmp_path, **search, **reentrant)
    with pytest.raises(ModelError, match=r"reentrant activation checkpointing .* Checkpoint with use_reentrant=False"):
        NIOTrainer(model=model, args=args, train_dataset=ToyImages()).train()
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_initialisation_does_not_depend_on_gradient_accumulation(name, plain, tmp_path):
    trainer = _trained(tmp_path, build(name), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert trainer.state.global_step == 2
    _check(trainer, plain[name])


def test_a_smaller_training_batch_is_found_from_the_same_initialisation(plain, tmp_path):
    tried = []

    class Small(Observed):
        def training_step(self, model, inputs, *args, **kwargs):
            tried.append(len(inputs["labels"]))
            if tried[-1] > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = _trained(tmp_path, build("vit"), Small, auto_find_batch_size=True)
    sizes = sorted(set(tried), reverse=True)
    assert sizes[0] == 8
    assert tried == [*sizes[:-1], sizes[-1], sizes[-1]]
    assert trainer._train_batch_size == sizes[-1] <= 5
    assert len(trainer.begun_with) == len(sizes)
    _check(trainer, plain["vit"])


def test_out_of_memory_inside_nio_does_not_shrink_the_training_batch(plain, tmp_path):
    sizes = []

    class Full(Observed):
        def compute_nio_loss(self, model, inputs):
            sizes.append(len(inputs["labels"]))
            if sizes[-1] > 1 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_nio_loss(model, inputs)

    trainer = _trained(tmp_path, build("vit"), Full, auto_find_batch_size=True)
    assert {1, 2} <= set(sizes)
    assert trainer._train_batch_size == 8
    _check(trainer, plain["vit"], tolerance=1e-4)


def test_each_trial_of_a_search_equals_a_run_of_its_own(tmp_path):
    pytest.importorskip("optuna")
    tried = [{"learning_rate": 1e-4, "nio_lr": 0.01}, {"learning_rate": 1e-2, "nio_lr": 0.01}]
    tried += [{"learning_rate": 1e-4, "nio_lr": 0.02}]
    losses = []

    def space(trial):
        return {name: trial.suggest_float(name, value, value) for name, value in tried[trial.number].items()}

    def objective(metrics):
        losses.append(metrics["eval_loss"])
        return losses[-1]

    search = _searching(tmp_path / "search")
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
    assert len(list((tmp_path / "search").rglob(STATE_NAME))) == 3


@pytest.mark.parametrize("way", ["subclass", "function"])
def test_nio_uses_the_loss_of_training(way, plain, tmp_path):
    """Label smoothing of one's own leads where `label_smoothing_factor` does, and elsewhere than no smoothing."""
    trainer, expected = (_smoothed(kind, tmp_path / kind) for kind in (way, "argument"))
    _check(trainer, expected)
    assert _difference(expected.results[0], plain["vit"].results[0]) > 1e-4
    _close(snapshot(trainer.model), snapshot(expected.model))


def test_an_optimizer_made_before_nio_updates_the_scaled_parameters(plain, tmp_path):
    model = build("vit")
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    keep = _KeepGradients()
    settings = {"optimizers": (optimizer, scheduler), "callbacks": [keep]}
    trainer = _trained(tmp_path, model, Observed, settings, max_steps=1, max_grad_norm=0.0)
    _check(trainer, plain["vit"])
    assert {id(tensor) for group in optimizer.param_groups for tensor in group["params"]} == {
        id(tensor) for tensor in model.parameters()
    }
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        expected = trainer.initialised[0][name] - 0.1 * keep.gradients[name]
        torch.testing.assert_close(parameter.data, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_model_with_adapters_is_refused(way, tmp_path):
    model = _with_adapters(build("vit"), way)
    before = snapshot(model)
    trainer = NIOTrainer(model=model, args=arguments(tmp_path), train_dataset=ToyImages())
    with pytest.raises(ModelError, match=r"has adapters \(PEFT\).*before adapters are added, or set nio=False"):
        trainer.train()
    assert unchanged(before, snapshot(model))
    assert trainer.nio_result is None


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_adapters_added_after_nio_train_on_the_initialised_weights(way, plain, tmp_path):
    model = build("vit")
    base = Observed(model=model, args=arguments(tmp_path / "base", **SENSITIVE), train_dataset=ToyImages())
    base.run_nio()
    frozen = dict(model.named_parameters())
    adapted = _with_adapters(model, way)
    trainer = _trained(tmp_path / "adapted", adapted, nio=False, learning_rate=1e-2)
    assert trainer.results == []
    for name, parameter in frozen.items():
        torch.testing.assert_close(parameter.data, plain["vit"].initialised[0][name], rtol=1e-5, atol=0)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 8
    assert all(parameter.any() for parameter in trained), "lora_B is zero before training"


def test_a_second_training_goes_on_without_another_initialisation(plain, tmp_path):
    trainer = _trained(tmp_path, build("vit"))
    after_first = snapshot(trainer.model)
    trainer.train()
    assert unchanged(trainer.begun_with[1], after_first)
    assert not unchanged(snapshot(trainer.model), after_first)
    _check(trainer, plain["vit"])


def _trained(output_dir, model, trainer_class=Observed, settings=None, **changes):
    """A trainer that has trained; `settings` are those of the trainer, `changes` those of its arguments."""
    args = arguments(output_dir, **{**SENSITIVE, **changes})
    trainer = trainer_class(model=model, args=args, train_dataset=ToyImages(), **(settings or {}))
    trainer.train()
    return trainer


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
    trained = trainer.model.state_dict()
    assert not [name for name in trainer.results[0].scales if torch.equal(trained[name], trainer.initialised[0][name])]


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


def _smoothed(way, output_dir):
    """A ViT trained with label smoothing that comes from the argument, a subclass or a function."""

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=SMOOTHING)

    class Smoothing(Observed):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels = inputs.pop("labels")
            return loss(model(**inputs), labels)

    if way == "argument":
        return _trained(output_dir, build("vit"), label_smoothing_factor=SMOOTHING)
    if way == "function":
        return _trained(output_dir, build("vit"), Observed, {"compute_loss_func": loss})
    return _trained(output_dir, build("vit"), Smoothing)


def _searching(output_dir, **changes):
    """A trainer for a search, whose model is made from the random state as it is."""
    quick = {**SENSITIVE, "nio_iterations": 2, "nio_report_batches": 1, "max_steps": 1}
    args = arguments(output_dir, **{**quick, **changes})
    data = {"train_dataset": ToyImages(), "eval_dataset": ToyImages(8)}
    return Observed(model_init=lambda: vision_model("vit", CLASSES, num_hidden_layers=1), args=args, **data)


def _with_adapters(model, way):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=f".*({QUERIES}|{VALUES})", r=2)
    if way == "add_adapter":
        try:
            model.add_adapter(config)
        except ValueError as error:
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(f"this release of transformers wants another one of peft: {error}")
        return model
    wrapped = peft.get_peft_model(model, config)
    return wrapped
