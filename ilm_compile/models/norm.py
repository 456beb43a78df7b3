"""RMSNorm, one `aten.rms_norm` in a traced graph."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
