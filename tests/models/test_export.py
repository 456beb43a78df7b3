"""torch.export captures each model whole, on meta, in training mode, packed or not."""

from collections import Counter

import pytest
import torch

from ilm_compile.models import internlm2_tiny, internlm_tiny

MODELS = {
    "internlm": internlm_tiny,
    "internlm2": internlm2_tiny,
    "internlm2 every option": lambda: internlm2_tiny(
        adapt_hf=False, norm_head=True, no_bias=False, embed_grad_scale=0.1
    ),
}


def export(model, *, packed):
    spec = model.example_inputs(2, 16, packed=packed)
    inputs = {name: torch.empty(*shape, dtype=dtype) for name, (shape, dtype) in spec.items()}
    return torch.export.export(model, (), inputs, strict=False)


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_composite_ops_stay_whole(make, packed):
    with torch.device("meta"):
        model = make().train()
        program = export(model, packed=packed)
    calls = Counter(str(node.target) for node in program.graph.nodes)
    blocks = model.config.num_layers
    assert calls["ilm.attention.default"] == blocks
    assert calls["aten.rms_norm.default"] == 2 * blocks + 1
    assert calls["aten.linear.default"] == 5 * blocks + 1
    assert calls["aten.cross_entropy_loss.default"] == 1
    assert calls["aten.cos.default"] == calls["aten.sin.default"] == 1
    (loss,) = next(iter(reversed(program.graph.nodes))).args[0]
    assert loss.meta["val"].shape == ()


def test_the_exported_program_computes_the_same_loss():
    model = internlm2_tiny()
    program = export(model, packed=True)
    inputs = {
        "input_ids": torch.randint(512, (2, 16)),
        "labels": torch.randint(512, (2, 16)),
        "cu_seqlens": torch.tensor([[0, 4, *[16] * 7]] * 2, dtype=torch.int32),
    }
    assert torch.equal(program.module()(**inputs), model(**inputs))
