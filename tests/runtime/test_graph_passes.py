"""What Inductor is given compiles, where what it makes by itself does not."""

import torch
from torch import fx, nn

from ilm_compile.runtime import compiled
from tests.support.compiled import skip_without_inductor

aten = torch.ops.aten
WIDTH = 64


def test_two_biases_that_see_the_same_rows_are_compiled_in_bfloat16() -> None:
    skip_without_inductor()
    graph, root = fx.Graph(), nn.Module()
    torch.manual_seed(0)
    x = graph.placeholder("x")
    x.meta["val"] = given = torch.randn(4, 8, WIDTH, dtype=torch.bfloat16)
    products = []
    for branch in ("attention", "mlp"):
        held = []
        for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,))):
            parameter = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))
            root.register_parameter(f"{branch}_{name}", parameter)
            held.append(graph.get_attr(f"{branch}_{name}"))
            held[-1].meta["val"] = parameter
        products.append(graph.call_function(aten.linear.default, (x, *held)))
        products[-1].meta["val"] = given
    graph.output((graph.call_function(aten.add.Tensor, tuple(products)),))
    products[-1].next.meta["val"] = given
    module, compiler = fx.GraphModule(root, graph), compiled.RegionCompiler(compiled.INDUCTOR)
    run = compiler.code(module, "layers_0", type(module).forward)
    (found,) = run(module, given)
    found.backward(given)
    assert [each.problem for each in compiler.compilations] == [""]
    biases = module.attention_bias, module.mlp_bias
    for bias in biases:
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad, given.sum((0, 1)), rtol=1e-2, atol=1e-2)
    pointers = {bias.grad.data_ptr() for bias in biases if bias.grad is not None}
    assert len(pointers) == 2
