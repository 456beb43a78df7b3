"""Like vit-pytorch: patches cut by reshapes, a class token, no vocabulary anywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.outside import HEADS, HIDDEN, LAYERS

IMAGE, PATCH, CHANNELS, CLASSES = 16, 4, 3, 10


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = (HIDDEN // HEADS) ** -0.5
        self.norm = nn.LayerNorm(HIDDEN)
        self.attend = nn.Softmax(dim=-1)
        self.to_qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.to_out = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv)
        attn = self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale)
        return self.to_out(torch.matmul(attn, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, 2 * HIDDEN),
            nn.GELU(),
            nn.Linear(2 * HIDDEN, HIDDEN),
        )


class ViT(nn.Module):
    """forward(img) returns class logits. pool: "cls" or "mean"."""

    def __init__(self, pool: str = "cls") -> None:
        super().__init__()
        self.pool = pool
        patches, dim = (IMAGE // PATCH) ** 2, CHANNELS * PATCH * PATCH
        self.to_patch = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, HIDDEN), nn.LayerNorm(HIDDEN)
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, HIDDEN))
        self.cls_token = nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.layers = nn.ModuleList(
            [nn.ModuleList([Attention(), FeedForward()]) for _ in range(LAYERS)]
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES))

    def forward(self, img: Tensor) -> Tensor:
        rows, side = img.shape[0], IMAGE // PATCH
        x = img.view(rows, CHANNELS, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1)
        x = self.to_patch(x.reshape(rows, side * side, -1))
        x = torch.cat((self.cls_token.expand(rows, -1, -1), x), dim=1)
        x = x + self.pos_embedding[:, : x.shape[1]]
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.mlp_head(x.mean(dim=1) if self.pool == "mean" else x[:, 0])
