"""Full states out of and into any plan, DTensors at rest, and what a state must look like."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ilm_compile import parallelize
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import internlm2_tiny
from ilm_compile.program.plan import Plan
from tests.runtime.handmade import NUM_BLOCKS, make_batch, make_model, make_parallel
from tests.support.world import World

PLANS = {
    "tp2-pp2": Plan(tp=2, pp=2),
    "pp4": Plan(pp=4),
    "tp2-dp2-zero3": Plan(tp=2, zero=3),
    "dp4-zero1": Plan(zero=1),
    "pp2-chunks2-dp2": Plan(pp=2, num_chunks=2, num_microbatches=2, schedule="interleaved_1f1b"),
}
SEGMENTED = [f"blocks.{block}.gate_up" for block in range(NUM_BLOCKS)]


def load_and_read(rank: int, plan: Plan, state: dict[str, Tensor]) -> dict[str, Tensor]:
    parallel = make_parallel(plan, make_model(tied=True, seed=1), tied=True)
    parallel.load_state_dict(state if rank == 0 else {})
    return parallel.full_state_dict()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_loaded_state_comes_back_whole(world4: World, plan: Plan) -> None:
    state = make_model(tied=True, seed=2).state_dict()
    first, *others = world4.run(load_and_read, plan, state)
    assert others == [{}, {}, {}]
    assert set(first) == set(state)
    for name, value in state.items():
        assert torch.equal(first[name], value), name


def load_then_run(rank: int, plan: Plan, state: dict[str, Tensor]) -> float:
    """Weights loaded between two passes must be those of the second."""
    parallel = make_parallel(plan, make_model(tied=True, seed=1), tied=True)
    batch = make_batch(2 * plan.num_microbatches * parallel.mesh.dp.size)
    parallel.execute_schedule(batch, forward_only=True)
    parallel.load_state_dict(state)
    return parallel.execute_schedule(batch, forward_only=True).item()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_loaded_state_is_what_computes(world4: World, plan: Plan) -> None:
    model = make_model(tied=True, seed=2)
    batch = make_batch(2 * plan.num_microbatches * (4 // (plan.tp * plan.pp)))
    expected = model(**batch).item()
    losses = world4.run(load_then_run, plan, model.state_dict())
    assert losses == pytest.approx([expected] * 4, rel=1e-10)


def read_dtensors(rank: int, plan: Plan) -> dict[str, tuple[Tensor, Tensor | None]]:
    parallel = make_parallel(plan, make_model())
    parallel.execute_schedule(make_batch(2 * plan.num_microbatches * parallel.mesh.dp.size))
    return {
        name: (p.full_tensor().detach(), None if p.grad is None else p.grad.full_tensor())
        for name, p in parallel.named_parameters()
    }


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_parameters_at_rest_are_dtensors(world4: World, plan: Plan) -> None:
    model = make_model()
    batch = make_batch(2 * plan.num_microbatches * (4 // (plan.tp * plan.pp)))
    model(**batch).backward()
    expected = dict(model.named_parameters())
    seen = world4.run(read_dtensors, plan)
    assert {name for names in seen for name in names} == set(expected)
    for rank in seen:
        for name, (value, grad) in rank.items():
            if name in SEGMENTED and plan.tp > 1:
                continue  # shown in the layout of the shards
            assert torch.equal(value, expected[name]), name
            torch.testing.assert_close(grad, expected[name].grad, rtol=1e-10, atol=1e-14)


def refuse(rank: int, state: dict[str, Tensor]) -> str:
    parallel = make_parallel(Plan(tp=2, pp=2), make_model(tied=True, seed=1), tied=True)
    before = parallel.full_state_dict()
    try:
        parallel.load_state_dict(state if rank == 0 else {})
    except IlmCompileError as error:
        after = parallel.full_state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        return str(error)
    return ""


BREAK: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda s: s.pop("blocks.1.norm"), r"missing \['blocks.1.norm'\], unexpected \[\]"),
    "unexpected": (lambda s: s.update(more=s["embed"]), r"missing \[\], unexpected \['more'\]"),
    "shape": (
        lambda s: s.update(embed=s["embed"][:4]),
        r"embed: expected \(10, 6\) torch.float64, got \(4, 6\) torch.float64",
    ),
    "dtype": (
        lambda s: s.update(scale=s["scale"].float()),
        r"scale: expected \(6,\) torch.float64, got \(6,\) torch.float32",
    ),
    "tied": (
        lambda s: s.update(head=s["head"] + 1),
        "head and embed are one tensor in the model, got two values",
    ),
}


@pytest.mark.parametrize("case", BREAK)
def test_a_wrong_state_is_refused_on_every_rank_and_changes_nothing(
    world4: World, case: str
) -> None:
    change, message = BREAK[case]
    state = make_model(tied=True).state_dict()
    change(state)
    for text in world4.run(refuse, dict(state)):
        with pytest.raises(IlmCompileError, match=message):
            raise IlmCompileError(text)


def different_models(rank: int) -> None:
    make_parallel(Plan(pp=2), make_model(seed=rank))


def test_models_that_differ_between_ranks_are_refused(world4: World) -> None:
    with pytest.raises(RuntimeError, match=r"expected the same model on every rank.*embed"):
        world4.run(different_models)


def different_starts(rank: int, name: str) -> None:
    keywords = {
        "plan": {"num_microbatches": 1 + rank % 2},
        "program": {
            "example_inputs": {n: ((1, 8 + rank % 2), torch.int64) for n in ("input_ids", "labels")}
        },
    }[name]
    parallelize(internlm2_tiny(num_layers=1), tp=2, **keywords)


@pytest.mark.parametrize(
    ("name", "message"),
    [("plan", "num_microbatches"), ("program", "the compiled program")],
)
def test_plans_and_programs_that_differ_between_ranks_are_refused(world4, name, message) -> None:
    with pytest.raises(RuntimeError, match=rf"ranks \[1, 3\] differ from rank 0 in {message};"):
        world4.run(different_starts, name)
