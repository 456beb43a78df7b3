"""What explain says, and the bytes it counts, by hand for a Megatron block."""

import re
from dataclasses import replace

import pytest
import torch

from ilm_compile import models
from ilm_compile.passes import PipelineSplit, TensorParallel, run_passes
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.program.samples import FIELDS

ROWS, SEQ, HIDDEN, TP = 2, 8, 32, 2
FULL = ROWS * SEQ * HIDDEN * 4  # bytes of one float32 activation
INPUTS = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}


def megatron(*, sequence_parallel: bool, **fields: int) -> Program:
    model = models.internlm2_tiny(**{**FIELDS, **fields})
    program = replace(trace(model, example_inputs=INPUTS), plan=Plan(tp=TP, num_microbatches=3))
    run_passes(program, [TensorParallel(size=TP, sequence_parallel=sequence_parallel)])
    return program


def rows_under(text: str, title: str) -> list[list[str]]:
    """The table under a heading: one list of cells a row."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
    rows: list[list[str]] = []
    for line in lines[start:]:
        if not line.startswith("  "):
            break
        rows.append(re.split(r"\s{2,}", line.strip()))
    return rows


def test_plan_line() -> None:
    text = megatron(sequence_parallel=False).explain()
    assert text.splitlines()[0] == (
        "plan: tp=2 pp=1 num_chunks=1 num_microbatches=3 schedule=1f1b; "
        "one micro-batch is input_ids [2, 8], labels [2, 8]"
    )


def test_decisions_and_warnings_are_listed() -> None:
    program = megatron(sequence_parallel=False)
    program.decisions.append("mine: done, because I said so")
    program.warnings.append("mine: beware")
    lines = program.explain().splitlines()
    assert "- mine: done, because I said so" in lines
    assert "! mine: beware" in lines


def test_blocks_alike_are_one_table() -> None:
    text = megatron(sequence_parallel=False, num_layers=3).explain()
    assert "layers.0 ... layers.2 (3 alike)" in text.splitlines()
    assert "layers.1" not in text


def test_blocks_that_differ_have_a_table_each() -> None:
    program = replace(
        trace(models.internlm2_tiny(**FIELDS), example_inputs=INPUTS), plan=Plan(tp=TP)
    )
    run_passes(program, [TensorParallel(size=TP, sequence_parallel=False)])
    program.variables["layers.1.attention.wo.weight"].layout = program.variables[
        "norm.weight"
    ].layout
    titles = [line for line in program.explain().splitlines() if line.startswith("layers.")]
    assert titles == ["layers.0", "layers.1"]


def test_parameters_of_a_block() -> None:
    rows = rows_under(megatron(sequence_parallel=False).explain(), "layers.0")
    assert ["attention.wqkv.weight", "[64, 32]", "S(0)"] in rows
    assert ["attention.wo.weight", "[32, 32]", "S(1)"] in rows
    assert ["attention_norm.weight", "[32]", "I"] in rows


def sent(kind: str, num_bytes: float) -> str:
    return f"{kind} {num_bytes / 1024:.4g} KiB"


def collectives(program: Program) -> list[list[str]]:
    rows = rows_under(program.explain(), "layers.0")
    heading = next(i for i, row in enumerate(rows) if row[0] == "collective")
    return [row[:4] for row in rows[heading + 1 :]]


def test_megatron_block_by_hand() -> None:
    # Megatron-LM, arXiv:1909.08053 section 3: two all-reduces forward, two backward; a ring
    # all-reduce over n ranks sends 2 * (n - 1) / n of the tensor.
    reduce = sent("all_reduce", 2 * (TP - 1) / TP * FULL)
    assert collectives(megatron(sequence_parallel=False)) == [
        ["layers.0.attention.wqkv", "I -> R", "-", reduce],
        ["layers.0.attention.wo", "P -> I", reduce, "-"],
        ["layers.0.feed_forward.w1", "I -> R", "-", reduce],
        ["layers.0.feed_forward.w2", "P -> I", reduce, "-"],
    ]


def test_megatron_block_with_sequence_parallel_by_hand() -> None:
    # arXiv:2205.05198 section 4.2.2: each all-reduce becomes a reduce-scatter and an all-gather of
    # half its bytes; the weights of the norms, which see part of the tokens, are all-reduced.
    half = (TP - 1) / TP * FULL
    gather, scatter = sent("all_gather", half), sent("reduce_scatter", half)
    norm = f"all_reduce {2 * (TP - 1) / TP * HIDDEN * 4:.4g} B"
    assert collectives(megatron(sequence_parallel=True)) == [
        ["layers.0.attention_norm", "I -> R", "-", norm],
        ["layers.0.attention.wqkv", "S(1) -> R", gather, scatter],
        ["layers.0.attention.wo", "P -> S(1)", scatter, gather],
        ["layers.0.ffn_norm", "I -> R", "-", norm],
        ["layers.0.feed_forward.w1", "S(1) -> R", gather, scatter],
        ["layers.0.feed_forward.w2", "P -> S(1)", scatter, gather],
    ]


def test_collective_says_why() -> None:
    rows = rows_under(megatron(sequence_parallel=False).explain(), "layers.0")
    (wo,) = [row for row in rows if row[:2] == ["layers.0.attention.wo", "P -> I"]]
    assert re.fullmatch(r"linear_1 is P, \w+ needs I", wo[-1])


def test_loss_by_hand() -> None:
    # Two reductions: each token's maximum, then its sum of exponentials and its target's logit.
    rows = rows_under(megatron(sequence_parallel=False).explain(), "epilogue")
    token = 2 * (TP - 1) / TP * ROWS * SEQ * 4
    expected = f"all_reduce {token:.4g} B + all_reduce {2 * token:.4g} B"
    assert [row[2] for row in rows if row[1] == "inside the loss"] == [expected]


def test_one_rank_sends_nothing() -> None:
    program = trace(models.internlm2_tiny(**FIELDS), example_inputs=INPUTS)
    assert "all_reduce" not in program.explain()


def test_split_program_is_explained_too() -> None:
    program = megatron(sequence_parallel=False)
    run_passes(program, [PipelineSplit(num_stages=2)])
    assert "- pipeline-split: stage 0 runs prologue to" in program.explain()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_lines_have_no_blanks_at_their_end(sequence_parallel: bool) -> None:
    lines = megatron(sequence_parallel=sequence_parallel).explain().splitlines()
    assert all(line == line.rstrip() for line in lines)
