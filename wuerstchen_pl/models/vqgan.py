"""Stage A: the f4 VQGAN between pixels and latents.

Wuerstchen (arXiv 2306.00637), section 3.1 and appendix E; published as ``VQModel`` in
dome272/Wuerstchen (MIT), weights ``vqgan_f4_v1_500k.pt``. Stage B models the latents *before*
quantization; the codebook regularizes them while Stage A trains.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.distributed.sync_batchnorm import SyncBatchNorm2d, global_std
from wuerstchen_pl.models.layers import LayerNorm2d, xavier_init


class QuantizerOutput(NamedTuple):
    """Quantized latents, their code indices and the two losses of the codebook."""

    latents: Tensor  # (B, C, H, W) nearest codes, with a straight-through gradient
    indices: Tensor  # (B, H, W) int64
    codebook_loss: Tensor  # scalar: moves codes toward latents
    commitment_loss: Tensor  # scalar: moves latents toward codes


class VectorQuantizer(nn.Module):
    """Nearest-neighbor codebook (van den Oord et al. 2017, arXiv 1711.00937, Eq. 1-3)."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(size, channels)
        nn.init.uniform_(self.codebook.weight, -1 / size, 1 / size)

    def indices(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W) int64 index of the nearest code, ties to the lowest."""
        codes = self.codebook.weight.float()
        flat = latents.detach().permute(0, 2, 3, 1).flatten(0, 2).float()
        # autocast would compute the product in bfloat16, too coarse to tell near codes apart
        with torch.autocast(flat.device.type, enabled=False):
            # |x - c|^2 without |x|^2, which does not affect the argmin
            distance = torch.addmm(codes.square().sum(dim=1), flat, codes.t(), alpha=-2)
        return distance.argmin(dim=1).view(latents.shape[0], *latents.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, H, W) int64 -> (B, C, H, W)."""
        return self.codebook(indices).permute(0, 3, 1, 2)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """(B, C, H, W) -> the nearest codes and the two losses."""
        latents = latents.float()
        indices = self.indices(latents)
        codes = self.lookup(indices)
        return QuantizerOutput(
            latents=latents + (codes - latents).detach(),
            indices=indices,
            codebook_loss=F.mse_loss(codes, latents.detach()),
            commitment_loss=F.mse_loss(latents, codes.detach()),
        )


def codebook_usage(uses: Tensor) -> tuple[Tensor, Tensor]:
    """Perplexity and number of unused codes of a codebook.

    Args:
        uses: (K,) number of times each code was chosen.

    Returns:
        The perplexity exp(entropy) in [1, K], and the number of codes that were never chosen.
    """
    share = uses / uses.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp(), (uses == 0).sum().float()


ROWS, ROWS_ON_CPU = 2**16, 2**11
"""Positions per chunk: their 4x expanded channels fill a GPU, or fit a CPU's cache."""


class ScaledResBlock(nn.Module):
    """Depthwise 3x3 and MLP, each with scalar scale, shift and gate that start at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels)  # padded in forward
        self.expand = nn.Linear(channels, channels * 4)
        self.project = nn.Linear(channels * 4, channels)
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.gammas
        spatial = fold_affine(self.depthwise, scale1, shift1, gate1)
        padded = F.pad(self.norm(x), (1, 1, 1, 1), mode="replicate")
        x = x + F.conv2d(padded, *spatial, groups=x.shape[1])
        first = fold_affine(self.expand, scale2, shift2)
        second = fold_affine(self.project, gate=gate2)

        def mlp(rows: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(rows, *first)), *second)

        return x + map_in_chunks(mlp, self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fold_affine(
    layer: nn.Linear | nn.Conv2d, scale: Tensor | float = 0.0, shift: Tensor | float = 0.0,
    gate: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight and bias that map x to ``gate * layer(x * (1 + scale) + shift)``."""
    assert layer.bias is not None
    bias = layer.bias + shift * layer.weight.flatten(1).sum(dim=1)
    return layer.weight * ((1 + scale) * gate), bias * gate


