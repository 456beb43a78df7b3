"""Source mutants of a training step: executor, stages, gradients, norm, optimizer.

Each is one replacement of text that occurs once in its file. Those of weights, checkpoints and data
are in `benchmarks.source_mutants_state`.
"""

# ruff: noqa: E501 - the text of a line is a line

from __future__ import annotations

from dataclasses import dataclass

RUNTIME = "ilm_compile/runtime"
TESTS = "tests/runtime"
EMULATED = f"{TESTS}/test_emulated_training.py"
INPUTS = f"{TESTS}/test_step_inputs.py"
EXECUTOR = f"{TESTS}/test_executor.py"
STATE = f"{TESTS}/test_state.py"
TRAINER = f"{TESTS}/test_trainer.py"
BAD_STEPS = f"{TESTS}/test_trainer_bad_steps.py"
FLOAT16 = f"{TESTS}/test_trainer_float16.py"
OPTIMIZER = f"{TESTS}/test_optimizer.py"
SCALING = f"{TESTS}/test_optimizer_scaling.py"
BATCH = f"{TESTS}/test_batch.py"
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
        "{a.stage: a for a in row if a.kind is Kind.B}",
        "{a.stage: a for a in reversed(row) if a.kind is Kind.B}",
    ),
    (
        "gradients are never reduced",
        "if action == last_backward.get(",
        "if row == last_backward.get(",
    ),
    ("gradients are reduced in every backward", "        if training:\n", "        if False:\n"),
    ("a received tensor is used before it came", "if schedule.receives(action):", "if False:"),
    (
        "what a stage makes goes to the wrong side",
        "step = +1 if action.kind",
        "step = -1 if action.kind",
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
            "(batch, graph) / layout.num_slices",
            "(batch, graph)",
        ),
        ("losses are added up", ".double().sum() / self.layout.num_slices", ".double().sum()"),
        ("gradients are added up", "return scale / self.layout.num_slices", "return scale"),
        (
            "counts in float32",
            "torch.float64 if torch.float64 in dtypes",
            "torch.float32 if torch.float64 in dtypes",
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
            "zip(*columns, strict=True))",
            "[*zip(*columns)][:1])",
        ),
        ("shapes are not checked", "if tuple(tensor.shape) != expected or", "if", BATCH),
        ("dtypes are not checked", " or tensor.dtype != spec.dtype:", ":", BATCH),
        ("a batch without targets is taken", "if total == 0:", "if False:", BATCH),
    ),
]
GRADIENT_MUTANTS = [
    *mutants_of(
        "parameters.py",
        (EMULATED, UNUSUAL),
        (
            "equal parts count once per tp rank",
            "and (shard.variable.placement.is_shard or self._mesh.tp.rank == 0)",
            "and True",
        ),
        (
            "equal parts count once per dp rank",
            "and (shard.is_dp_sharded or self._mesh.dp.rank == 0)",
            "and True",
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
            "grad = self._dp.all_reduce(grad)",
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
            "mesh.tp.size)[mesh.tp.rank]",
            "mesh.tp.size)[0]",
            STATE,
        ),
        (
            "every dp rank loads the first rows",
            "mesh.dp.size) * mesh.dp.rank,",
            "mesh.dp.size) * 0,",
            STATE,
        ),
        ("rows of another rank are read", "stacked[:rows]", "stacked[-rows:]", STATE),
        (
            "frozen copies become trainable",
            "requires_grad=leaf.requires_grad)",
            "requires_grad=True)",
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
UPDATE_MUTANTS = [
    *mutants_of(
        "norm.py",
        (EMULATED, BAD_STEPS),
        ("the square of the norm", "norm = totals[0].sqrt()", "norm = totals[0]"),
        ("the norm of one rank", "mesh.everyone.all_reduce(totals)", "totals"),
        (
            "gradients are never clipped",
            "(max_norm / (norm + _EPSILON)).clamp(max=1.0)",
            "torch.ones_like(norm)",
        ),
        ("small gradients are blown up", ".clamp(max=1.0)", ""),
        ("clipped to twice the norm", "factor = (max_norm / (", "factor = (2 * max_norm / ("),
        ("a coarse epsilon", "_EPSILON = 1e-6", "_EPSILON = 1e-3"),
        ("the loss scale is multiplied in", "(factor / scale)", "(factor * scale)", FLOAT16),
        (
            "what is not finite elsewhere is not seen",
            "(totals[1] > 0) & norm",
            "(totals[1] > 99) & norm",
            BAD_STEPS,
        ),
        ("squares in place of norms", "norms.double().square().sum()", "norms.double().sum()"),
    ),
    *mutants_of(
        "parallel.py",
        (EMULATED, INPUTS, BATCH),
        (
            "gradients are never zeroed",
            "            shard.public.grad = None\n",
            "            pass\n",
        ),
        ("copies do not follow", "        self._parameters.follow()\n", ""),
        ("steps are not counted", "            self.num_steps += 1\n", ""),
        (
            "evaluations are counted",
            "        if not forward_only:\n            self.num_steps += 1\n",
            "        self.num_steps += 1\n        if not forward_only:\n",
            INPUTS,
        ),
        (
            "the loss of every tp rank",
            "result.losses if self.mesh.tp.rank == 0 else []",
            "result.losses",
        ),
        ("the loss of one rank", "self.mesh.everyone.all_reduce(own)", "own"),
        (
            "the norm of scaled gradients",
            "total = self.grad_norm() / scale",
            "total = self.grad_norm()",
            FLOAT16,
        ),
        ("losses are not checked", "checked=[*others, *self._losses]", "checked=others", BAD_STEPS),
        (
            "equal parts are not checked",
            "checked=[*others, *self._losses]",
            "checked=self._losses",
            BAD_STEPS,
        ),
        (
            "outputs of the first micro-batch",
            "for outputs in result.outputs])",
            "for outputs in result.outputs[:1]])",
        ),
        ("the wrong output", "index = self.output_names.index(name)\n", "index = 0\n"),
        ("different models are taken", "    if different:\n", "    if False:\n", STATE),
    ),
    *mutants_of(
        "trainer.py",
        (EMULATED, TRAINER),
        (
            "gradients are not clipped",
            "clip_grad_norm_(self.max_grad_norm, scale",
            "clip_grad_norm_(None, scale",
        ),
        ("the optimizer does not step", "        self.optimizer.step()\n", ""),
        ("bad steps are taken", "        if not is_finite:\n", "        if False:\n", BAD_STEPS),
        (
            "rates never change",
            "                scheduler.step()\n",
            "                pass\n",
            BAD_STEPS,
        ),
        (
            "skips are not counted on",
            "        self._num_skips_in_a_row = 0\n        ACTIVITY",
            "        ACTIVITY",
            BAD_STEPS,
        ),
        (
            "nothing to train is taken",
            "if not any(variable.requires_grad for",
            "if not any(True for",
            UNUSUAL,
        ),
    ),
    *mutants_of(
        "optimizer/adamw.py",
        (OPTIMIZER,),
        ("another beta1", "(0.9, 0.95)", "(0.95, 0.95)"),
        ("another beta2", "(0.9, 0.95)", "(0.9, 0.999)"),
        ("another epsilon", "eps: float = 1e-8", "eps: float = 1e-6"),
        ("another weight decay", "weight_decay: float = 0.1", "weight_decay: float = 0.01"),
        ("decay of norms and biases", '"weight_decay": 0.0}', '"weight_decay": weight_decay}'),
        ("vectors decay", "if p.ndim >= 2]", "if p.ndim >= 1]"),
        (
            "the betas are not used",
            "betas=betas, ",
            "",
        ),
    ),
    *mutants_of(
        "optimizer/schedules.py",
        (OPTIMIZER, SCALING),
        ("the rate is one step late", "step = steps_done + 1", "step = steps_done"),
        ("no warm-up", "if step <= start:", "if step < 0:"),
        ("a cosine to zero", "return min_ratio + (1 - min_ratio) *", "return"),
        (
            "beta2 grows too fast",
            "math.pow(self.num_steps, self.c)",
            "math.pow(self.num_steps, 2 * self.c)",
        ),
    ),
    *mutants_of(
        "optimizer/loss_scaler.py",
        (SCALING, OPTIMIZER),
        ("the scale never shrinks", "self.scale * self.backoff_factor)", "self.scale)"),
        (
            "good steps are counted through an overflow",
            "        if overflowed:\n            self._num_good = 0\n",
            "        if overflowed:\n",
        ),
    ),
]
STEP_MUTANTS = [
    *EXECUTOR_MUTANTS,
    *RUNNER_MUTANTS,
    *MESSAGE_MUTANTS,
    *INPUT_MUTANTS,
    *GRADIENT_MUTANTS,
    *UPDATE_MUTANTS,
]
