"""Which placement changes the search may use, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from ilm_compile.cost import Hardware, collective_time
from ilm_compile.errors import PlanError
from ilm_compile.ops.attention import way
from ilm_compile.ops.call import Call, Strategy
from ilm_compile.program.collectives import TRANSITIONS, WIRE, Move
from ilm_compile.program.expert_rows import ROUTES, SENT
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.program import Program
from ilm_compile.program.values import is_tuple

ELEMENT_BYTES = 2  # of a floating-point value, as plans are made for bf16
TIE = 1e-9  # seconds: of two equally cheap plans take the one with fewer transitions


@dataclass(frozen=True, kw_only=True)
class Restrictions:
    """What the user forbids the search.

    `sequence_parallel`: True, activations are sharded over tokens wherever that is legal and are
    gathered for a matrix product only; False, none is ever scattered. None leaves it to the cost.
    `dispatch`: True, rows are sent to the ranks that have their experts; False, tokens are gathered
    instead. `rows`: whether the axis may split the rows of a micro-batch, as data parallelism does.
    `parameters` fixes placements at rest, by parameter name or glob pattern. `attention`: attention
    is divided by "heads", by "queries", in a "ring", or as is cheapest (None). `folded`: the sizes
    of dimensions that count tokens, to be cut in head and tail pieces if queries of causal
    attention are sharded.
    `name`: of the pass, in errors.
    """

    name: str = "tensor-parallel"
    sequence_parallel: bool | None = None
    rows: bool = False
    dispatch: bool | None = None
    parameters: tuple[tuple[str, Placement], ...] = ()
    attention: str | None = "heads"
    folded: frozenset[int] = frozenset()

    def attention_by(self, call: Call, options: list[Strategy], where: str) -> list[Strategy]:
        """Return the options left for an attention. Raises `PlanError` if none is."""
        if self.attention is None:
            return options
        left = [o for o in options if way(call, o) == self.attention]
        if not left:
            raise PlanError(
                f"{self.name}: the attention at {where}, queries {call.shapes[0]} and keys "
                f"{call.shapes[1]}, cannot be divided in the way {self.attention!r}; leave the "
                "choice open"
            )
        return left

    def fixed(self, name: str) -> Placement | None:
        """Return the placement that parameter `name` must have, None if it is free."""
        return next((p for pattern, p in self.parameters if fnmatchcase(name, pattern)), None)

    def parameter(self, name: str, options: list[Placement]) -> list[Placement]:
        """Return the options left for parameter `name`. Raises `PlanError` if none is.

        A dimension alone stands for any segments of it.
        """
        fixed = self.fixed(name)
        if fixed is None:
            return options
        any_segments = fixed.is_shard and not fixed.segments
        left = [p for p in options if p == fixed or (any_segments and p.dim == fixed.dim)]
        if not left:
            raise PlanError(
                f"{self.name}: {name} cannot be {fixed}; by the rules of the ops that use it, "
                f"it can be one of {options}"
            )
        return left


def allowed(
    program: Program,
    node: fx.Node,
    source: Placement,
    target: Placement,
    size: int,
    restrictions: Restrictions,
    is_activation: bool,
) -> bool:
    """Whether the value of `node` may be taken from `source` to `target`.

    `is_activation`: whether it is computed from weights; the restrictions speak of activations.
    """
    if source == target:
        return True
    if is_tuple(node):
        return False  # its items can be moved
    shape = tuple(node.meta["val"].shape)
    if (source.kind, target.kind) not in TRANSITIONS or not target.divides(shape, size):
        return False
    is_float = node.meta["val"].is_floating_point()
    if node.op == "get_attr" and program.variables[str(node.target)].is_parameter:
        return not source.is_shard and not target.is_shard  # at rest as the first user needs it
    is_rows = target.dim == 0 and not target.segments and not restrictions.rows
    if is_rows and len(shape) > (2 if is_float else 1):
        return False  # dimension 0 is the micro-batch
    if len(shape) < 2 or not is_activation:
        return True
    if restrictions.sequence_parallel is False:
        return source.is_shard or not target.is_shard
    tokens = token_dims(shape, size)
    if restrictions.sequence_parallel and tokens:
        return target.dim in tokens or (target.kind == "R" and source.dim in tokens)
    return True


def token_dims(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return the dimensions of an activation that may be sharded over tokens.

    They lie between the micro-batch and the features; a matrix has its rows only.
    """
    dims = range(1, len(shape) - 1) if len(shape) > 2 else range(len(shape) - 1)
    return tuple(dim for dim in dims if S(dim).divides(shape, size))


def transition_time(
    node: fx.Node,
    source: Placement,
    target: Placement,
    size: int,
    hardware: Hardware,
    has_gradient: bool,
) -> float:
    """Return the seconds of taking a value from `source` to `target`, and its gradient back."""
    if source == target:
        return 0.0
    val = node.meta["val"]
    num_bytes = val.numel() * (ELEMENT_BYTES if val.is_floating_point() else val.element_size())
    if (source.kind, target.kind) in ROUTES:
        is_sent = (source.kind, target.kind) in SENT
        return TIE + (1 + has_gradient) * _route_time(is_sent, num_bytes, size, hardware)
    _, forward, backward = TRANSITIONS[source.kind, target.kind]
    moves = (forward, backward) if has_gradient else (forward,)
    dims = [p.dim for p in (source, target) if p.is_shard]
    return TIE + sum(_move_time(move, num_bytes, dims, size, hardware) for move in moves)


def _route_time(is_sent: bool, num_bytes: float, size: int, hardware: Hardware) -> float:
    """Return the seconds of moving rows of experts one way, even shares assumed: see `ROUTES`."""
    copied = num_bytes / size / hardware.usable_bandwidth + hardware.kernel_overhead_s
    sent = collective_time("all_to_all", num_bytes, size, hardware) if is_sent else 0.0
    return copied + sent


def _move_time(
    move: Move, num_bytes: float, dims: list[int], size: int, hardware: Hardware
) -> float:
    if move not in WIRE:
        local = move.__name__ != "_identity"
        return local * (num_bytes / hardware.usable_bandwidth + hardware.kernel_overhead_s)
    seconds = collective_time(WIRE[move], num_bytes, size, hardware)
    if any(dims):  # shards of an inner dimension are not contiguous in the gathered tensor
        seconds += 2 * num_bytes / hardware.usable_bandwidth
    return seconds
