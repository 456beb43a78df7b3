"""`check_pass` accepts passes that keep their word, and says what is wrong with the others."""

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.custom_pass import FuseSwiGLU, SoftCap
from ilm_compile.errors import PlanError, VerificationError
from ilm_compile.passes import ActivationCheckpoint, CastBF16, Pass, nodes_in, replace, wrap
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.placement import S
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.proof import zoo
from ilm_compile.proof.check_pass import PassCheck, check_pass, make_batch
from tests.support.layouts import placed

aten = torch.ops.aten
TP2 = Plan(num_microbatches=2, tp=2)
PP2 = Plan(num_microbatches=2, pp=2)


def checked(step: Pass, *plans: Plan, model: str = "skip", **options: Any) -> PassCheck:
    return check_pass(step, models={model: zoo.MODELS[model]}, plans=plans, **options)


def make_pass(apply: Any, **declared: Any) -> Pass:
    body: dict[str, Any] = {"name": "tried", "apply": lambda self, program: apply(program)}
    return type("Tried", (Pass,), {**body, **declared})()


def scale_activations(program: Program) -> None:
    """Wrong by one part in a million."""
    for node in nodes_in(program, "blocks.*"):
        if node.target is aten.gelu.default:
            wrap(program, node, lambda x: x * 1.000001)


def stop_gradient(program: Program) -> None:
    """Right forward, wrong backward."""
    for node in nodes_in(program, "blocks.1"):
        if node.target is aten.gelu.default:
            wrap(program, node, torch.detach)


@pytest.mark.parametrize("model", zoo.MODELS)
def test_recompute_is_bit_for_bit_on_every_model(model: str) -> None:
    report = checked(ActivationCheckpoint(fraction=True), TP2, model=model)
    assert report.ok, str(report)
    *alone, _, _ = report.cases
    assert [case.passes for case in report.cases] == ["alone"] * 3 + ["standard"] * 2
    assert {case.allowed for case in report.cases} == {1e-10}
    assert all(case.changed and case.seconds > 0 for case in alone)


@pytest.mark.parametrize("step", [FuseSwiGLU(), SoftCap(cap=2.0)], ids=lambda step: step.name)
def test_example_passes(step: Pass) -> None:
    report = checked(step, *zoo.PLANS[1:], model="internlm2")
    assert report.ok, str(report)
    assert [case.outcome for case in report.cases] == ["ok"] * 6


def test_plans_of_a_changing_pass_are_held_to_what_it_computes_alone() -> None:
    report = checked(SoftCap(cap=2.0), TP2)
    whole, *cut = report.cases
    assert whole.loss_error > 1e-7
    assert all(case.loss_error < 1e-12 and case.allowed == 1e-10 for case in cut)


def test_wrong_value_is_found() -> None:
    report = checked(make_pass(scale_activations), TP2)
    assert not report.ok
    assert {case.outcome for case in report.cases} == {"failed"}
    assert "loss is off by" in report.failures[0]
    with pytest.raises(VerificationError, match=r"check_pass tried: FAILED(.|\n)*loss is off by"):
        report.raise_if_failed()


def test_tolerance_is_what_the_pass_declares() -> None:
    assert checked(make_pass(scale_activations, tolerance=1e-4), TP2).ok


def test_changing_pass_that_changes_too_much() -> None:
    step = make_pass(scale_activations, numerics="changing", tolerance=1e-12)
    (failure,) = checked(step).failures
    assert failure.startswith("skip (alone, tp=1 pp=1 dp=1 microbatches=1): loss is off by")


def test_wrong_gradient_is_found() -> None:
    report = checked(make_pass(stop_gradient))
    assert report.cases[0].loss_error < 1e-15
    assert "gradient of blocks.1.0.weight is off by inf" in report.failures[0]  # it gets none


def test_pass_that_goes_wrong_only_when_sharded() -> None:
    def double_collectives(program: Program) -> None:
        for node in program.graph.find_nodes(op="call_function", target=redistribute):
            if node.kwargs["src"] == "P":
                user = next(iter(node.users))
                user.replace_input_with(node, node.args[0])
                return

    step = make_pass(double_collectives, after=frozenset({"sharded"}))
    report = checked(step, TP2)
    assert [case.outcome for case in report.cases] == ["ok"] * 3 + ["failed"] * 2
    assert "pass tried: PlacementError: placement check: " in report.failures[0]


