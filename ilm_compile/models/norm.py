"""RMSNorm and LayerNorm, one `aten.rms_norm` or `aten.layer_norm` in a traced graph."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile.models.config import ModelConfig

LOW_PRECISION = (torch.bfloat16, torch.float16)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv:1910.07467).

    With `fp32`, a bf16 or fp16 input is normalised and scaled in float32 and rounded once, at the
    end, and the weight may be kept in float32. The output has the dtype of the input.
    """

    def __init__(self, size: int, *, eps: float, fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.fp32 = fp32

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fp32 and x.dtype in LOW_PRECISION):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return y.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dim (arXiv:1607.06450).

    fp32: as that of `RMSNorm`.
    """

    def __init__(self, size: int, *, eps: float, fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.fp32 = fp32

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if not (self.fp32 and x.dtype in LOW_PRECISION):
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), shape, weight, bias, self.eps).to(x.dtype)


_KINDS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """A norm over the hidden size, or `size`, of the kind that the config names."""
    kind = _KINDS[config.norm_type]
    return kind(size or config.hidden_size, eps=config.layer_norm_epsilon, fp32=config.norm_fp32)
