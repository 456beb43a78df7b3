"""Every placement rule is proven by executing it; a rule without a proof fails the suite."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch

from ilm_compile.ops.spec import specs
from ilm_compile.ops.strategy import localize
from ilm_compile.program.linear_loss import linear_cross_entropy, output_logits
from ilm_compile.program.placement import I, P, R, S
from ilm_compile.sharding import Strategy
from tests.sharding.proof import all_strategies, make_call, prove
from tests.sharding.samples import SAMPLES, aten, call, ilm, x

# These stand for another op and are proven where that op becomes them.
SHARDED_FORMS = {t for t, spec in specs() if spec.stands_for} - {ilm.query_boundaries.default}
# So are these, and one takes one of the results that are proven with the op that makes them. The
# boundaries of queries are made by a pass: packed rows over cp, in tests/test_context_parallel.py.
ELSEWHERE = {operator.getitem, linear_cross_entropy, output_logits, "aten::_grouped_mm"}
ELSEWHERE |= {ilm.query_boundaries.default}
CASES = [
    pytest.param(target, make, id=f"{getattr(target, '__name__', target)}-{i}")
    for target, makes in SAMPLES.items()
    for i, make in enumerate(makes)
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("target", "make"), CASES)
def test_every_strategy_equals_the_unsharded_op(target, make, size):
    torch.manual_seed(0)
    args, kwargs = make()
    target = resolve(target)
    op_call, tensors = make_call(target, args, kwargs, size)
    # Gradients of a cast to float32 pass through float32.
    bound = 1e-5 if target is aten.to.dtype else 1e-12
    for strategy in all_strategies(op_call):
        prove(op_call, tensors, strategy, bound=bound)


def resolve(target):
    """Return the op that a name of another library's op stands for."""
    if not isinstance(target, str):
        return target
    library, name = target.split("::")
    if library == "transformers":
        pytest.importorskip("transformers.integrations.moe")
    return getattr(getattr(torch.ops, library), name).default


def test_every_rule_has_a_proof():
    # Examples and tests add rules of their own when another test imports them.
    ours = {t for t, spec in specs() if spec.rule and not str(t).startswith("example")}
    assert ours - SHARDED_FORMS - ELSEWHERE == set(SAMPLES)


def test_every_sharded_form_is_proven_with_the_op_that_becomes_it():
    reached = set()
    for target, makes in SAMPLES.items():
        for make in makes if not isinstance(target, str) else ():
            op_call, _ = make_call(target, *make(), 2)
            reached |= {localize(op_call, found, "tp")[0] for found in all_strategies(op_call)}
    assert SHARDED_FORMS <= reached


# What Megatron-LM's plan is made of: op, which of its samples, and the strategy to be offered.
MEGATRON = [
    (aten.linear.default, 0, Strategy((R, S(0)), S(2))),
    (aten.linear.default, 0, Strategy((S(2), S(1)), P)),
    (aten.linear.default, 1, Strategy((R, S(0), S(0)), S(2))),
    (aten.linear.default, 1, Strategy((S(2), S(1), P), P)),
    (aten.embedding.default, 0, Strategy((S(0), R), P)),
    (aten.embedding.default, 0, Strategy((S(1), R), S(2))),
    (aten.rms_norm.default, 0, Strategy((S(1), R), S(1))),
    (aten.mean.dim, 0, Strategy((S(2),), P)),  # of a norm over all heads, as OLMo-2 has it
    (aten.cross_entropy_loss.default, 0, Strategy((S(1), R), I)),
    *(
        (aten.logsumexp.default, 0, Strategy((S(2),), I)),
        (aten.amax.default, 0, Strategy((S(2),), I)),
        (aten.log_softmax.int, 0, Strategy((S(1),), S(1))),
        (aten.softmax.int, 0, Strategy((S(1),), S(1))),
        (aten.gather.default, 0, Strategy((S(1), R), P)),
        (aten.nll_loss_nd.default, 0, Strategy((S(1), R), P)),
        (aten.kl_div.default, 0, Strategy((S(1), S(1)), P)),
        (aten.cross_entropy_loss.default, 3, Strategy((S(1), R), I)),
        (aten.cross_entropy_loss.default, 5, Strategy((S(1), R), I)),
    ),
    (ilm.attention.default, 0, Strategy((S(2),) * 3, S(2))),
    (ilm.rms_norm.default, 0, Strategy((S(1), R), S(1))),
    (ilm.add_rms_norm.default, 0, Strategy((S(1), S(1), R), S(1))),
    (ilm.rotary.default, 0, Strategy((S(2), S(2), R, R), S(2))),
    (ilm.rotary.default, 0, Strategy((S(1), S(1), S(1), S(1)), S(1))),
    (ilm.qkv_rotary.default, 0, Strategy((S(2), R, R), S(2))),
    (ilm.glu.default, 0, Strategy((S(2), S(2)), S(2))),
    (aten.reshape.default, 0, Strategy((S(2, (8, 8, 8)),), S(3))),
    (aten.slice.Tensor, 0, Strategy((S(1, (4, 4)),), S(1))),
]


@pytest.mark.parametrize(
    ("target", "sample", "strategy"), MEGATRON, ids=[f"{op}: {out}" for op, _, (_, out) in MEGATRON]
)
def test_the_strategies_megatron_needs_are_offered(target, sample, strategy):
    args, kwargs = SAMPLES[target][sample]()
    op_call, _ = make_call(target, args, kwargs, size=2)
    assert strategy in all_strategies(op_call)


def test_class_weights_keep_the_cross_entropy_whole():
    args, kwargs = call(x(6, 8), torch.zeros(6).long(), x(8), 1)
    op_call, _ = make_call(aten.cross_entropy_loss.default, args, kwargs, size=2)
    assert all(not p.is_shard for s in all_strategies(op_call) for p in s.inputs)


def test_a_wrong_strategy_is_not_proven():
    op_call, tensors = make_call(aten.linear.default, *call(x(2, 4, 8), x(12, 8), x(12)), size=2)
    with pytest.raises(AssertionError):
        prove(op_call, tensors, Strategy((S(2), S(1), R), P))  # the bias would be counted twice


def test_every_result_of_an_op_must_divide():
    op_call, _ = make_call(*_add_rms_norm(), size=2)
    whole = Strategy((S(1), S(1), R), S(1))
    assert whole in all_strategies(op_call)
    assert whole not in all_strategies(replace(op_call, further=((2, 3, 8),)))


def _add_rms_norm():
    target = ilm.add_rms_norm.default
    return target, *SAMPLES[target][0]()


def test_strategies_come_in_an_order_that_hashing_does_not_change():
    """Each rank searches for itself; of equally good plans all must find the same."""
    op_call, _ = make_call(aten.linear.default, *call(x(2, 4, 8), x(12, 8)), size=2)
    found = all_strategies(op_call)[2:]
    assert found == sorted(found, key=repr)
