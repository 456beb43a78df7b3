"""A pass that merges weights: users still see, load and save those of their own model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import ilm_compile
from examples.custom_pass import MergeGateUp
from ilm_compile.errors import IlmCompileError, ProgramError
from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import Pass, replace_parameters, run_passes
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof.check_pass import check_pass
from tests.support.world import World

PLAN = {"tp": 2, "pp": 2, "num_microbatches": 2}
W1, W3 = "layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight"
WO = "layers.0.attention.wo.weight"


def make_model(device: str = "cpu") -> torch.nn.Module:
    with torch.device(device):
        return internlm2_tiny(num_layers=2).double()


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(512, (2, 64), generator=generator) for n in ("input_ids", "labels")}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(4) as world:
        yield world


def step_and_read(rank: int, device: str, loaded: Any) -> tuple[float, Any, Any, set[str]]:
    model = make_model(device)
    parallel = ilm_compile.parallelize(model, passes=[MergeGateUp()], **PLAN)
    if loaded is not None:
        parallel.load_state_dict(loaded)
    loss = parallel.execute_schedule(make_batch())
    names = {name for name, _ in parallel.named_parameters()}
    return loss.item(), parallel.full_gradients(), parallel.full_state_dict(), names


@pytest.mark.parametrize("start", ["real", "meta", "loaded"])
def test_the_user_sees_the_weights_of_the_model(world: World, start: str) -> None:
    model = make_model()
    if start == "loaded":
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
    loss = model(**make_batch())
    loss.backward()
    device = "meta" if start == "meta" else "cpu"
    state = model.state_dict() if start == "loaded" else None
    (got, gradients, weights, names), *_ = world.run(step_and_read, device, state)
    assert any("_and_up" in name for name in names)  # it did merge
    assert got == pytest.approx(loss.item(), rel=1e-10)
    expected = dict(model.named_parameters())
    assert set(gradients) == set(weights) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(weights[name], parameter), name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-14)


def test_verification_maps_weights_and_gradients_back() -> None:
    report = ilm_compile.verify(make_model(), passes=[MergeGateUp()], **PLAN)
    assert report.ok, str(report)


@dataclass(frozen=True, kw_only=True)
class Forgetful(MergeGateUp):
    """Gives the two weights back in the wrong order."""

    name: ClassVar[str] = "forgetful"

    def apply(self, program: Program) -> None:
        super().apply(program)
        for index, each in enumerate(program.parameter_maps):

            def swapped(full: dict[str, Tensor], back: Any = each.backward) -> dict[str, Tensor]:
                first, second = back(full).items()
                return {first[0]: second[1], second[0]: first[1]}

            changed = type(each)(each.made_by, each.sources, each.targets, each.forward, swapped)
            program.parameter_maps[index] = changed


def test_a_way_back_that_does_not_undo_is_caught() -> None:
    report = check_pass(Forgetful(), models={"internlm2": lambda: make_model().float()}, plans=[])
    assert "forgetful: the way back" in report.failures[0]


@dataclass(frozen=True, kw_only=True)
class Broken(Pass):
    name: ClassVar[str] = "broken"
    sources: tuple[str, ...] = (W1, W3)
    target: str = "merged"

    def apply(self, program: Program) -> None:
        def back(full: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(zip(self.sources, full[self.target].chunk(2), strict=True))

        def forward(full: dict[str, Tensor]) -> dict[str, Tensor]:
            return {self.target: torch.cat(list(full.values()))}

        replace_parameters(program, self, self.sources, forward, back)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Broken(), f"{W1} is not among program.variables"),
        (Broken(sources=(W1, "nothing")), "broken names nothing, which is no parameter"),
        (Broken(target="norm.weight"), "names the model has already"),
        (Broken(sources=(W1, WO)), "the way back of broken must give"),
    ],
)
def test_a_wrong_replacement_is_refused(step: Pass, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        run_passes(trace(make_model()), [step])


def test_only_works_before_sharding() -> None:
    program = ilm_compile.partition(make_model(), tp=2)
    with pytest.raises(IlmCompileError, match="sharded already"):
        run_passes(program, [Broken()])
