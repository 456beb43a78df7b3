"""A mixture of experts in place of an MLP, as InternEvo's GShard and Dropless layers compute it.

No row is ever padded: a choice beyond an expert's capacity is computed and weighs 0, which gives
the numbers of a layer that leaves it out.

Shapes in this file: x (T tokens, H hidden); choices, weights (T, K choices of a token); E experts.
"""

import math
import struct

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile.kernels.grouped_product import grouped_product
from ilm_compile.models.blocks import MLP
from ilm_compile.models.decoder_config import DecoderConfig
from ilm_compile.models.norm import LOW_PRECISION


class Experts(nn.Module):
    """w2(silu(w1 x) * w3 x) with the matrices of the experts that each row chose."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, ffn_hidden_size, hidden_size))

    def forward(self, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """The sum over each token's experts, weighted: (T, H)."""
        num_experts = len(self.w1)
        chosen, order = choices.flatten().sort()
        counts = torch.histc(chosen.float(), bins=num_experts, min=0, max=num_experts - 1)
        ends = counts.cumsum(0).to(torch.int32)
        rows = x[order // choices.shape[1]]
        inner = F.silu(grouped_product(rows, self.w1, ends)) * grouped_product(rows, self.w3, ends)
        out = grouped_product(inner, self.w2, ends) * weights.flatten()[order].unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return out[back].view(*choices.shape, -1).sum(1)


class Router(nn.Module):
    """The experts of each token with their weights, and what the balance loss is made of."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.wg = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choices and weights (T, K), and the balance: see `balance_loss`."""
        config = self.config
        logits = self.wg(x)
        if logits.dtype in LOW_PRECISION:
            logits = logits.float()
        scores = logits.softmax(-1)
        weights, choices = scores.topk(config.top_k, dim=-1)
        chosen = F.one_hot(choices, config.num_experts)
        if config.capacity_factor:
            weights = weights * _within(chosen, capacity(config, len(x)))
        if config.normalize_experts:
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.clamp(min=torch.finfo(total.dtype).eps)
        share = chosen.to(scores.dtype).mean(0)
        if config.balance == "layers":
            balance = torch.cat((share, scores.mean(0, keepdim=True)))
        else:
            counted = share[0] if config.balance == "first" else share.mean(0)
            balance = config.num_experts * (counted * scores.mean(0)).sum()
        return choices, weights.to(x.dtype), balance


class MixtureOfExperts(nn.Module):
    """Experts by a router, and shared ones that every token has.

    shared_gate: "softmax" weighs both outputs, "sigmoid" that of the shared experts alone.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.shared_gate = config.shared_gate if config.num_shared_experts else ""
        self.gate = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.ffn_hidden_size)
        if self.shared_gate:
            is_softmax = self.shared_gate == "softmax"
            self.residual_mlp = MLP(config.hidden_size, config.shared_hidden_size)
            self.coefficient = nn.Linear(config.hidden_size, 1 + is_softmax, bias=is_softmax)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output for x (batch, seq, hidden), and the balance."""
        tokens = x.flatten(0, 1)
        choices, weights, balance = self.gate(tokens)
        out: Tensor = self.experts(tokens, choices, weights).view_as(x)
        if self.shared_gate == "softmax":
            parts = self.coefficient(x).softmax(-1)
            out = out * parts[..., :1] + self.residual_mlp(x) * parts[..., 1:]
        elif self.shared_gate:
            out = out + self.coefficient(x).sigmoid() * self.residual_mlp(x)
        return out, balance


def balance_loss(config: DecoderConfig, total: Tensor, num_layers: int) -> Tensor:
    """The load balancing loss, from the sum of what the layers' routers gave.

    With f the share of tokens that chose an expert and p its mean score, it is E * sum(f p), in
    every layer, f counting the "first" choice of a token or the mean of "all" (GShard,
    arXiv:2006.16668, section 2.2); or, of "layers", with f and p over all layers and a sum over
    choices. In the last case total is (K + 1, E): f of each choice, then p; otherwise a number.
    """
    if config.balance != "layers":
        return total
    shares = total / num_layers
    return config.num_experts * (shares[:-1] * shares[-1:]).sum()


def capacity(config: DecoderConfig, num_tokens: int) -> int:
    """Choices that an expert takes: ceil(T / E * K * factor), rounded in float32 as InternEvo."""
    factor = _float32(config.capacity_factor * config.top_k)
    share = _float32(_float32(num_tokens / config.num_experts) * factor)
    return max(math.ceil(share), config.min_capacity)


def _within(chosen: Tensor, capacity: int) -> Tensor:
    """Whether each choice is among the first `capacity` of its expert: (T, K).

    chosen: (T, K, E), one 1 in the last dim. All first choices come before all second ones, and
    among them the tokens in their order.
    """
    tokens, top_k, num_experts = chosen.shape
    in_order = chosen.transpose(0, 1).reshape(-1, num_experts)
    place = (in_order.cumsum(0) * in_order).sum(-1)
    return (place <= capacity).view(top_k, tokens).t()


def _float32(number: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded
