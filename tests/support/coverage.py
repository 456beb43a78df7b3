"""What is said of an architecture: is it captured, equal when sharded, and how much is repeated."""

from __future__ import annotations

import os
import pickle
import re
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import nn

from ilm_compile import partitioning as front_door
from ilm_compile.cost import forward_flops
from ilm_compile.errors import IlmCompileError, TraceError
from ilm_compile.partitioning import make_schedule, partition
from ilm_compile.passes import lower
from ilm_compile.program.program import Input, Program
from ilm_compile.proof.compare import compare
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.reference import single_device_step
from tests.support.batches import random_batch
from tests.support.compiled import traced_once
from tests.support.promote import promoted_float32
from tests.support.zoo import SEQ, VOCAB, small_model

BOUND = 1e-10
ROWS = 2
EXAMPLE = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}
TIME_LIMIT = 240.0  # seconds of one architecture


@dataclass(frozen=True)
class Sharded:
    """A model over `tp` emulated ranks: largest relative errors, and shares that each repeats."""

    tp: int
    loss_error: float
    gradient_error: float
    weights: float  # of the bytes of the parameters in the graph
    flops: float  # of the FLOPs of matrix products


@dataclass
class Coverage:
    """What became of an architecture; `reason` says why it is not equal, if it is not."""

    architecture: str
    outcome: Literal["equal", "wrong", "refused", "unusable"] = "unusable"
    reason: str = ""
    nodes: int = 0
    sharded: list[Sharded] = field(default_factory=list)
    seconds: float = 0.0


def cover(architecture: str, sizes: Sequence[int]) -> Coverage:
    """Return whether a small model of `architecture` is equal over each of the tp `sizes`.

    unusable: transformers itself cannot make it or run it on text alone; refused: it raised a
    `TraceError`; wrong: anything else, an error too.
    """
    result = Coverage(architecture)
    start = time.perf_counter()
    try:
        model = small_model(architecture)
        _cover(result, model, sizes)
    except TraceError as error:
        result.outcome, result.reason = "refused", _one_line(str(error))
    except Exception as error:
        result.reason = _one_line(f"{type(error).__name__}: {error}")
    result.seconds = time.perf_counter() - start
    return result


def _one_line(reason: str) -> str:
    """Return a reason without line breaks, and files by their place in their package."""
    return re.sub(r"/\S*/site-packages/", "", " ".join(reason.split()))


def _cover(result: Coverage, model: nn.Module, sizes: Sequence[int]) -> None:
    inputs = {name: Input(*spec) for name, spec in EXAMPLE.items()}
    batch = random_batch(inputs, 1, VOCAB)
    with promoted_float32(), traced_once():
        expected = single_device_step(small_model(result.architecture), batch)
        result.outcome = "wrong"  # unless proven otherwise
        traced = front_door.trace(model, example_inputs=EXAMPLE, loss_fn=None)
        result.nodes = len(list(traced.calls()))
        for tp in sizes:
            program = partition(model, example_inputs=EXAMPLE, tp=tp)
            shares = repeated_weights(program), repeated_flops(traced, program)
            step = emulate(lower(program), make_schedule(program.plan), model, [batch])[0]
            errors = compare(step, expected)
            result.sharded.append(Sharded(tp, errors.loss, errors.max_gradient, *shares))
            if not errors.is_equal(BOUND):
                raise IlmCompileError(f"tp={tp}: {errors.describe(BOUND)}")
    result.outcome = "equal"


def repeated_weights(program: Program) -> float:
    """Return the share of the weights' bytes, of all in the graph, that every tp rank holds."""
    used = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    weights = [v for name, v in program.parameters().items() if name in used]
    size = {v.name: prod(v.shape) * v.dtype.itemsize for v in weights}
    repeated = sum(size[v.name] for v in weights if not v.layout.is_shard)
    return repeated / sum(size.values())


def repeated_flops(traced: Program, program: Program) -> float:
    """Return the share s of the forward FLOPs that every tp rank repeats.

    A rank's are (s + (1 - s) / tp) of the whole model's.
    """
    tp = program.plan.tp
    whole, local = (sum(map(forward_flops, p.calls())) for p in (traced, program))
    return (local / whole - 1 / tp) / (1 - 1 / tp) if tp > 1 else 0.0


def cover_all(
    architectures: Sequence[str],
    sizes: Sequence[int],
    *,
    cover: Callable[[str, Sequence[int]], Coverage] = cover,
    limit_s: float = TIME_LIMIT,
) -> Iterator[Coverage]:
    """Yield the coverage of each architecture, every one in a process and a time of its own."""
    for architecture in architectures:
        reader, writer = os.pipe()
        child = os.fork()  # what is imported stays imported, and a crash ends one architecture
        if child == 0:
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(cover(architecture, sizes), stream)
            os._exit(0)
        os.close(writer)
        yield _answer(architecture, child, reader, limit_s)


def _answer(architecture: str, child: int, reader: int, limit_s: float) -> Coverage:
    with os.fdopen(reader, "rb") as stream:
        ready = select.select([stream], [], [], limit_s)[0]
        data = stream.read() if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if data:
        found: Coverage = pickle.loads(data)
        return found
    reason = "its process died" if ready else f"no answer within {limit_s:g} s"
    return Coverage(architecture, "wrong", reason)
