"""Source mutants of forward and backward: executor, stages, messages, inputs, gradients.

Each is one replacement of text that occurs once in its file.
"""

from __future__ import annotations

from dataclasses import dataclass

RUNTIME = "ilm_compile/runtime"
TESTS = "tests/runtime"
EMULATED = f"{TESTS}/test_emulated_training.py"
INPUTS = f"{TESTS}/test_step_inputs.py"
EXECUTOR = f"{TESTS}/test_executor.py"
NAMED = f"{TESTS}/test_named_parameters.py"
STATE = f"{TESTS}/test_state.py"
TRAINER = f"{TESTS}/test_trainer.py"
BAD_STEPS = f"{TESTS}/test_trainer_bad_steps.py"
OPTIMIZER = f"{TESTS}/test_optimizer.py"
SCALING = f"{TESTS}/test_optimizer_scaling.py"
BATCH = f"{TESTS}/test_batch.py"
LOCAL = f"{TESTS}/test_local_batches.py"
SHARDED = f"{TESTS}/test_data_parallel.py"
UNUSUAL = f"{TESTS}/test_unusual_parameters.py"
PARALLEL = f"{TESTS}/test_parallel.py"


@dataclass(frozen=True, slots=True)
class SourceMutant:
    """`old` becomes `new` in `file`. killers: test files, the likeliest first."""

    file: str
    what: str
    old: str
    new: str
    killers: tuple[str, ...]


def mutants_of(
    file: str, killers: tuple[str, ...], *rows: tuple[str, str, str] | tuple[str, str, str, str]
) -> list[SourceMutant]:
    """Those of one file. rows: what, old, new, and if need be a killer to ask first."""
    return [
        SourceMutant(f"{RUNTIME}/{file}", what, old, new, (*first, *killers))
        for what, old, new, *first in rows
    ]


