"""Stage C's denoiser: text and noised semantic latents -> the noise in the latents.

Wuerstchen (arXiv 2306.00637), section 3.3 and appendix E; published as ``Prior`` in
dome272/Wuerstchen (MIT). No downsampling: a stack of identical blocks at the latents' resolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.models.conditioning import (
    BlockInputs,
    CachedConditioning,
    Residuals,
    cache_conditioning,
    tile_batch,
)
from wuerstchen_pl.models.layers import Block, LayerNorm2d, time_embedding, xavier_init
from wuerstchen_pl.models.pretrained import Pretrained

MAX_STUDENT_STEPS = 8
"""Most steps of sampling that a prior may be distilled for."""


class Prior(Pretrained):
    """eps_hat = (x_t - A) / (|1 - B| + 1e-5), where A, B are the two heads of the network.

    Args:
        latent_channels: channels of the semantic latents, 16 as published.
        width: channels of every block (paper 1280, v2 1536).
        depth: number of blocks (paper 16, v2 32).
        num_heads: attention heads (paper 16, v2 24).
        text_dim: D of the text embeddings (ViT-bigG-14 1280, ViT-H-14 1024).
        time_dim: channels of the time embedding.
        dropout: probability in blocks and attention.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        width: int,
        depth: int,
        num_heads: int,
        text_dim: int,
        time_dim: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.text_dim = text_dim
        self.time_dim = time_dim
        self.stem = nn.Conv2d(latent_channels, width, 1)
        self.text_in = nn.Linear(text_dim, width)
        self.text_out = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            Block(width, time_dim=time_dim, cond_dim=width, num_heads=num_heads, dropout=dropout)
            for _ in range(depth)
        )
        self.norm = LayerNorm2d(width)
        self.head = nn.Conv2d(width, latent_channels * 2, 1)
        self._init_weights(depth)

    def _init_weights(self, depth: int) -> None:
        self.apply(xavier_init)
        # The published std is 0.02. This one is close for the text layers of the published widths
        # (0.028 and 0.026 for v2) and larger in a narrow network; for the 16-channel stem it is
        # always 0.25.
        for layer in (self.stem, self.text_in, self.text_out):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.head.weight)
        for module in self.modules():
            if isinstance(module, Block):
                module.scale_residual(depth)

    def inputs(
        self, t: Tensor, text: Tensor, residuals: Residuals | None = None
    ) -> list[BlockInputs]:
        """The inputs of every block.

        Args:
            t: (B,) or (T,) times.
            text: (B, L, D) text embeddings.
            residuals: of a ControlNet.
        """
        mapped = self.text_in(text.to(self.text_in.weight.dtype))
        mapped = self.text_out(F.leaky_relu(mapped, 0.2))
        shared, residuals = BlockInputs(time_embedding(t, self.time_dim), mapped), residuals or {}
        return [shared._replace(residual=residuals.get(i)) for i in range(len(self.blocks))]

    def cache_conditioning(
        self, times: Tensor, text: Tensor, residuals: Residuals | None = None
    ) -> list[CachedConditioning]:
        """Every block's cached conditioning for (T,) times; see ``inputs``."""
        return cache_conditioning(self.blocks, self.inputs(times, text, residuals))

    def predict_noise(
        self, xt: Tensor, conditioning: Sequence[BlockInputs | CachedConditioning]
    ) -> Tensor:
        """(B, C, h, w) noised latents, raw or cached conditioning per block -> the noise, float32.

        Conditions of k B rows give k predictions per sample, (k B, C, h, w).
        """
        x = self.stem(xt.to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last))
        for block, inputs in zip(self.blocks, conditioning, strict=True):
            x = block(x, inputs)
        a, b = self.head(self.norm(x)).float().chunk(2, dim=1)
        return (tile_batch(xt.float(), a) - a) / ((1 - b).abs() + 1e-5)

    def forward(
        self, xt: Tensor, t: Tensor, text: Tensor, residuals: Residuals | None = None
    ) -> Tensor:
        """Predict the noise.

        Args:
            xt: (B, C, h, w) noised latents.
            t: (B,) time in [0, 1], float32.
            text: (B, L, D) text embeddings.
            residuals: of a ControlNet.

        Returns:
            (B, C, h, w) float32, as the division is inaccurate in half precision.
        """
        return self.predict_noise(xt, self.inputs(t, text, residuals))