def test_broken_structure_is_found() -> None:
    def forget(program: Program) -> None:
        del next(program.calls()).meta["region"]

    assert "pass tried: ProgramError: check: no region" in checked(make_pass(forget)).failures[0]


def test_exception_in_a_pass_is_a_failure() -> None:
    def crash(program: Program) -> None:
        raise KeyError("lost")

    report = checked(make_pass(crash), TP2)
    assert report.failures == [
        "skip (alone, tp=1 pp=1 dp=1 microbatches=1) and 4 more: pass tried: KeyError: 'lost'",
    ]


def test_pass_that_depends_on_the_past_is_found() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counter(Pass):
        """Says something else each time."""

        name: ClassVar[str] = "counter"
        numbers: Any = field(default_factory=itertools.count)

        def apply(self, program: Program) -> None:
            program.decisions.append(f"{self.name}: run {next(self.numbers)}")

    report = checked(Counter())
    assert "a second run of the passes gives another program: counter: run 1" in report.failures[0]


def test_unstable_graph_is_found() -> None:
    ops = itertools.cycle([torch.neg, torch.abs])

    def alternate(program: Program) -> None:
        node = program.outputs[1]
        replaced = next(ops)
        wrap(program, node, lambda x: replaced(x) * 0 + x)

    assert "gives another program" in checked(make_pass(alternate)).failures[0]


def test_refusal_is_no_failure_if_something_was_run() -> None:
    def refuse(program: Program) -> None:
        if program.plan.tp > 1:
            raise PlanError("tried: tp=2 is not supported")

    report = checked(make_pass(refuse, after=frozenset({"sharded"})), TP2, PP2)
    assert report.ok
    assert [case.outcome for case in report.cases] == ["ok"] * 3 + ["refused", "ok"]
    refused = "refused: skip (tp=2 pp=1 dp=1 microbatches=2): tried: tp=2 is not supported"
    assert refused in str(report)


def test_nothing_run_is_a_failure() -> None:
    report = checked(CastBF16(), TP2)  # in float64, which the pass refuses
    assert report.failures[0].startswith("no case was run: cast-bf16: expected parameters in")
    assert check_pass(SoftCap(), models={}).failures == [
        "no case was run: no models or plans were given"
    ]


def test_bf16_is_allowed_what_its_digits_allow() -> None:
    report = checked(CastBF16(), TP2, dtype=torch.float32)
    assert report.ok, str(report)
    assert {case.allowed for case in report.cases} == {5e-2}


def test_pass_that_needs_a_sharded_program_is_not_run_alone() -> None:
    step = make_pass(lambda program: None, requires=frozenset({"sharded"}))
    report = checked(step, TP2)
    assert [case.passes for case in report.cases] == ["standard"] * 2


def test_table() -> None:
    lines = str(checked(make_pass(lambda program: None), TP2)).splitlines()
    assert lines[0].startswith("check_pass tried: ok (")
    assert lines[1].split() == [
        *("model", "plan", "passes", "loss", "error", "gradient", "error", "allowed"),
        *("changed", "ms", "result"),
    ]
    cut = ["dp=1", "microbatches=4"]
    assert lines[3].split()[:6] == ["skip", "tp=1", "pp=1", *cut, "alone"]
    assert lines[5].split()[:6] == ["skip", "tp=2", "pp=1", "dp=1", "microbatches=2", "standard"]
    assert {line.split()[-3] for line in lines[2:7]} == {"no"}
    assert lines[-1] == "the pass changed no program: this says little about it"


def test_models_in_which_nothing_changed_are_named() -> None:
    models = {name: zoo.MODELS[name] for name in ("skip", "internlm2")}
    report = check_pass(FuseSwiGLU(), models=models, plans=())
    assert {case.model: case.changed for case in report.cases} == {"skip": False, "internlm2": True}
    lines = str(report).splitlines()
    assert lines[-1] == "the pass changed nothing in skip: these say little about it"
    assert [line.split()[-3] for line in lines[2:8]] == ["no"] * 3 + ["yes"] * 3


def mean_cross_entropy(logits: Tensor, target: Tensor, targets: Tensor) -> Tensor:
    total = aten.cross_entropy_loss.default(logits, target, None, 2, zoo.IGNORED, 0.0)
    return aten.div.Tensor(total, targets)


