"""Source mutants of what becomes of gradients: norm, clipping, optimizer, schedules."""

from __future__ import annotations

from benchmarks.source_mutants import (
    BAD_STEPS,
    BATCH,
    EMULATED,
    INPUTS,
    OPTIMIZER,
    SCALING,
    STATE,
    TRAINER,
    UNUSUAL,
    mutants_of,
)

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
        ("the loss scale is multiplied in", "(factor / scale)", "(factor * scale)", BAD_STEPS),
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
            "result.losses if self.mesh.speaks else []",
            "result.losses",
        ),
        ("the loss of one rank", "self.mesh.everyone.all_reduce(own)", "own"),
        (
            "the norm of scaled gradients",
            "total = self.grad_norm() / scale",
            "total = self.grad_norm()",
            BAD_STEPS,
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
            "[each[index] for each in result.outputs]",
            "[each[index] for each in result.outputs[:1]]",
        ),
        ("the wrong output", "index = form.output_names.index(name)\n", "index = 0\n"),
    ),
    *mutants_of(
        "agree.py",
        (STATE,),
        ("different models are taken", "    if different:\n", "    if False:\n"),
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
        ("decay of norms and biases", "weight_decay if decay_all else 0.0", "weight_decay"),
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
