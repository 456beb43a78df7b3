"""The composition faults of NVIDIA/Megatron-LM#7452, each planted in ours: what finds it, and how.

That issue lists where Megatron Core trains another model than it was given, without a word, because
two kinds of parallelism meet. Each row is one of them, by its number there, carried over to our
graph, runtime or checkpoint, with the layer of the proof that must refuse it. "types" needs no run;
"regions" and "step" are runs on all ranks. `docs/proof.md` has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ilm_compile
from tests.proof import composition as faults
from tests.proof.composition import AUXILIARY, Plant, two_heads
from tests.proof.small import INPUTS
from tests.proof.test_right_programs import WIDE, internlm2
from tests.proof.test_wrong_programs import Edit, Meddle
from tests.support.zoo import small_model

MASKED = {**WIDE, "attention_mask": WIDE["labels"]}


def hugging_face(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return partial(small_model, name, layers=1, **changes)


MIXTRAL = hugging_face(
    "MixtralForCausalLM", output_router_logits=True, router_aux_loss_coef=AUXILIARY
)


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A fault in a model's program or in what runs it, the layer that finds it, and its words."""

    plan: dict[str, Any]
    layer: str
    words: str
    model: Callable[[], nn.Module] = lambda: internlm2(1)
    inputs: dict[str, Any] = field(default_factory=lambda: INPUTS)
    edit: Edit = lambda program: None
    plant: Plant = lambda monkeypatch: None


BOTH = {"tp": 2, "cp": 2}
QWEN3 = hugging_face("Qwen3ForCausalLM")
BUGS = {
    "1 label smoothing over a part of the vocabulary": Bug(
        model=partial(two_heads, 0.1),
        plan={"tp": 2},
        plant=faults.smooth_over_own_shard,
        layer="regions",
        words="after pass tensor-parallel, the first value that differs is that of node cross_entr",
    ),
    "2 gathered logits in a loss of sharded ones": Bug(
        model=two_heads,
        plan={"tp": 2},
        edit=faults.gather_logits,
        layer="types",
        words="vocab_cross_entropy of (R, R) does not give I",
    ),
    "3 a further loss divided by each rank's own targets": Bug(
        model=two_heads,
        plan={"dp": 2},
        plant=faults.count_own_targets,
        layer="step",
        words="averaged per micro-batch instead of over all targets",
    ),
    "4 recomputed over another group": Bug(
        plan={**BOTH, "checkpoint": True},
        plant=faults.recompute_over_cp,
        layer="step",
        words="right with no recomputed blocks",
    ),
    "5 the mask of a mixture of experts cut over another group": Bug(
        model=MIXTRAL,
        inputs=MASKED,
        plan=BOTH,
        edit=faults.slice_mask_over_tp,
        layer="types",
        words="the collective is typed I -> S",
    ),
    "6 a projection cut over another group": Bug(
        plan=BOTH,
        edit=faults.cut_weight_over_cp,
        layer="types",
        words="aten.linear of (R, I) does not give S(2); that needs (R, S(0))",
    ),
    "7 embeddings scattered over another group": Bug(
        plan={**BOTH, "sequence_parallel": True},
        plant=faults.scatter_by_place_on_cp,
        layer="regions",
        words="value of embedding by",
    ),
    "8 attention sinks left out of the norm": Bug(
        model=hugging_face("GptOssForCausalLM"),
        inputs=WIDE,
        plan={"tp": 2},
        plant=faults.leave_out_of_norm("sinks", "tp"),
        layer="step",
        words="the gradient norm by",
    ),
    "8 experts left out of the norm": Bug(  # Megatron-LM#5916
        model=MIXTRAL,
        inputs=WIDE,
        plan={"ep": 2},
        plant=faults.leave_out_of_norm("experts", "ep"),
        layer="step",
        words="the gradient norm by",
    ),
    "9 the mean of each rank's own tokens": Bug(
        plan={"cp": 2},
        edit=faults.average_own_tokens,
        layer="types",
        words="on axis cp, aten.cross_entropy_loss of",
    ),
    "9 a gradient of each rank's own tokens": Bug(
        plan={"cp": 2},
        plant=faults.gradient_not_summed_over_tokens,
        layer="step",
        words="norm.weight",
    ),
    "10 an auxiliary loss times the number of ranks": Bug(
        model=MIXTRAL,
        inputs=WIDE,
        plan={"ep": 2},
        edit=faults.scale_auxiliary_loss,
        layer="regions",
        words="after pass meddle, the first value that differs is that of node mul",
    ),
    "10 counts of a router that are summed already": Bug(
        model=MIXTRAL,
        inputs=WIDE,
        plan={"ep": 2},
        edit=faults.sum_auxiliary_loss_twice,
        layer="types",
        words="on axis ep, the collective is typed P -> I, but the graph says I -> I",
    ),
    "11 the gradient of a norm inside sharded heads": Bug(
        model=QWEN3,
        inputs=WIDE,
        plan={"tp": 2},
        edit=faults.forget_norm_gradient,
        layer="types",
        words="aten.mul.Tensor of (I, S(2)) does not give S(2); that needs (R, S(2))",
    ),
    "11 the same, typed and not done": Bug(
        model=QWEN3,
        inputs=WIDE,
        plan={"tp": 2},
        plant=faults.norm_gradient_not_summed,
        layer="regions",
        words="_norm.weight by",
    ),
    "12 a checkpoint that numbers layers within a stage": Bug(
        model=partial(internlm2, 2),
        plan={"pp": 2},
        plant=faults.name_layers_by_stage,
        layer="step",
        words="checkpoint of model/layers.0.attention_norm.weight: expected slices that cover",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_fault_is_found_by_its_layer_and_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = BUGS[name]
    bug.plant(monkeypatch)
    report = ilm_compile.verify(
        bug.model(), example_inputs=bug.inputs, passes=[Meddle(edit=bug.edit)], **bug.plan
    )
    assert [check.name for check in report.checks if not check.ok] == [bug.layer], str(report)
    assert bug.words in report.failures[0]


def test_the_docs_have_every_row() -> None:
    page = (Path(__file__).parents[2] / "docs" / "proof.md").read_text()
    rows = [f"| {name.replace(' ', ' | ', 1)} | {bug.layer} |" for name, bug in BUGS.items()]
    assert [row for row in rows if row not in page] == []