def z_of_all_targets(logits: Tensor, target: Tensor, targets: Tensor) -> Tensor:
    z = (logits.logsumexp(-1) ** 2 * (target != zoo.IGNORED)).sum()
    return (F.cross_entropy(logits, target, reduction="sum") + z) / targets


def z_of_own_targets(logits: Tensor, target: Tensor, targets: Tensor) -> Tensor:
    kept = target != zoo.IGNORED
    z = (logits.logsumexp(-1) ** 2 * kept).sum() / kept.sum()
    return F.cross_entropy(logits, target, reduction="sum") / targets + z


def z_loss(replacement: Any) -> Pass:
    def add(program: Program) -> None:
        replace(program, mean_cross_entropy, replacement)

    before = frozenset({"sharded"})
    return make_pass(add, numerics="changing", tolerance=10.0, before=before)


@pytest.mark.parametrize("model", ["skip", "hf-llama"])
def test_z_loss_of_the_whole_batch_is_right_however_it_is_cut(model: str) -> None:
    report = checked(z_loss(z_of_all_targets), TP2, model=model)
    assert report.ok, str(report)
    assert all(case.changed for case in report.cases)


def test_z_loss_averaged_over_each_micro_batch_is_found() -> None:
    report = checked(z_loss(z_of_own_targets), TP2)
    whole, *cut = report.cases
    assert whole.outcome == "ok"
    assert {case.outcome for case in cut} == {"failed"}
    assert all(case.loss_error > 1e-5 for case in cut)


def test_loss_divided_by_the_number_of_micro_batches_is_found() -> None:
    def divide(program: Program) -> None:
        loss = program.outputs[0]
        wrap(program, loss, lambda x: x / program.plan.num_microbatches)

    report = checked(make_pass(divide), PP2)
    assert [case.outcome for case in report.cases] == ["ok", *["failed"] * 4]


def test_parameter_that_a_pass_freezes_or_trains_is_found() -> None:
    def freeze(program: Program) -> None:
        (weight,) = (
            n for n in program.graph.find_nodes(op="get_attr") if "blocks.0.0.w" in n.target
        )
        wrap(program, weight, torch.detach)

    assert "gradient of blocks.0.0.weight is off by inf" in checked(make_pass(freeze)).failures[0]


@pytest.mark.parametrize("model", zoo.MODELS)
def test_batch_has_every_id_and_ignores_labels_everywhere(model: str) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def look(program: Program) -> None:
        seen.update({name: spec.shape for name, spec in program.inputs.items()})

    checked(make_pass(look), model=model)
    assert set(seen) == {"input_ids", "labels", *zoo.INPUTS.get(model, ())}
    batch = make_batch(8, zoo.INPUTS.get(model, ()))
    assert set(batch) == set(seen)
    assert batch["input_ids"].unique().tolist() == list(range(zoo.VOCAB))
    ignored = batch["labels"] == zoo.IGNORED
    assert ignored[:, [0, zoo.SEQ // 2, -1]].any(0).all()
    assert sorted(ignored.all(1).tolist())[-2:] == [False, True]
    assert len(set(ignored.sum(1).tolist())) > 3


def test_zoo_has_what_its_names_say() -> None:
    skip = zoo.make_model(zoo.MODELS["skip"])
    assert skip.head.weight is skip.embed.weight
    assert all(p.dtype == torch.float64 for p in skip.parameters())
    again = zoo.make_model(zoo.MODELS["skip"])
    assert all(
        torch.equal(a, b) for a, b in zip(skip.parameters(), again.parameters(), strict=True)
    )
    assert {(plan.tp, plan.pp) for plan in zoo.PLANS} == {(1, 1), (2, 1), (1, 2), (2, 2)}


def test_rewrite_after_sharding_is_placed_by_rule() -> None:
    def fuse_late(program: Program) -> None:
        def pattern(gate: Tensor, up: Tensor) -> Tensor:
            return F.silu(gate) * up

        new = replace(program, pattern, lambda gate, up: torch.sigmoid(gate) * gate * up)
        if program.plan.tp > 1:
            assert {placed(node) for node in new} == {S(2)}

    step = make_pass(fuse_late, after=frozenset({"sharded", "split"}), tolerance=1e-12)
    assert checked(step, TP2, PP2, model="internlm2").ok
