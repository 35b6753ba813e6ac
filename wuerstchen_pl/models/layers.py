"""Blocks shared by the denoisers of Stage B and Stage C.

Re-implementation of the published networks (dome272/Wuerstchen, MIT license), which consist of
ConvNeXt V2 blocks (Woo et al. 2023, arXiv 2301.00808), scale-and-shift time conditioning and
joint attention to the pixels and the condition. They differ in layout, not in values: tensors stay
channels-last inside a network, the three projections of attention are one matrix product, and the
response norm is one scale and shift.

Dimensions: B batch, C channels, H and W height and width, L tokens, D width of the condition.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.models.conditioning import BlockInputs, CachedConditioning, tile_batch
from wuerstchen_pl.models.grn import GeluGRN
from wuerstchen_pl.models.qkv import FusedQKV, SplitQKV

LAYER_NORM_EPS = 1e-6


def time_embedding(t: Tensor, dim: int, max_positions: int = 10_000) -> Tensor:
    """Sinusoidal embedding of ``t * max_positions`` in float32.

    Args:
        t: (B,) diffusion time in [0, 1].
        dim: even number of channels; the first half are sines, the second cosines.
        max_positions: factor of ``t``, and ratio of the highest to the lowest frequency.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    decay = math.log(max_positions) / (half - 1)
    frequencies = torch.arange(half, device=t.device, dtype=torch.float32).mul(-decay).exp()
    angles = (t.float() * max_positions)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def xavier_init(module: nn.Module) -> None:
    """Xavier weights and zero bias for a linear or convolution layer; for ``Module.apply``."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, H, W), without learned parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)
        # CUDA's autocast would keep a float32 copy of a bfloat16 input for the backward pass, for
        # nothing: the kernel computes in float32 in any case, and linear layers round its output
        off = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with off:
            return F.layer_norm(x, (self.channels,), eps=LAYER_NORM_EPS).permute(0, 3, 1, 2)


def downsamplers(widths: Sequence[int]) -> nn.ModuleList:
    """Layers from each width (finest first) to the next, at half the resolution."""
    return nn.ModuleList(
        nn.Sequential(LayerNorm2d(fine), nn.Conv2d(fine, coarse, 2, stride=2))
        for fine, coarse in pairwise(widths)
    )


def upsamplers(widths: Sequence[int]) -> nn.ModuleList:
    """Layers from each width, in reverse order, to the one before, at twice the resolution."""
    return nn.ModuleList(
        nn.Sequential(LayerNorm2d(coarse), nn.ConvTranspose2d(coarse, fine, 2, stride=2))
        for coarse, fine in pairwise(reversed(widths))
    )


class ResBlock(nn.Module):
    """ConvNeXt V2 block: depthwise 3x3, norm, MLP with global response norm; residual.

    Args:
        channels: C.
        skip_channels: channels concatenated before the MLP (0 for none).
        semantic_channels: channels of semantic latents, concatenated after those (0 for none).
        dropout: probability inside the MLP.
    """

    def __init__(
        self,
        channels: int,
        *,
        skip_channels: int = 0,
        semantic_channels: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.main_channels = channels + skip_channels
        self.expand = nn.Linear(self.main_channels + semantic_channels, channels * 4)
        self.grn = GeluGRN(channels * 4)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(channels * 4, channels)

    def semantic_proj(self, semantic: Tensor) -> Tensor:
        """Term W_e e + b of W [x; e] + b: (B, semantic_channels, H, W) -> (B, H, W, 4C)."""
        weight = self.expand.weight[:, self.main_channels :]
        return F.linear(semantic.permute(0, 2, 3, 1), weight, self.expand.bias)

    def forward(
        self, x: Tensor, skip: Tensor | None = None, semantic_proj: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W), (B, skip_channels, H, W), projected latents -> (B, C, H, W)."""
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, tile_batch(skip.to(h.dtype), h)], dim=1)
        h = h.permute(0, 2, 3, 1)
        if semantic_proj is None:
            h = self.expand(h)
        else:
            h = (
                tile_batch(F.linear(h, self.expand.weight[:, : self.main_channels]), semantic_proj)
                + semantic_proj
            )
        h = self.project(self.dropout(self.grn(h)))
        return tile_batch(x, h) + h.permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """Scale and shift of every channel by the time embedding."""

    def __init__(self, channels: int, time_dim: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(time_dim, channels * 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(B, C, H, W) and ``mapper`` of the time embedding, (B or 1, 2C) -> (B, C, H, W)."""
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves and to the tokens of a condition."""

    def __init__(self, channels: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide the width {channels}; use a divisor"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv: FusedQKV | SplitQKV = FusedQKV(channels)
        self.out = nn.Linear(channels, channels)

    def project_kv(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) condition -> its keys and values, (B, heads, L, C / heads) each."""
        keys, values = self.qkv.keys_values(cond).split(cond.shape[-1], dim=-1)
        return self._heads(keys), self._heads(values)

    def forward(self, x: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """(B, N, C) tokens, and the condition's keys and values or None -> (B, N, C)."""
        q, k, v = (self._heads(h) for h in self.qkv(x).split(x.shape[-1], dim=-1))
        if keys is not None and values is not None:
            k, v = torch.cat([k, keys.to(k)], dim=2), torch.cat([v, values.to(v)], dim=2)
        return self.out(self._attend(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if q.device.type != "cpu" or not torch.is_grad_enabled():
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        # Backward on a Zen 4 CPU took 27 ms in bfloat16 and 4 ms in float32 at the tiny preset's
        # shapes (64 x 6 heads x 36 queries); at 576 queries both took 44 ms. The forward pass is
        # faster in bfloat16: on a Xeon with AMX, 1.2 instead of 2.2 ms.
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), dropout_p=dropout
            )
        return attended.to(q.dtype)


class AttentionBlock(nn.Module):
    """Residual attention of the pixels to themselves and to the condition."""

    def __init__(
        self, channels: int, cond_dim: int | None, num_heads: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.attention = Attention(channels, num_heads, dropout=dropout)
        self.cond_mapper = nn.Linear(cond_dim, channels) if cond_dim is not None else None

    def project_kv(self, cond: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(B, L, cond_dim) -> keys and values of the condition; (None, None) without one."""
        if cond is None or self.cond_mapper is None:
            return None, None
        return self.attention.project_kv(self.cond_mapper(F.silu(cond)))

    def forward(self, x: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """(B, C, H, W), and the condition's keys and values or None -> (B, C, H, W)."""
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        h = self.attention(tokens, keys, values).unflatten(1, x.shape[-2:])
        return x + h.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual block, time conditioning, and attention if ``num_heads`` is set.

    It is the unit of activation checkpointing and of sharding: in training, only its forward pass
    uses its weights.
    """

    def __init__(
        self,
        channels: int,
        *,
        time_dim: int,
        cond_dim: int | None = None,
        num_heads: int | None = None,
        skip_channels: int = 0,
        semantic_channels: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.res = ResBlock(
            channels,
            skip_channels=skip_channels,
            semantic_channels=semantic_channels,
            dropout=dropout,
        )
        self.time = TimestepBlock(channels, time_dim)
        self.attn = (
            AttentionBlock(channels, cond_dim, num_heads, dropout=dropout) if num_heads else None
        )

    def cache_conditioning(self, inputs: BlockInputs) -> CachedConditioning:
        """Everything in the block that does not depend on the latents, computed once."""
        keys, values = self.attn.project_kv(inputs.cond) if self.attn else (None, None)
        semantic_proj = None if inputs.semantic is None else self.res.semantic_proj(inputs.semantic)
        modulation = self.time.mapper(inputs.time.to(self.time.mapper.weight.dtype))
        return CachedConditioning(modulation, keys, values, semantic_proj, inputs.residual)

    def forward(
        self,
        x: Tensor,
        conditioning: BlockInputs | CachedConditioning,
        skip: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W), and raw or cached conditioning -> (B, C, H, W)."""
        cached = (
            conditioning
            if isinstance(conditioning, CachedConditioning)
            else self.cache_conditioning(conditioning)
        )
        if cached.residual is not None:
            x = x + tile_batch(cached.residual.to(x.dtype), x)
        x = self.time(self.res(x, skip, cached.semantic_proj), cached.modulation)
        if self.attn is None:
            return x
        return self.attn(tile_batch(x, cached.keys), cached.keys, cached.values)

    def scale_residual(self, depth: int) -> None:
        """Initialize so that ``depth`` blocks add a variance of one and time has no effect."""
        with torch.no_grad():
            self.res.project.weight.mul_(math.sqrt(1 / depth))
        nn.init.zeros_(self.time.mapper.weight)
