"""checkpoint="selective": the same training, less kept, and no product runs twice."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ilm_compile
from ilm_compile.cost import saved_bytes
from ilm_compile.errors import PlanError
from ilm_compile.passes import lower
from ilm_compile.program.remade import AGAIN
from tests.support.equality import (
    EXAMPLE,
    ROWS,
    Case,
    assert_prepared_equal,
    make_batch,
    make_model,
)
from tests.support.prepared import Prepared
from tests.support.stages import staged_outputs_and_grads

CASES = [
    ("internlm2", {"tp": 2, "sequence_parallel": True}),
    ("internlm2", {"pp": 2, "schedule": "zb_h1", "num_microbatches": 3}),
    ("internlm2", {"cp": 2, "cp_attention": "queries"}),
    ("experts", {"ep": 2}),
    ("gpt2", {"tp": 2, "pp": 1}),
    ("internlm2", {"pp": 2, "compile": "aot_eager"}),
]


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(**plan: Any) -> tuple[Counter[str], dict[str, Tensor]]:
    model = make_model("internlm2").float()
    lowered = lower(ilm_compile.partition(model, example_inputs=EXAMPLE, **plan))
    with CountCalls() as count:
        outputs, gradients = staged_outputs_and_grads(lowered, model, make_batch(ROWS))
    return count.calls, {**outputs, **gradients}


def test_products_and_attention_run_once_and_numbers_are_bitwise_the_same() -> None:
    plain, expected = counted()
    selective, found = counted(checkpoint="selective")
    dear = [name for name in plain if re.match("addmm|mm|bmm|.*attention", name)]
    assert len(dear) >= 2
    for name in dear:
        assert selective[name] == plain[name], name
    assert selective["silu.default"] == 2 * plain["silu.default"]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_keeps_less_without_running_what_is_dear() -> None:
    plain, selective = (
        ilm_compile.partition(
            make_model("internlm2").float(),
            example_inputs=EXAMPLE,
            dtype=torch.bfloat16,
            kernels="triton",
            checkpoint=checkpoint,
        )
        for checkpoint in (False, "selective")
    )
    block = next(i for i, region in enumerate(plain.regions) if region.is_block)
    kept, whole = (saved_bytes(program)[0, block] for program in (selective, plain))
    assert kept < 0.75 * whole
    again = {str(node.target) for node in selective.calls() if AGAIN in node.meta}
    assert {"ilm.glu.default", "ilm.rms_norm.default"} <= again
    assert not again & {"aten.linear.default", "ilm.attention.default"}
    assert "recomputed in part" in selective.dump()
    assert "made again" in selective.explain()
    assert "made again" not in plain.explain()


@pytest.mark.parametrize(("model", "plan"), CASES, ids=str)
def test_two_processes_equal_the_single_device_model(
    model: str, plan: dict[str, Any], prepared: Prepared
) -> None:
    assert_prepared_equal(prepared, 2, Case(model, {**plan, "checkpoint": "selective"}, 1), 1e-10)


def test_sharded_parameters_are_whole_when_a_block_runs_again(prepared: Prepared) -> None:
    assert_prepared_equal(
        prepared, 2, Case("internlm2", {"zero": 3, "checkpoint": "selective"}, 2), 1e-10
    )


def test_refuses_another_word() -> None:
    with pytest.raises(PlanError, match='"selective" or "auto", got \'some\''):
        ilm_compile.make_plan(checkpoint="some")
