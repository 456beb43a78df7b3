"""What changes a gradient outside the forward graph: it trains as in PyTorch, or is refused."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations
from torch.utils import checkpoint as ck

from ilm_compile.errors import TraceError
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.trace import trace
from tests.program.training import LM, WIDTH, assert_trains_equal, tokens

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def checkpointed(**options):
    return lambda m, h: h + ck.checkpoint(m.layer, h, **options)


def sequential(m, h):
    layers = nn.Sequential(m.layer, nn.Tanh(), m.layer)
    return ck.checkpoint_sequential(layers, 2, h, use_reentrant=True)


def wrapped(impl):
    model = LM()
    model.layer = checkpoint_wrapper(model.layer, checkpoint_impl=impl)
    return model


def nested(m, h):
    def outer(x):
        return ck.checkpoint(m.layer, x, use_reentrant=True).tanh()

    return ck.checkpoint(outer, h, use_reentrant=True)


def no_grad_island(m, h):
    with torch.no_grad():
        scale = m.layer(h).softmax(-1)
    return m.layer(h) * scale


def in_place(m, h):
    y = m.layer(h)
    y[:, 1:] += h[:, :-1]
    y[:, 0] = 0.5
    y.mul_(2)
    return y.tanh()


def autocast_off(m, h):
    with torch.autocast(device_type=h.device.type, enabled=False):
        return m.layer(h).tanh()


def with_hooks():
    model = LM()
    model.layer.register_forward_hook(lambda module, args, out: out * 2)
    model.layer.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    return model


def normed(wrap):
    model = LM(lambda m, h: getattr(m.layer, "norm", nn.Identity())(m.layer(h)))
    wrap(model.layer)
    return model


def embedding(**options):
    model = LM()
    model.embed = nn.Embedding(*model.embed.weight.shape, dtype=torch.float64, **options)
    return model


def frozen_below_a_checkpoint():
    model = LM(checkpointed(use_reentrant=True))
    model.embed.requires_grad_(False)
    return model


EQUAL = {
    "checkpoint": lambda: LM(checkpointed()),
    "checkpoint, reentrant": lambda: LM(checkpointed(use_reentrant=True)),
    "checkpoint, not reentrant": lambda: LM(checkpointed(use_reentrant=False)),
    "checkpoint in a checkpoint": lambda: LM(nested),
    "checkpoint_sequential": lambda: LM(sequential),
    "reentrant wrapper": lambda: wrapped(CheckpointImpl.REENTRANT),
    "wrapper": lambda: wrapped(CheckpointImpl.NO_REENTRANT),
    "reentrant without a gradient below": frozen_below_a_checkpoint,
    "forward hooks": with_hooks,
    "weight_norm": lambda: normed(parametrizations.weight_norm),
    "weight_norm, the old one": lambda: normed(torch.nn.utils.weight_norm),
    "no_grad island": lambda: LM(no_grad_island),
    "detach": lambda: LM(lambda m, h: m.layer(h) * m.layer(h).detach()),
    "in place": lambda: LM(in_place),
    "autocast off": lambda: LM(autocast_off),
    "sparse embedding": lambda: embedding(sparse=True),
    "padding_idx": lambda: embedding(padding_idx=3),
    "a factor on the gradient alone": lambda: LM(lambda m, h: h * 0.1 + (h * 0.9).detach()),
}


@pytest.mark.parametrize("make", EQUAL.values(), ids=EQUAL)
def test_trains_as_in_pytorch(make):
    assert_trains_equal(make())


def test_gradient_checkpointing_of_hugging_face_trains_as_in_pytorch():
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.promote import promoted_float32

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes)
    model = LlamaForCausalLM(config).double().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with promoted_float32():
        # Recomputation in PyTorch's backward leaves the promotion; the gradients are the same.
        assert_trains_equal(model, before_plain=model.gradient_checkpointing_disable)


class Frozen(LM):
    """Dropout in a part that is in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(self.layer, nn.Dropout(0.5))
        self.layer.eval()


def test_a_part_in_evaluation_mode_keeps_its_dropout_off():
    model = Frozen()
    assert_trains_equal(model)
    assert [m.training for m in (model, model.layer, model.layer[1])] == [True, False, False]


def test_a_model_in_evaluation_mode_is_trained():
    program = trace(Frozen().eval(), example_inputs=tokens())
    assert program.graph.find_nodes(op="call_function", target=seeded_dropout)
    assert any("was in evaluation mode" in decision for decision in program.decisions)


def test_dropout_in_place_is_drawn_alike():
    model = LM(lambda m, h: F.dropout(m.layer(h), 0.5, training=True, inplace=True))
    program = trace(model, example_inputs=tokens())
    assert program.graph.find_nodes(op="call_function", target=seeded_dropout)


def halve(grad):
    return grad * 0.5


def centred(grad):
    return grad - grad.mean()


def with_parameter_hook(register):
    model = LM()
    register(model.layer.weight)
    return model


def with_module_hook(register):
    model = LM()
    register(model.layer)
    return model


def hook_in_forward(m, h):
    h.register_hook(halve)
    return m.layer(h)


def retained(m, h):
    h.retain_grad()
    return m.layer(h)


def by_grad_fn(m, h):
    h.grad_fn.register_hook(lambda *grads: None)
    return m.layer(h)


def several(m, h):
    torch.autograd.graph.register_multi_grad_hook([h], lambda grads: None)
    return m.layer(h)


