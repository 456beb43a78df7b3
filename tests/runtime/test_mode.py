"""Evaluation turns dropout off in the graph, training turns it on again as it was."""

import torch
from torch import fx, nn

from ilm_compile.runtime.mode import set_training

aten = torch.ops.aten


def module_with_dropout() -> nn.Module:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.dropout.default, (x, 0.5, True))
    z = graph.call_function(
        aten.scaled_dot_product_attention.default, (y, x, x), {"dropout_p": 0.5}
    )
    graph.output(z)
    return nn.Sequential(fx.GraphModule(nn.Module(), graph))


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    module = module_with_dropout()
    x = torch.randn(2, 3, 16, 4)
    set_training(module, False)
    expected = nn.functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(module(x), expected)
    set_training(module, True)
    assert not torch.equal(module(x), module(x))
    graph = module[0].graph
    (dropout,) = graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert dropout.args[1:] == (0.5, True)
