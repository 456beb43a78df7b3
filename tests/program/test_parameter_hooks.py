"""Gradient hooks of parameters: kept element by element, as in one backward of the whole batch."""

import pytest
import torch
from torch import nn

import ilm_compile
from ilm_compile.errors import ProgramError, TraceError, VerificationError
from ilm_compile.program.trace import trace
from ilm_compile.proof import static
from ilm_compile.rewrite.parameters import replace_parameters
from ilm_compile.runtime.shard import Shard
from tests.program.training import LM, VOCAB, WIDTH, assert_trains_equal, tokens

MASK = torch.arange(WIDTH)[:, None] % 2


def in_place(grad):
    grad.mul_(MASK)


def decay(parameter):
    parameter.grad.add_(parameter, alpha=0.1)


def replaced(parameter):
    parameter.grad = parameter.grad.clamp(-1e-2, 1e-2)


def hooked(*functions, post=()):
    model = LM()
    for function in functions:
        model.layer.weight.register_hook(function)
    for function in post:
        model.layer.weight.register_post_accumulate_grad_hook(function)
    return model


KEPT = {
    "a factor": lambda: hooked(lambda g: g * 0.5),
    "a mask": lambda: hooked(lambda g: g * MASK),
    "in place": lambda: hooked(in_place),
    "a limit, which is not linear": lambda: hooked(lambda g: g.clamp(-1e-2, 1e-2)),
    "another dtype inside": lambda: hooked(lambda g: g.float().double()),
    "one after the other": lambda: hooked(lambda g: g.clamp(-1e-2, 1e-2), lambda g: g * 10),
    "post-accumulate": lambda: hooked(post=[decay]),
    "post-accumulate, a new gradient": lambda: hooked(post=[replaced]),
    "both kinds": lambda: hooked(lambda g: g * 10, post=[decay, replaced]),
}


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_a_hook_sees_the_gradient_of_the_whole_batch(make):
    parallel = assert_trains_equal(make(), num_microbatches=2)
    assert parallel.num_steps == 1


@pytest.mark.parametrize("post", [False, True], ids=["hook", "post-accumulate"])
def test_several_batches_add_up_as_several_backwards(post):
    model = hooked(post=[decay]) if post else hooked(lambda g: g.clamp(-1e-2, 1e-2))
    batch = tokens()
    parallel = ilm_compile.parallelize(model, example_inputs=batch)
    for scale in (1.0, 4.0):  # of the loss, as for float16: no hook sees it
        parallel.zero_grad()
        model.zero_grad()
        for _ in range(2):
            parallel.execute_schedule(batch, loss_scale=scale)
            model(**batch).backward()
        expected = scale * model.layer.weight.grad
        torch.testing.assert_close(
            parallel.full_gradients()["layer.weight"], expected, rtol=1e-10, atol=0
        )


def test_a_kept_hook_is_told():
    program = trace(hooked(lambda g: g * 0.5), example_inputs=tokens())
    assert any("hooks of layer.weight are kept" in each for each in program.decisions)


def first_row_twice(grad):
    grad = grad.clone()
    grad[1] = grad[0]
    return grad


def take_away(parameter):
    parameter.grad = None


def move(parameter):
    parameter.mul_(0.9)
    parameter.grad.mul_(0.9)


REFUSED = {
    "a norm": (lambda: hooked(lambda g: g / g.norm()), "makes more of an element than"),
    "a norm above a limit": (
        lambda: hooked(lambda g: g / g.norm().clamp(min=1e3)),
        "makes more of an element than",
    ),
    "a mean": (lambda: hooked(lambda g: g - g.mean()), "makes more of an element than"),
    "another row": (lambda: hooked(first_row_twice), "makes more of an element than"),
    "whether any is NaN": (
        lambda: hooked(lambda g: g * (0.0 if g.isnan().any() else 0.5)),
        "makes more of an element than",
    ),
    "noise": (lambda: hooked(lambda g: g + torch.randn_like(g)), "does not give the same twice"),
    "a constant": (lambda: hooked(lambda g: g + 1e-3), "of a gradient that is zero"),
    "one that looks on": (lambda: hooked(lambda g: print(end="")), "only looks at the gradient"),
    "another shape": (
        lambda: hooked(lambda g: g.sum(0)),
        r"makes \(8,\) torch.float64 of \(8, 8\)",
    ),
    "another dtype": (lambda: hooked(lambda g: g.float()), "torch.float32 of .* torch refuses too"),
    "an error": (lambda: hooked(lambda g: g @ torch.ones(3)), "cannot be tried .*RuntimeError"),
    "post, looks on": (lambda: hooked(post=[lambda p: print(end="")]), "only looks at"),
    "post, returns": (
        lambda: hooked(post=[lambda p: p.grad.mul_(0.5)]),
        "returns something, which torch refuses too",
    ),
    "post, no gradient left": (lambda: hooked(post=[take_away]), "takes the gradient away"),
    "post, a step": (lambda: hooked(post=[move]), "changes the parameter, not only its gradient"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_part_of_a_gradient_can_tell_is_refused_with_the_line(make, reason):
    line = r"layer\.weight has a hook by .*hook, \S+ \(.*test_parameter_hooks\.py:\d+\), which .*"
    with pytest.raises(TraceError, match=line + reason):
        trace(make(), example_inputs=tokens())


def all_kinds():
    model = hooked(lambda g: g * 10, post=[decay])
    rows = torch.arange(VOCAB)[:, None] % 3
    model.embed.weight.register_hook(lambda g: g * rows)
    model.head.weight.register_post_accumulate_grad_hook(replaced)
    return model


PLAN = {"tp": 2, "pp": 2, "num_microbatches": 2, "example_inputs": tokens(2)}


def test_verify_proves_hooks_under_a_plan():
    assert ilm_compile.verify(all_kinds(), dp=2, **PLAN).ok


@pytest.mark.parametrize("forgotten", [False, True], ids=["hook", "post-accumulate"])
def test_verify_fails_where_hooks_are_forgotten(forgotten, monkeypatch):
    original = Shard.apply_hooks

    def without(self, grad, mesh, *, is_post, scale):
        found = original(self, grad, mesh, is_post=is_post, scale=scale)
        return grad if is_post == forgotten else found

    monkeypatch.setattr(Shard, "apply_hooks", without)
    with pytest.raises(VerificationError):
        ilm_compile.verify(all_kinds(), **PLAN).raise_if_failed()


def test_a_pass_may_not_lose_a_hook():
    traced, program = (trace(model, example_inputs=tokens()) for model in (all_kinds(), LM()))
    with pytest.raises(ProgramError, match=r"embed\.weight has gradient hooks \[\]; the model has"):
        static.check_variables(traced, program)


def test_a_pass_may_not_replace_a_parameter_with_a_hook():
    program = trace(all_kinds(), example_inputs=tokens())
    step = ilm_compile.passes.TensorParallel(size=1)
    with pytest.raises(
        ProgramError, match=r"layer\.weight, which has a gradient hook, .*lambda> \("
    ):
        replace_parameters(program, step, ["layer.weight"], dict, dict)


def test_a_model_without_values_is_tried_all_the_same():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 1)).double()
    model[0].weight.register_hook(lambda g: g * 0.5)
    inputs = {"input": ((4, 3), torch.float64), "labels": ((4, 1), torch.float64)}
    program = trace(model, example_inputs=inputs, loss_fn=nn.functional.mse_loss)
    assert [len(v.gradient_hooks) for v in program.variables.values()] == [1, 0]