def packed(m, h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.double()):
        return m.layer(h)


def penalty(m, h):
    (grad,) = torch.autograd.grad(m.layer(h).sum(), h, create_graph=True)
    return m.layer(h) * grad.norm()


def behind_autograd(m, h):
    y = m.layer(h)
    y.detach().mul_(2)
    return y


def new_data(m, h):
    m.layer.weight.data = m.layer.weight.data * 0.5
    return m.layer(h)


def clamped_weight(m, h):
    with torch.no_grad():
        m.layer.weight.clamp_(-1, 1)
    return m.layer(h)


def autocast_on(m, h):
    with torch.autocast("cpu", torch.bfloat16):
        return m.layer(h)


def bag():
    model = LM(lambda m, h: m.layer(m.bag(torch.zeros(4, 2, dtype=torch.int64)))[:, None] + h)
    model.bag = nn.EmbeddingBag(4, WIDTH, dtype=torch.float64)
    return model


REFUSED = {
    "parameter hook": (
        lambda: with_parameter_hook(lambda p: p.register_hook(centred)),
        r"layer.weight has a hook by register_hook, centred \(",
    ),
    "partial parameter hook": (
        lambda: with_parameter_hook(lambda p: p.register_hook(functools.partial(centred))),
        r"layer.weight has a hook by register_hook, centred \(",
    ),
    "post-accumulate hook": (
        lambda: with_parameter_hook(lambda p: p.register_post_accumulate_grad_hook(halve)),
        r"layer.weight has a hook by register_post_accumulate_grad_hook, halve \(",
    ),
    "full backward hook": (
        lambda: with_module_hook(lambda m: m.register_full_backward_hook(lambda *a: None)),
        r"layer has a backward hook, .*lambda> \(",
    ),
    "legacy backward hook": (
        lambda: with_module_hook(lambda m: m.register_backward_hook(lambda *a: None)),
        r"layer has a backward hook, .*lambda> \(",
    ),
    "full backward pre-hook": (
        lambda: with_module_hook(lambda m: m.register_full_backward_pre_hook(lambda *a: None)),
        r"layer has a full backward pre-hook, .*lambda> \(",
    ),
    "Tensor.register_hook": (lambda: LM(hook_in_forward), r"Tensor.register_hook\) \(at "),
    "retain_grad": (lambda: LM(retained), r"keeps the gradient .*\(at "),
    "a hook on grad_fn": (lambda: LM(by_grad_fn), r"reads grad_fn.* \(at "),
    "a hook on several": (lambda: LM(several), r"gradient hook|reads grad_fn.* \(at "),
    "saved tensors": (lambda: LM(packed), r"saves activations through a hook, .*\(at "),
    "gradients in the forward": (lambda: LM(penalty), r"autograd.grad\) \(at "),
    "a write behind autograd": (lambda: LM(behind_autograd), r"in place \(at .*mul_\(2\)"),
    "new .data": (lambda: LM(new_data), r"replaces the .data of a tensor \(at "),
    "a clamped weight": (lambda: LM(clamped_weight), r"parameters \['layer.weight'\]|clamp_"),
    "autocast": (lambda: LM(autocast_on), r"turns autocast on .*dtype=torch.bfloat16"),
    "max_norm": (lambda: embedding(max_norm=1.0), r"max_norm.*training.py:\d+"),
    "scale_grad_by_freq": (lambda: embedding(scale_grad_by_freq=True), r"by_freq.*training.py:\d+"),
    "EmbeddingBag": (bag, r"embedding_bag.*training.py:\d+"),
    "spectral_norm": (
        lambda: normed(parametrizations.spectral_norm),
        r"in place under .*layer.parametrizations",
    ),
    "batch norm": (
        lambda: normed(lambda layer: layer.register_module("norm", nn.BatchNorm1d(6))),
        r"writes to the buffers \['layer.norm",
    ),
    "gumbel": (lambda: LM(lambda m, h: F.gumbel_softmax(h)), r"draws random numbers with"),
    "alpha dropout": (lambda: LM(lambda m, h: F.alpha_dropout(h, 0.5, True)), r"draws random"),
    "dropout of features": (lambda: LM(lambda m, h: F.dropout1d(h, 0.5, True)), r"draws random"),
    "rrelu": (lambda: LM(lambda m, h: F.rrelu(h, training=True)), r"draws random numbers with"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_line(make, reason):
    with pytest.raises(TraceError, match=reason):
        trace(make(), example_inputs=tokens())


@pytest.mark.parametrize("name", ["backward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_global_backward_hooks_are_refused(name):
    handle = getattr(global_hooks, f"register_module_{name}")(lambda *a: None)
    try:
        with pytest.raises(TraceError, match=r"all modules has a global .*lambda> \(.*py:\d+\)"):
            trace(LM(), example_inputs=tokens())
    finally:
        handle.remove()
        global_hooks._global_is_full_backward_hook = None


def test_hooks_are_torchs_own_again_after_tracing():
    trace(LM(), example_inputs=tokens())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        (torch.ones(2, requires_grad=True) * 2).sum().backward()
    x = torch.ones(2, requires_grad=True)
    ck.checkpoint(torch.square, x, use_reentrant=True).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_torchs_own_warning_of_a_checkpoint_without_gradients_is_kept():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace(frozen_below_a_checkpoint(), example_inputs=tokens())
    assert any(re.search("None of the inputs have requires_grad", str(w.message)) for w in caught)
