"""Xavier, mimetic and structured initialisation, and the range by width: a number or property of each source."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from nio_hf.baselines import METHODS
from nio_hf.baselines.attention import attention_layers
from nio_hf.baselines.positions import position_tables, sine_cosine
from nio_hf.baselines.structured import shift
from nio_hf.core import NIOConfig, find_tensors, initialize
from nio_hf.errors import ModelError
from tests import zoo

WIDTH, HEADS, SIDE = 96, 3, 4
RANGE = 0.02


def vit(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=2, image_size=32, patch_size=8, **{**sizes, **config}))


def text(model):
    tokens = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": tokens, "labels": tokens}


def causal(model_type, **sizes):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=50, **sizes))


def gpt2():
    return causal("gpt2", n_positions=16, n_embd=32, n_layer=1, n_head=2)


def drawn(model, method, batch=None, seed=0, **options):
    """The model with the weights of a method."""
    if batch is None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 5, (8,), generator=generator)
        batch = {"pixel_values": torch.randn(8, 3, 32, 32, generator=generator), "labels": labels}
    config = NIOConfig(report_batches=1, sub_batches=2, seed=seed)
    initialize(model, [batch], lambda m, b: m(**b).loss, config, method=METHODS[method], options=options)
    return model


def layers(model):
    return attention_layers(model, find_tensors(model))


@pytest.mark.parametrize(
    ("width", "square", "mlp"), [(96, 5.1, 3.2), (192, 3.6, 2.3), (384, 2.6, 1.6), (768, 1.8, 1.1)]
)
def test_xavier_has_the_standard_deviations_that_follow_from_the_width(width, square, mlp):
    sizes = {"num_attention_heads": width // 32, "intermediate_size": 4 * width, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(hidden_size=width, image_size=32, patch_size=8, num_labels=5, **sizes))
    drawn(model, "xavier")
    (layer,) = layers(model)
    for matrix in (layer.queries, layer.keys, layer.values, layer.output):
        assert matrix.std().item() / RANGE == pytest.approx(square, abs=0.07)
        assert math.sqrt(6 / (2 * width)) >= matrix.abs().max() > 0.98 * math.sqrt(6 / (2 * width))
    (first,) = (weight for weight in model.parameters() if weight.shape == (4 * width, width))
    assert first.std().item() / RANGE == pytest.approx(mlp, abs=0.07)
    patches = model.get_parameter("vit.embeddings.patch_embeddings.projection.weight")
    assert patches.std().item() == pytest.approx(1 / math.sqrt(3 * 8 * 8), rel=0.03)
    assert patches.abs().max() <= 2 / (0.8796 * math.sqrt(3 * 8 * 8))


def test_xavier_leaves_tables_tokens_and_norms_and_treats_a_fused_projection_as_three_matrices():
    before, after = vit(), drawn(vit(), "xavier")
    for name in ("vit.embeddings.position_embeddings", "vit.embeddings.cls_token", "vit.layernorm.weight"):
        assert torch.equal(before.get_parameter(name), after.get_parameter(name))
    model, batch = text(gpt2())
    tokens = model.get_parameter("transformer.wte.weight").clone()
    assert torch.equal(drawn(model, "xavier", batch).get_parameter("transformer.wte.weight"), tokens)
    fused = model.get_parameter("transformer.h.0.attn.c_attn.weight")
    assert tuple(fused.shape) == (32, 96)
    assert fused.abs().max().item() == pytest.approx(math.sqrt(6 / 64), rel=0.02)


def test_mimetic_values_and_outputs_multiply_to_noise_minus_identity():
    for layer in layers(drawn(vit(), "mimetic")):
        product = layer.output.double() @ layer.values.double()
        noise = product / 0.4 + torch.eye(WIDTH, dtype=torch.float64)
        assert noise.abs().max() <= math.sqrt(3 / WIDTH) + 1e-5
        assert noise.std().item() == pytest.approx(1 / math.sqrt(WIDTH), rel=0.03)
        assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.03)
        # Both roots share the singular values.
        assert layer.output.norm().item() == pytest.approx(layer.values.norm().item(), rel=1e-4)


def test_mimetic_queries_and_keys_are_the_best_approximation_of_their_rank():
    size = WIDTH // HEADS
    for layer in layers(drawn(vit(), "mimetic")):
        for queries, keys in zip(layer.queries.double().split(size), layer.keys.double().split(size), strict=True):
            product = queries.T @ keys
            assert torch.linalg.matrix_rank(product, rtol=1e-5) == size
            # Rows of the roots are orthogonal, with the singular values as squared norms.
            for rows in (queries, keys):
                gram = rows @ rows.T
                torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-5)
            assert product.trace() > 0.1 * WIDTH


@pytest.mark.parametrize(("width", "query_key", "value_output"), [(96, 6.1, 3.6), (192, 4.3, 2.6)])
def test_mimetic_has_the_standard_deviations_of_the_table(width, query_key, value_output):
    heads = {96: 3, 192: 3}[width]
    model = drawn(vit(hidden_size=width, num_attention_heads=heads, intermediate_size=2 * width), "mimetic")
    layer = layers(model)[0]
    assert layer.values.std().item() / RANGE == pytest.approx(value_output, rel=0.05)
    assert layer.queries.std().item() / RANGE == pytest.approx(query_key, rel=0.05)


def test_the_control_has_the_norms_and_no_structure():
    mimetic, control = layers(drawn(vit(), "mimetic")), layers(drawn(vit(), "mimetic", control=True))
    for own, other in zip(mimetic, control, strict=True):
        for name in ("queries", "keys", "values", "output"):
            assert getattr(other, name).norm().item() == pytest.approx(getattr(own, name).norm().item(), rel=0.05)
        assert abs((other.output @ other.values).diagonal().mean().item()) < 0.1


def test_mimetic_positions_are_sines_and_cosines_behind_the_token():
    before, model = vit(), drawn(vit(), "mimetic")
    table, former = (m.get_parameter("vit.embeddings.position_embeddings")[0] for m in (model, before))
    torch.testing.assert_close(table[1:].double(), sine_cosine(SIDE, WIDTH), rtol=0, atol=1e-6)
    assert torch.equal(table[0], former[0])
    kept = drawn(vit(), "mimetic", positions=False).get_parameter("vit.embeddings.position_embeddings")[0]
    assert torch.equal(kept, former)


def test_sines_and_cosines_tell_rows_from_columns():
    table = sine_cosine(3, 8).reshape(3, 3, 8)
    assert torch.equal(table[0, :, 4:], table[0, :1, 4:].expand(3, -1))
    assert torch.equal(table[:, 0, :4], table[:1, 0, :4].expand(3, -1))
    assert table[1, 2, 0].item() == pytest.approx(math.sin(2.0))
    assert table[1, 2, 4].item() == pytest.approx(math.sin(1.0))


def test_shifts_lead_to_the_neighbour():
    for rows in (-1, 0, 1):
        for columns in (-1, 0, 1):
            matrix = shift(SIDE, rows, columns)
            for p in range(SIDE * SIDE):
                row, column = p // SIDE + rows, p % SIDE + columns
                expected = [row * SIDE + column] if 0 <= row < SIDE and 0 <= column < SIDE else []
                assert matrix[p].nonzero().flatten().tolist() == expected


def test_structured_heads_look_at_their_neighbour():
    # Heads as large as the grid, so that nothing is lost to the rank.
    sizes = {"hidden_size": 144, "num_attention_heads": 9, "intermediate_size": 32}
    model = drawn(vit(**sizes), "structured", positions=1.0)
    (table,) = position_tables(model, find_tensors(model))
    places = nn.functional.layer_norm(table.values.double(), (144,))
    for layer in layers(model):
        pairs = zip(layer.queries.double().split(16), layer.keys.double().split(16), strict=True)
        for head, (queries, keys) in enumerate(pairs):
            assert queries.norm().item() == pytest.approx(7, rel=1e-5)
            scores = places @ queries.T @ keys @ places.T
            row, column = divmod((4, 1, 5, 3, 7, 0, 2, 6, 8)[head], 3)
            target = shift(SIDE, row - 1, column - 1)
            inside = target.any(dim=1)
            assert torch.equal(scores.argmax(dim=1)[inside], target.argmax(dim=1)[inside])


def test_structured_positions_grow_and_values_are_those_of_mimetic():
    before, model = vit(), drawn(vit(), "structured")
    name = "vit.embeddings.position_embeddings"
    torch.testing.assert_close(model.get_parameter(name), 18 * before.get_parameter(name))
    product = layers(model)[0].output @ layers(model)[0].values
    assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.03)


def test_the_range_by_width_is_that_of_another_initializer_range():
    config = {"hidden_dropout_prob": 0.0}
    wide = vit(initializer_range=1 / math.sqrt(WIDTH), **config)
    for name, parameter in drawn(vit(**config), "range").named_parameters():
        torch.testing.assert_close(parameter, wide.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_a_range_has_a_factor_of_its_own_for_what_is_added():
    before, after = vit(), drawn(vit(), "range", factor=4.0, additive=32.0)
    factors = {"classifier.weight": 4, "vit.embeddings.position_embeddings": 128, "vit.embeddings.cls_token": 128}
    for name, factor in {**factors, "vit.layernorm.weight": 1}.items():
        torch.testing.assert_close(after.get_parameter(name), factor * before.get_parameter(name))


def test_projections_are_found_in_every_form():
    for model, expected in (
        (vit(), [(HEADS, (WIDTH, WIDTH))] * 2),
        (zoo.vision_model("swin", depths=[1, 1]), [(1, (8, 8)), (2, (16, 16))]),
        (zoo.text_model("bert"), [(2, (16, 16))] * 2),
        (gpt2(), [(2, (32, 32))]),
    ):
        found = layers(model)
        assert [(layer.heads, tuple(layer.queries.shape)) for layer in found] == expected
        for layer in found:
            before = layer.output.clone()
            layer.output.mul_(2)
            again = next(other for other in layers(model) if other.name == layer.name)
            assert torch.equal(again.output, 2 * before)


def test_another_seed_draws_others():
    for method in ("xavier", "mimetic", "structured"):
        first, second = (layers(drawn(vit(), method, seed=seed))[0].values for seed in (0, 1))
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mimetic", "no attention layer that is known"),
        ("structured", "tables of absolute positions: none"),
        ("range", "a config without initializer_range and hidden_size"),
    ],
)
def test_a_model_that_a_method_is_not_defined_for_is_refused(method, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    before = model[1].weight.clone()
    batch = (torch.randn(8, 3, 32, 32), torch.randint(0, 5, (8,)))
    task = (model, [batch], zoo.vector_loss, NIOConfig(report_batches=1, sub_batches=2))
    with pytest.raises(ModelError, match=message):
        initialize(*task, method=METHODS[method])
    assert torch.equal(model[1].weight, before)


def test_grouped_queries_and_positions_of_no_grid_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    llama, batch = text(causal("llama", num_attention_heads=4, num_key_value_heads=2, **sizes))
    with pytest.raises(ModelError, match=r"self_attn: projections of the shapes \(32, 32\), \(16, 32\)"):
        drawn(llama, "mimetic", batch)
    model, batch = text(gpt2())
    with pytest.raises(ModelError, match=r"tables of absolute positions: transformer\.wpe\.weight\. Choose a vision"):
        drawn(model, "structured", batch)


def test_mimetic_says_which_positions_it_leaves(caplog):
    model, batch = text(gpt2())
    before = model.get_parameter("transformer.wpe.weight").clone()
    drawn(model, "mimetic", batch)
    assert "leaves transformer.wpe.weight as it is" in caplog.text
    assert torch.equal(model.get_parameter("transformer.wpe.weight"), before)
