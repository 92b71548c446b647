"""What the benchmark counts, held against what others count, and against numbers worked out by hand."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accounting import Counts, allocator_bytes, counted, median_seconds
from nio_hf import grad_cosine
from tests.core.cases import case


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "gpt2"])
def test_operations_are_those_of_the_counter_of_torch(name):
    made = case(name)

    def work():
        grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=2)

    with FlopCounterMode(display=False) as counter:
        work()
    with Counts() as counts:
        work()
        assert counts.operations == counted(work).operations, "also where counts are read before the end"
    # torch's formula leaves the groups of a backward convolution out, which ConvNeXt has.
    if name == "convnext":
        assert 0 < counted(work).operations < counter.get_total_flops()
    else:
        assert counted(work).operations == counter.get_total_flops()


def test_a_vectorised_convolution_costs_what_the_loop_over_samples_costs():
    weight, images = torch.randn(8, 3, 4, 4), torch.randn(5, 1, 3, 16, 16)

    def loss(weight, image):
        return nn.functional.conv2d(image, weight, stride=4).square().sum()

    loop = counted(lambda: [grad(loss)(weight, image) for image in images]).operations
    at_once = counted(lambda: vmap(grad(loss), in_dims=(None, 0))(weight, images)).operations
    # 8 x 4 x 4 outputs of 3 x 4 x 4 products for each of 5 images, forward and for the weight, 2 operations each.
    assert loop == at_once == 2 * 2 * 5 * (8 * 16) * 48


def test_the_peak_is_of_what_is_alive_at_once():
    block = 4 * 1000

    def work():
        first = torch.ones(1000)
        second = first.view(10, 100) + 1
        del first
        third = second * 2
        del second, third
        torch.ones(1000)

    assert counted(work).peak == 2 * block
    given = torch.ones(1000)
    assert counted(lambda: given.view(10, 100).add_(1)).peak == 0, "tensors from before and their views"


def test_the_peak_is_that_of_the_allocator():
    layer, inputs = nn.Linear(64, 64), torch.randn(128, 64)

    def work():
        return torch.autograd.grad(layer(inputs).exp().sum(), list(layer.parameters()))

    assert counted(work).peak == allocator_bytes(work)


def test_rounds_are_interleaved():
    order = []
    works = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = median_seconds(works, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 2
    assert seconds.keys() == {"a", "b"}
