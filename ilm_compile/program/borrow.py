"""The user's model, lent to the capture: on fake tensors of its own device, then as it was.

Nothing is copied: a model may hold what cannot be copied, and functions that hold the model. While
it is lent, its parameters and buffers are fakes without data, and whatever its forward leaves
behind (a cached table, the last loss) goes with them when it is given back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ilm_compile.errors import TraceError
from ilm_compile.program.users_line import users_line


@dataclass
class Loan:
    """A model on fake tensors: what stands for what."""

    model: nn.Module
    mode: FakeTensorMode
    device: torch.device
    fakes: dict[int, Tensor] = field(default_factory=dict)  # by the id of the user's tensor
    buffers: dict[int, tuple[str, Tensor]] = field(default_factory=dict)  # by the id of its fake
    changed: list[str] = field(default_factory=list)  # numbers that the forward left changed
    _places: list[tuple[str, dict[str, Any], str, Tensor]] = field(default_factory=list)

    def input(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a fake input on the model's device."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Hold while the model runs: torch.export has put tensors of its own into it."""
        for path, table, name, tensor in self._places:
            self.fakes[id(tensor)] = table[name]
            if not isinstance(tensor, nn.Parameter):
                self.buffers[id(table[name])] = (f"{path}.{name}".lstrip("."), tensor)
        before = _numbers(self.model)
        yield
        self.changed = _changed_numbers(self.model, before)

    def swap(self) -> None:
        """Put a fake in the place of each parameter and buffer, one for all names of a tensor."""
        for path, module in self.model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    self._places.append((path, table, name, tensor))
                    if id(tensor) not in self.fakes:
                        self.fakes[id(tensor)] = _fake(tensor, self)
                    table[name] = self.fakes[id(tensor)]


def refuse_lazy(model: nn.Module) -> None:
    """Raise `TraceError` for a parameter that has no shape yet."""
    for path, module in model.named_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and nn.parameter.is_lazy(tensor):
                raise TraceError(
                    f"trace: {path}.{name} has no shape yet; run the model once on a small batch, "
                    "so that its lazy modules are made, then compile it"
                )


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Loan]:
    """Lend `model` on fake tensors; afterwards every attribute is what it was, flags included.

    A model in training mode keeps the flag of each part; one in evaluation mode as a whole is put
    into training mode.
    """
    devices = {t.device for t in [*model.parameters(), *model.buffers()] if not t.is_meta}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    shape_env = ShapeEnv(tracked_fakes=[])
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True, export=True)
    loan = Loan(model, mode, device)
    put_back = remember(model)
    try:
        if not model.training:
            model.train()
        loan.swap()
        yield loan
    finally:
        for undo in put_back:
            undo()


def _fake(tensor: Tensor, loan: Loan) -> Tensor:
    with loan.mode:
        fake = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=loan.device
        )
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    fake.__dict__.update(vars(tensor))  # marks that a model puts on its weights
    return fake


class Originals(TorchFunctionMode):
    """Takes the fake where a model uses a tensor that it kept elsewhere, in a list or a closure."""

    def __init__(self, loan: Loan) -> None:
        super().__init__()
        self.loan = loan

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(_is_real, tree_leaves((args, kwargs)))):
            args, kwargs = tree_map_only(Tensor, self._exchange, (args, kwargs))
            if getattr(func, "__name__", "") != "__get__":  # what only asks for shape or device
                for leaf in filter(_is_real, tree_leaves((args, kwargs))):
                    _check(func, leaf)
        return func(*args, **kwargs)

    def _exchange(self, tensor: Tensor) -> Tensor:
        return self.loan.fakes.get(id(tensor), tensor)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _check(func: Any, tensor: Tensor) -> None:
    """Refuse a tensor that the model holds beside its parameters and buffers, if it must be one."""
    name, shape = getattr(func, "__name__", func), tuple(tensor.shape)
    if tensor.requires_grad:
        raise TraceError(
            f"trace: {name} takes a tensor of shape {shape} that has a gradient but is no "
            f"parameter of the model{users_line()}; it would not be trained. Register it as an "
            "nn.Parameter (lists of them in an nn.ParameterList), or keep tensor.detach() in its "
            "place"
        )
    if tensor.is_meta and tensor.numel():
        raise TraceError(
            f"trace: {name} takes a tensor of shape {shape} that is on the meta device and no "
            f"buffer of the model{users_line()}: it has no value and nothing computes it. Register "
            "it with register_buffer, or build the model on the CPU"
        )


def _numbers(model: nn.Module) -> dict[str, float]:
    """Return the numbers among the attributes of each module, by name."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    }


def _changed_numbers(model: nn.Module, before: dict[str, float]) -> list[str]:
    after = _numbers(model)
    return [
        f"the forward changes {name} from {value} to {after[name]}; the program is traced once, "
        f"with what it makes of {value}"
        for name, value in before.items()
        if name in after and after[name] != value
    ]


_ATOMS = (str, bytes, int, float, complex, type(None), type, Tensor, FunctionType, MethodType)


def remember(model: nn.Module) -> list[Callable[[], None]]:
    """Return what puts back each attribute, list, dict and set that is reached from `model`."""
    undo: list[Callable[[], None]] = []
    seen: set[int] = set()
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if isinstance(value, (*_ATOMS, ModuleType)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            undo.append(_restore_dict(value))
            pending += value.values()
        elif isinstance(value, list):
            undo.append(_restore_list(value))
            pending += value
        elif isinstance(value, set):
            undo.append(_restore_set(value))
        elif isinstance(value, tuple):
            pending += value
        if isinstance(value, nn.Module) or _is_users(value):
            undo.append(_restore_dict(vars(value)))
            pending += vars(value).values()
    return undo


def _is_users(value: Any) -> bool:
    """Whether `value` is an object of a class that torch and Python do not bring along."""
    kind = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and kind not in ("torch", "builtins", "functools")


def _restore_dict(target: dict[Any, Any]) -> Callable[[], None]:
    saved = dict(target)

    def undo() -> None:
        same = target.keys() == saved.keys() and all(target[k] is saved[k] for k in saved)
        if not same:
            kind = OrderedDict if isinstance(target, OrderedDict) else dict  # its order is its own
            kind.clear(target)
            kind.update(target, saved)

    return undo


def _restore_list(target: list[Any]) -> Callable[[], None]:
    saved = list(target)
    return lambda: list.__setitem__(target, slice(None), saved)


def _restore_set(target: set[Any]) -> Callable[[], None]:
    saved = set(target)

    def undo() -> None:
        set.clear(target)
        set.update(target, saved)

    return undo
