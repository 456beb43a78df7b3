"""What a model's cost follows from: the sizes of a decoder, and the plan of a step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil
from typing import NamedTuple

from ilm_compile.errors import PlanError

VEE = ("zb_v", "v_half", "v_min", "dualpipe_v")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """The sizes of a decoder-only language model.

    ffn_matrices: 3 for a gated feed-forward block (SwiGLU), 2 for a plain one. experts: how many of
    those blocks a layer has, of which each token uses `top_k`; 1 and 1 for a dense model. head_dim:
    0 where a head has its share of `hidden`.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    ffn_matrices: int = 3
    experts: int = 1
    top_k: int = 1
    head_dim: int = 0
    tied: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "a model")
        if self.heads % self.kv_heads:
            raise PlanError(
                f"cost: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}"
            )

    @property
    def width(self) -> int:
        """The columns of all query heads."""
        return self.heads * self.head_dim if self.head_dim else self.hidden

    @property
    def qkv(self) -> int:
        """The columns of the query, key and value products together."""
        return self.width + 2 * self.width * self.kv_heads // self.heads

    @property
    def attention_parameters(self) -> int:
        """Of one layer: its attention and its two norms."""
        return self.hidden * (self.qkv + self.width + 2)

    @property
    def expert_parameters(self) -> int:
        """Of one layer: all its feed-forward blocks."""
        return self.experts * self.ffn_matrices * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        return self.attention_parameters + self.expert_parameters

    @property
    def vocabulary_parameters(self) -> int:
        """Of the embedding; a head that is not tied to it has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        ends = self.vocabulary_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + ends

    def token_flops(self, seq: int) -> float:
        """FLOPs of one token, forward and backward, at a context of `seq`, nothing computed twice.

        Causal attention counts half, as in `ilm_compile.cost.flops`. Over the time of a step this
        is what MFU is made of.
        """
        used = self.top_k * self.ffn_matrices * self.hidden * self.ffn
        weights = self.layers * (self.hidden * (self.qkv + self.width) + used)
        attention = self.layers * self.width * seq
        return 6.0 * (weights + self.vocabulary_parameters + attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """How one step of training is divided.

    micro_batch: sequences of `seq` tokens on one data-parallel rank at a time. zero: 0 nothing is
    sharded over dp, 1 the optimizer's state, 2 gradients too, 3 parameters too (FSDP); among
    `zero_group` ranks, all of dp if 0. recompute: "none", "selective" (attention's scores; where
    attention is fused, what the software says), "full", in `recompute_share` of the layers; or
    "auto": in part and whole in as many layers of each pipeline rank as `mixes` says.
    """

    seq: int
    micro_batch: float
    num_microbatches: float
    tp: int = 1
    cp: int = 1
    ep: int = 1
    pp: int = 1
    dp: int = 1
    chunks: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    recompute_share: float = 1.0
    mixes: tuple[tuple[int, int], ...] = ()
    zero: int = 1
    zero_group: int = 0
    sequence_parallel: bool = False
    precision: str = "bf16"

    @property
    def gpus(self) -> int:
        """The devices of the plan; the experts of ep are divided among ranks of dp."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def turns(self) -> bool:
        """Whether the stages go down the ranks and up again, the last one on the first rank."""
        return self.schedule in VEE

    @property
    def tokens(self) -> float:
        """The tokens of a micro-batch on one rank of dp and cp."""
        return self.micro_batch * self.seq / self.cp


def rank_layers(plan: StepPlan, layers: int) -> list[int]:
    """Return how many layers each pipeline rank has."""
    held = stage_layers(layers, plan.pp)
    ranks = [held.first, *[held.middle] * (plan.pp - 2), held.last][: plan.pp]
    if plan.turns and plan.pp > 1:  # both ends on the first
        ranks[0], ranks[-1] = held.first + held.last - held.middle, held.middle
    return ranks


def recomputed_layers(plan: StepPlan, layers: int) -> list[tuple[float, float]]:
    """Return how many layers of each pipeline rank are recomputed in part, and how many whole."""
    if plan.recompute == "auto":
        return list(plan.mixes)
    share = {"none": (0.0, 0.0), "selective": (1.0, 0.0), "full": (0.0, 1.0)}[plan.recompute]
    part, whole = (plan.recompute_share * each for each in share)
    return [(part * count, whole * count) for count in rank_layers(plan, layers)]


class StageLayers(NamedTuple):
    """The layers of the first rank, of the last, and of each between them."""

    first: int
    middle: int
    last: int


def stage_layers(layers: int, pp: int) -> StageLayers:
    """Return the layers per rank: equal, or one fewer at both ends, else the last has the rest."""
    if layers % pp == 0:
        return StageLayers(layers // pp, layers // pp, layers // pp)
    if (layers + 2) % pp == 0:
        middle = (layers + 2) // pp
        return StageLayers(middle - 1, middle, middle - 1)
    middle = ceil(layers / pp)
    return StageLayers(middle, middle, max(0, layers - middle * (pp - 1)))


def _check_positive(sizes: ModelSizes, what: str) -> None:
    for field in fields(sizes):
        value = getattr(sizes, field.name)
        if value < (0 if field.name in ("tied", "head_dim") else 1):
            raise PlanError(f"cost: {field.name}={value} of {what}; expected at least 1")
