"""The variance of the weights."""

import itertools

import pytest
import torch
from torch import nn

from nio_hf.baselines import METHODS
from nio_hf.core import NIOConfig, initialize
from nio_hf.errors import ModelError
from tests import zoo
from tests.core.cases import batches_of, case
from tests.versions import BRANCH_ENDS

CONFIG = NIOConfig(sub_batches=2, report_batches=1)


def run(model, batches, loss_fn, **options):
    return initialize(model, batches, loss_fn, CONFIG, method=METHODS["architecture_aware"], options=options)


@pytest.mark.parametrize(("name", "gain"), [("mlp", 2.0), ("mlp", 1.0), ("vit", 2.0), ("resnet", 2.0), ("gpt2", 2.0)])
def test_weights_have_the_variance_of_the_paper(name, gain):
    made, before = case(name), case(name).model
    result = run(made.model, batches_of(name, 2), made.loss_fn, **({} if gain == 2 else {"gain": gain}))
    ends = (*BRANCH_ENDS, "c_proj.weight", "layer.1.convolution.weight", "shortcut.convolution.weight")
    count = 0
    for tensor in result.tensors:
        weight = made.model.get_parameter(tensor.name).detach()
        torch.testing.assert_close(weight, tensor.omega * before.get_parameter(tensor.name).detach())
        if tensor.kind in ("input", "trunk", "transition", "head") and "wte" not in tensor.name:
            inputs = weight.shape[0] if name == "gpt2" else weight[0].numel()
            expected = gain / (inputs * (2 if tensor.name.endswith(ends) else 1))
            assert weight.square().mean().item() == pytest.approx(expected, rel=1e-4), tensor.name
            count += 1
        else:
            assert tensor.omega == 1
    assert count >= 3


def test_a_residual_chain_of_relus_keeps_its_second_moment():
    """What the in-degree is for: without it the second moment would double with every block."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(256, 256, bias=False)
            self.shortcut = nn.Linear(256, 256, bias=False)

        def forward(self, x):
            return torch.relu(self.layer(x) + self.shortcut(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(8)), nn.Linear(256, 5))
    batch = zoo.vectors(32, inputs=256)
    run(model, [batch, batch], zoo.vector_loss)
    sizes = [x.square().mean().item() for x in itertools.accumulate(model[:8], lambda x, f: f(x), initial=batch[0])]
    assert sizes[-1] == pytest.approx(sizes[1], rel=0.4)


def test_a_model_without_weights_of_layers_is_refused():
    model = nn.Sequential(nn.LayerNorm(6))

    def loss_fn(model, batch):
        return (model(batch[0]) - batch[0].roll(1)).square().mean()

    with pytest.raises(ModelError, match=r"Sequential: no layer has a weight to initialise"):
        run(model, batches_of("mlp", 2), loss_fn)