def map_in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of rows, (N, C) -> (N, C), to (B, H, W, C).

    Without gradients, rows are processed in chunks, which saves most of the memory.
    """
    if torch.is_grad_enabled():
        return function(x)
    rows = x.reshape(-1, x.shape[-1])
    chunks = rows.split(ROWS_ON_CPU if x.device.type == "cpu" else ROWS)
    return torch.cat([function(chunk) for chunk in chunks]).view(x.shape)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder; downsamples by 2 ** levels along each side.

    Args:
        levels: number of resolutions; 2 for the published f4.
        bottleneck_blocks: blocks of the decoder's coarsest level.
        width: channels at the coarsest level; halved at each finer one.
        latent_channels: C of the latents.
        codebook_size: number of codes.
        scale_factor: standard deviation of the encoder's output, by which latents are divided, so
            that Stage B's have unit variance. v2: 0.3764. None: measured while Stage A trains and
            kept in a buffer.
    """

    scale_factor: Tensor

    def __init__(
        self,
        *,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        width: int = 384,
        latent_channels: int = 4,
        codebook_size: int = 8192,
        scale_factor: float | None = None,
    ) -> None:
        super().__init__()
        widths = [width // 2**i for i in reversed(range(levels))]  # finest first
        self.latent_channels = latent_channels
        self.factor = 2**levels
        self.measure_scale = scale_factor is None
        self.register_buffer("scale_factor", torch.tensor(scale_factor or 1.0))

        self.stem = nn.Conv2d(3 * 4, widths[0], 1)
        self.encoder = nn.Sequential()
        for i, channels in enumerate(widths):
            if i > 0:
                self.encoder.add_module(
                    f"downsample{i}", nn.Conv2d(widths[i - 1], channels, 4, stride=2, padding=1)
                )
            self.encoder.add_module(f"block{i}", ScaledResBlock(channels))
        self.to_latent = nn.Conv2d(widths[-1], latent_channels, 1, bias=False)
        self.latent_norm = SyncBatchNorm2d(latent_channels)

        self.quantizer = VectorQuantizer(codebook_size, latent_channels)

        self.from_latent = nn.Conv2d(latent_channels, widths[-1], 1)
        self.decoder = nn.Sequential()
        for i in reversed(range(levels)):
            for j in range(bottleneck_blocks if i == levels - 1 else 1):
                self.decoder.add_module(f"block{i}_{j}", ScaledResBlock(widths[i]))
            if i > 0:
                self.decoder.add_module(
                    f"upsample{i}",
                    nn.ConvTranspose2d(widths[i], widths[i - 1], 4, stride=2, padding=1),
                )
        self.head = nn.Conv2d(widths[0], 3 * 4, 1)
        for block in self.modules():
            if isinstance(block, ScaledResBlock):
                block.apply(xavier_init)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H/f, W/f) unquantized latents of unit variance."""
        return self.features(images) / self.scale_factor

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H/f, W/f) encoder output, in the codebook's scale."""
        x = F.pixel_unshuffle(images.to(self.stem.weight.dtype), 2)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.latent_norm(self.to_latent(self.encoder(self.stem(x))).float())
        if self.training and self.measure_scale:
            with torch.no_grad():
                self.scale_factor.lerp_(global_std(x), 0.01)
        return x

    def nearest_tokens(self, probabilities: Tensor) -> Tensor:
        """(B, K, h, w) probabilities of the codes -> (B, h, w) index nearest to the mean code."""
        codes = self.quantizer.codebook.weight
        return self.quantizer.indices(torch.einsum("bkhw,kc->bchw", probabilities.to(codes), codes))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents of unit variance -> (B, 3, h f, w f), not clamped."""
        return self.decode_features(latents * self.scale_factor)

    def decode_features(self, features: Tensor) -> Tensor:
        """(B, C, h, w) in the codebook's scale -> (B, 3, h f, w f), not clamped."""
        x = features.to(self.from_latent.weight.dtype)
        x = self.from_latent(x.contiguous(memory_format=torch.channels_last))
        return F.pixel_shuffle(self.head(self.decoder(x)), 2).float()
