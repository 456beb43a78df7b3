"""What an optimizer is given: every parameter under its name, frozen ones frozen."""

from ilm_compile.program.plan import Plan
from tests.runtime.handmade import make_model, make_parallel


def test_frozen_parameters_are_frozen_in_what_an_optimizer_is_given() -> None:
    model = make_model()
    given = dict(make_parallel(Plan(), model).named_parameters())
    assert {name: p.requires_grad for name, p in given.items()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
