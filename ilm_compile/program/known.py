"""Values that sizes decide, known while there are no data: a branch on them can be taken.

``if positions.max() + 1 > limit`` looks at a value, but one that no input has a part in: tokens are
as many as the program is made for. What a model computes from sizes alone, and from its buffers and
constants, is remembered here as it is traced, and computed when the model asks for a number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ilm_compile.errors import TraceError
from ilm_compile.program.borrow import Loan
from ilm_compile.program.users_line import users_line

T = TypeVar("T")
MAX_ELEMENTS = 2**26  # of a value that is computed for the sake of a branch

_MAKERS = frozenset(
    "arange full ones zeros eye linspace logspace tensor as_tensor tril_indices triu_indices "
    "scalar_tensor".split()
)
# These take of a tensor its size and dtype, not its values.
_ALIKE = frozenset(
    ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "new_tensor")
)
_READERS = frozenset(
    "__bool__ item __int__ __float__ __index__ tolist equal allclose is_nonzero "
    "__contains__".split()
)
_NEVER = ("drop", "rand", "bernoulli", "multinomial", "normal", "uniform", "exponential", "empty")
_WRITES = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
) | {"__setitem__"}


class _NoValue(Exception):
    """What is asked for is made of a buffer on the meta device."""


@dataclass
class _Value:
    """A tensor of the capture and how its value is made."""

    tensor: Tensor  # held, so that its id is its own
    make: Callable[[], Any]
    buffers: frozenset[str] = frozenset()  # of the model, that it is made of


@dataclass(eq=False)
class KnownValues(TorchFunctionMode):
    """While active, answers questions about values that no input has a part in.

    `decided` collects a sentence for each branch that the value of a buffer decided.
    """

    loan: Loan
    decided: dict[str, None] = field(default_factory=dict)
    _known: dict[int, _Value] = field(default_factory=dict)
    _lost: dict[int, Tensor] = field(default_factory=dict)  # real tensors that were written to
    _uniform: dict[int, Tensor] = field(default_factory=dict)  # drawn from [0, 1)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in _READERS and tensors and all(map(self._knows, tensors)):
            try:
                return self._answer(func, args, kwargs, tensors)
            except _NoValue:  # a buffer on the meta device
                pass
        if (name == "where" and len(args) + len(kwargs) == 1) or name in ("nonzero", "argwhere"):
            raise TraceError(
                f"trace: the model asks where a condition holds{users_line()}, which gives as many "
                "places as values say, and a static graph has fixed sizes. Use torch.where("
                "condition, a, b), or compute all and multiply by condition.to(x.dtype); experts: "
                "all of them on all tokens with weights of 0, or torch._grouped_mm"
            )
        result = func(*args, **kwargs)
        self._note(name, func, args, kwargs, tensors, result)
        return result

    def _knows(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return id(tensor) in self._known or id(tensor) in self.loan.buffers
        return not tensor.requires_grad and not tensor.is_meta and id(tensor) not in self._lost

    def _note(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        result: Any,
    ) -> None:
        """Remember how `result` was made, if it can be made again."""
        if name == "rand":
            self._uniform[id(result)] = result
        elif name in ("lt", "__lt__") and id(args[0]) in self._uniform and args[1] == 0:
            # LayerDrop with a probability of 0, as models write it, drops no layer.
            never = partial(torch.zeros, result.shape, dtype=torch.bool)
            self._known[id(result)] = _Value(result, never)
            return
        target = written(name, args, kwargs)
        inputs = [] if name in _ALIKE else tensors
        able = bool(tensors) or name in _MAKERS
        able = able and all(map(self._knows, inputs)) and "out" not in kwargs
        able = able and not any(part in name for part in _NEVER)
        if not able and target is None:
            return
        made_of = self._buffers(inputs)
        recipe = self._recipe(func, args, kwargs, inputs) if able else None
        if target is not None:
            self._forget(target)
            if recipe is not None and name != "__setitem__" and result is target:
                self._known[id(target)] = _Value(target, recipe, made_of)
            return
        assert recipe is not None
        several = isinstance(result, (tuple, list))
        for index, item in enumerate(result if several else [result]):
            if isinstance(item, FakeTensor) and not any(item is tensor for tensor in tensors):
                make = _item_of(recipe, index) if several else recipe
                self._known[id(item)] = _Value(item, make, made_of)

    def _recipe(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]
    ) -> Callable[[], Any]:
        makers = {id(tensor): self._maker(tensor) for tensor in inputs}
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}

        def value(tensor: Tensor) -> Tensor:
            if id(tensor) not in makers:  # only its size and dtype count
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
            made: Tensor = makers[id(tensor)]()
            if made.numel() > MAX_ELEMENTS:
                raise TraceError(f"trace: a value of shape {tuple(made.shape)} is asked for")
            return made.clone()  # in case it is written to

        kept: list[Any] = []

        def make() -> Any:
            if not kept:
                call, named = tree_map_only(Tensor, value, (args, kwargs))
                call = tree_map_only(torch.device, lambda _: torch.device("cpu"), call)
                kept.append(func(*call, **named))
            return kept[0]

        return make

    def _maker(self, tensor: Tensor) -> Callable[[], Any]:
        if (known := self._known.get(id(tensor))) is not None:
            return known.make
        if (buffer := self.loan.buffers.get(id(tensor))) is not None:
            return lambda: _value_of(buffer[1])
        return lambda: tensor.detach().cpu()

    def _buffers(self, inputs: list[Tensor]) -> frozenset[str]:
        names: set[str] = set()
        for tensor in inputs:
            if (known := self._known.get(id(tensor))) is not None:
                names |= known.buffers
            elif (buffer := self.loan.buffers.get(id(tensor))) is not None:
                names.add(buffer[0])
        return frozenset(names)

    def _forget(self, target: Tensor) -> None:
        """What shares memory with a tensor that is written to is not known any more."""
        if not isinstance(target, FakeTensor):
            self._lost[id(target)] = target
            return
        self.loan.buffers.pop(id(target), None)
        storage = target.untyped_storage()._cdata
        for key, value in list(self._known.items()):
            if value.tensor.untyped_storage()._cdata == storage:
                del self._known[key]

    def _answer(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        answer = away_from_capture(self._recipe(func, args, kwargs, tensors))
        if names := self._buffers(tensors):
            self.decided[
                f"the value of {', '.join(sorted(names))} now decides what is traced"
                f"{users_line()}; another value, loaded later, changes nothing"
            ] = None
        return answer


def _value_of(buffer: Tensor) -> Tensor:
    if buffer.is_meta:
        raise _NoValue
    return buffer.detach().cpu()


def _item_of(recipe: Callable[[], Any], index: int) -> Callable[[], Any]:
    return lambda: recipe()[index]


def written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor that a call writes to."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]  # type: ignore[no-any-return]
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    target = args[0] if args else None
    return target if in_place and isinstance(target, Tensor) else None


def away_from_capture(function: Callable[[], T]) -> T:
    """Return what `function` gives outside of the capture, which holds for one thread only."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