EXECUTOR_MUTANTS = mutants_of(
    "executor.py",
    (EMULATED, EXECUTOR),
    (
        "gradients are reduced in the first backward",
        "{a.stage: a for a in row if a.kind in (Kind.B, Kind.W)}",
        "{a.stage: a for a in reversed(row) if a.kind in (Kind.B, Kind.W)}",
    ),
    (
        "gradients are never reduced",
        "if sync is None or action != last.get(",
        "if sync is None or row != last.get(",
    ),
    ("gradients are reduced in every backward", "        if training:\n", "        if False:\n"),
    ("a received tensor is used before it came", "if schedule.receives(action):", "if False:"),
    (
        "what a stage makes goes to the wrong side",
        "to = {Kind.F: +1, Kind.B: -1}",
        "to = {Kind.F: -1, Kind.B: +1}",
    ),
    (
        "no hand-over on one rank",
        "if neighbour is not None and not schedule",
        "if False and not schedule",
    ),
    (
        "gradients are handed over as the sender's values",
        "target.output_grads.tensors[m] = source.input_grads.take(m)",
        "target.output_grads.tensors[m] = source.sent.take(m)",
    ),
    (
        "the first loss is left out",
        "for loss in runner.losses if",
        "for loss in runner.losses[1:] if",
    ),
    (
        "a gradient is sent of what needs none",
        "with_grad = tuple(b for b in stage.received if b.requires_grad)",
        "with_grad = stage.received",
    ),
    (
        "a gradient is awaited of what needs none",
        "grads_back = tuple(b for b in stage.sent if b.requires_grad)",
        "grads_back = stage.sent",
    ),
    (
        "full weights are kept after an evaluation",
        'steps += [(f"release {stage}", sync.release)',
        'steps += [(f"release {stage}", sync.defer)',
        STATE,
    ),
)
RUNNER_MUTANTS = mutants_of(
    "stage_runner.py",
    (EMULATED, EXECUTOR),
    (
        "every backward starts from one",
        "torch.full_like(loss, self._loss_gradient)",
        "torch.ones_like(loss)",
    ),
    (
        "the first micro-batch is run every time",
        "tuple(column[m] for column",
        "tuple(column[0] for column",
    ),
    (
        "inputs in another order",
        "for name in self.stage.batch_inputs]",
        "for name in self.stage.batch_inputs[::-1]]",
    ),
    ("received values need no gradient", "[received[i].requires_grad_() for", "[received[i] for"),
    (
        "losses overwrite each other",
        "self.losses[microbatch] = outputs",
        "self.losses[0] = outputs",
    ),
    (
        "the loss among the other outputs",
        "for output in outputs[1:])",
        "for output in outputs[:-1])",
    ),
    (
        "an unused value has a gradient of ones",
        "torch.zeros_like(leaf) if leaf.grad is None",
        "torch.ones_like(leaf) if leaf.grad is None",
        EXECUTOR,
    ),
    (
        "a value without gradient is waited for",
        "enumerate(stage.sent) if b.requires_grad]",
        "enumerate(stage.sent)]",
    ),
)
MESSAGE_MUTANTS = mutants_of(
    "p2p.py",
    (EXECUTOR, PARALLEL),
    (
        "a receive is not awaited",
        "        for work in self.works[microbatch]:\n",
        "        for work in ():\n",
        EMULATED,
    ),
    (
        "bytes of the last message only",
        "self.bytes_sent += num_bytes",
        "self.bytes_sent = num_bytes",
    ),
    (
        "all tensors of a message are the first",
        "                        tensor,\n",
        "                        tensors[0],\n",
    ),
    ("messages come from the wrong rank", "group_peer=message.peer", "group_peer=0"),
)
INPUT_MUTANTS = [
    *mutants_of(
        "step_inputs.py",
        (INPUTS, EMULATED),
        (
            "targets of the whole batch, not per micro-batch",
            " ** count.weight",
            " ** 0",
        ),
        ("losses are added up", ".double().sum() / self.layout.num_slices", ".double().sum()"),
        ("gradients are added up", "return scale / self.layout.num_slices", "return scale"),
        (
            "counts in float32",
            "self.dtype if total.is_floating_point()",
            "torch.float32 if total.is_floating_point()",
        ),
        (
            "the same dropout in every step",
            "dropout_seeds(self.seed, step)",
            "dropout_seeds(self.seed, 0)",
        ),
        (
            "the same dropout for every seed",
            "dropout_seeds(self.seed, step)",
            "dropout_seeds(0, step)",
        ),
    ),
    *mutants_of(
        "batch.py",
        (INPUTS, BATCH, EMULATED),
        ("every dp rank takes the first rows", "self.dp.rank * rows, rows)", "0 * rows, rows)"),
        ("dp ranks drop the same elements", "first = self.dp.rank * self", "first = 0 * self"),
        ("one dropout for all micro-batches", "hash((seed, step, place))", "hash((seed, step))"),
        (
            "micro-batches of one dp rank alone",
            "self.num_microbatches * self.dp.size",
            "self.num_microbatches",
        ),
        (
            "targets of the first micro-batch alone",
            "for m in range(slices)]",
            "for m in range(1)]",
        ),
        ("shapes are not checked", "if tuple(tensor.shape) != expected or", "if", BATCH),
        ("dtypes are not checked", " or tensor.dtype != spec.dtype:", ":", BATCH),
    ),
    *mutants_of(
        "step_inputs.py",
        (BATCH,),
        ("a batch without targets is taken", " and not total.any():", " and False:"),
    ),
    *mutants_of(
        "intake.py",
        (LOCAL,),
        ("targets of each rank alone", "counts, totals, strict", "counts, counts.values(), strict"),
        ("an error stays on its rank", "if problems:", "if error is not None:"),
        ("rows of every tp and pp rank count", "if mesh.pp.rank or not mesh.speaks:", "if False:"),
        ("ranks may be given other rows", "self._same.check(batch, is_local=is_local)", "pass"),
    ),
]
GRADIENT_MUTANTS = [
    *mutants_of(
        "parameters.py",
        (EMULATED, UNUSUAL),
        (
            "equal parts count once per tp rank",
            "self._mesh.axes[axis].rank and not",
            "False and not",
        ),
        (
            "equal parts count once per dp rank",
            "and (shard.is_dp_sharded or self._mesh.storage(",
            "and (True or self._mesh.storage(",
            UNUSUAL,
        ),
        (
            "tied parts count once per stage",
            "self.ranks[shard.variable.name][0] == self._mesh.pp.rank",
            "True",
        ),
        ("second copies do not follow", "follower.local.copy_(", "follower.local.clone().copy_("),
        (
            "second copies' gradients are lost",
            "grad = _sum(grad, follower.take_gradient())",
            "follower.take_gradient()",
        ),
        ("of two gradients the first", "return first + second", "return first"),
        (
            "tied gradients are not summed",
            "if (group := self._tied_groups.get(own.variable.name)) is not None:",
            "if (group := None) is not None:",
        ),
        (
            "whole gradients are not summed over dp",
            "grad = dp.all_reduce(grad)",
            "pass",
            UNUSUAL,
        ),
        (
            "unused parameters are forgotten",
            "if self._mesh.pp.rank != 0:",
            "if self._mesh.pp.rank == 0:",
        ),
    ),
    *mutants_of(
        "shard.py",
        (EMULATED, STATE),
        ("gradients do not add up", "own.add_(grad)", "own.copy_(grad)"),
        (
            "the leaf keeps its gradient",
            "grad, self.leaf.grad = self.leaf.grad, None",
            "grad = self.leaf.grad",
        ),
        (
            "every tp rank loads the first part",
            "part = self.variable.layout.cut(full, mesh.place)",
            "p = mesh.place\n        first = type(p)(p.sizes, {a: 0 for a in p.sizes})\n"
            "        part = self.variable.layout.cut(full, first)",
            STATE,
        ),
        (
            "every dp rank loads the first rows",
            "start = min(chunk * rank,",
            "start = min(chunk * 0,",
            STATE,
        ),
        ("rows of another rank are read", "stacked[:length]", "stacked[-length:]", STATE),
        (
            "frozen copies become trainable",
            "requires_grad=leaf.requires_grad)",
            "requires_grad=True)",
            NAMED,
        ),
    ),
    *mutants_of(
        "data_parallel.py",
        (SHARDED, UNUSUAL),
        (
            "gradients are halved",
            "set_gradient_divide_factor(1.0)",
            "set_gradient_divide_factor(2.0)",
        ),
        ("gradients are averaged over dp", "module.set_gradient_divide_factor(1.0)", "pass"),
        (
            "gradients are never reduced",
            "set_requires_gradient_sync(True)",
            "set_requires_gradient_sync(False)",
        ),
        ("scalars are sharded", "if not variable.shape or (", "if ("),
        ("all dtypes are sharded alike", " and variable.dtype not in dtypes)", " and not dtypes)"),
        (
            "evaluated weights stay whole",
            "            module.reshard()\n",
            "            pass\n",
            STATE,
        ),
    ),
]
STEP_MUTANTS = [
    *EXECUTOR_MUTANTS,
    *RUNNER_MUTANTS,
    *MESSAGE_MUTANTS,
    *INPUT_MUTANTS,
    *GRADIENT_MUTANTS,
]
