"""Stage B's denoiser: noised Stage A latents and semantic latents -> the noise in the former.

Wuerstchen (arXiv 2306.00637), section 3.2; published as ``DiffNeXt`` in dome272/Wuerstchen (MIT).
A U-Net: each level resizes the semantic latents to its resolution and feeds them to every block.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.models.conditioning import (
    BlockInputs,
    CachedConditioning,
    cache_conditioning,
    tile_batch,
)
from wuerstchen_pl.models.layers import (
    Block,
    LayerNorm2d,
    downsamplers,
    time_embedding,
    upsamplers,
    xavier_init,
)
from wuerstchen_pl.models.pretrained import Pretrained


def match_size(semantic: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) semantic latents -> (B, C, *size), bicubic with antialiasing, float32."""
    return F.interpolate(
        semantic.float(), size=size, mode="bicubic", antialias=True, align_corners=True
    )


class UNetLevel(nn.Module):
    """The blocks of one resolution on one side of the U.

    Args:
        channels: C of this level.
        num_blocks: number of blocks.
        num_heads: attention heads; None for no attention.
        semantic_channels: channels of the semantic latents.
        semantic_dim: channels of the mapped semantic latents; None if the level ignores them.
        skip_dim: channels that the first block gets from the other side of the U.
        time_dim: channels of the time embedding.
        text_dim: D of the mapped text embeddings; None without text.
        dropout: probability in blocks and attention.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_blocks: int,
        num_heads: int | None,
        semantic_channels: int,
        semantic_dim: int | None,
        skip_dim: int,
        time_dim: int,
        text_dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.semantic_mapper = (
            nn.Conv2d(semantic_channels, semantic_dim, 1) if semantic_dim is not None else None
        )
        self.blocks = nn.ModuleList(
            Block(
                channels,
                time_dim=time_dim,
                cond_dim=text_dim,
                num_heads=num_heads,
                skip_channels=skip_dim if j == 0 else 0,
                semantic_channels=semantic_dim or 0,
                dropout=dropout,
            )
            for j in range(num_blocks)
        )

    def inputs(
        self, time: Tensor, semantic: Tensor | None, text: Tensor | None, size: tuple[int, int]
    ) -> list[BlockInputs]:
        """Inputs of each block; the semantic latents are resized to ``size``, the level's."""
        mapped = None
        if self.semantic_mapper is not None and semantic is not None:
            resized = match_size(semantic, size).to(self.semantic_mapper.weight.dtype)
            mapped = self.semantic_mapper(resized.contiguous(memory_format=torch.channels_last))
        return [BlockInputs(time, text, mapped)] * len(self.blocks)

    def forward(
        self,
        x: Tensor,
        conditioning: Iterator[BlockInputs | CachedConditioning],
        skip: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); ``skip`` (B, skip_dim, H, W) enters the first block."""
        for j, block in enumerate(self.blocks):
            x = block(x, next(conditioning), skip if j == 0 else None)
        return x


class DiffNeXt(Pretrained):
    """eps_hat = (x_t - a) / b, b = sigmoid(.) (1 - 2e) + e with e = 1e-3.

    Args:
        latent_channels: channels of Stage A's latents.
        semantic_channels: channels of the semantic latents.
        patch_size: pixel-unshuffle factor, applied to the latents first.
        widths: channels per level, finest first.
        num_blocks: blocks per level, on the way down.
        num_up_blocks: blocks per level on the way up, finest first; None for ``num_blocks``.
        num_heads: attention heads per level; None for a level without attention.
        inject_semantic: per level, whether its blocks get the semantic latents.
        cond_dim: channels of the mapped semantic latents and text.
        text_dim: D of the text embeddings, or None for a Stage B without text (the paper found that
            text does not improve it, section 3.2).
        time_dim: channels of the time embedding.
        dropout: probability in blocks and attention.

    Raises:
        ValueError: if the per-level lists differ in length.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        semantic_channels: int = 16,
        patch_size: int = 2,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        num_up_blocks: Sequence[int] | None = None,
        num_heads: Sequence[int | None],
        inject_semantic: Sequence[bool],
        cond_dim: int,
        text_dim: int | None = None,
        time_dim: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        up_blocks = num_blocks if num_up_blocks is None else num_up_blocks
        per_level = (widths, num_blocks, up_blocks, num_heads, inject_semantic)
        lengths = {len(each) for each in per_level}
        if len(lengths) != 1:
            raise ValueError(
                "widths, num_blocks, num_up_blocks, num_heads and inject_semantic have "
                f"{', '.join(str(len(each)) for each in per_level)} entries; give one of each per "
                "level"
            )
        self.latent_channels, self.semantic_channels = latent_channels, semantic_channels
        self.text_dim, self.time_dim, self.patch_size = text_dim, time_dim, patch_size
        self.text_mapper = nn.Linear(text_dim, cond_dim) if text_dim is not None else None
        self.cond_dim = cond_dim

        self.stem = nn.Conv2d(latent_channels * patch_size**2, widths[0], 1)
        self.stem_norm = LayerNorm2d(widths[0])

        def level(i: int, blocks: int, skip_dim: int) -> UNetLevel:
            return UNetLevel(
                widths[i],
                num_blocks=blocks,
                num_heads=num_heads[i],
                semantic_channels=semantic_channels,
                semantic_dim=cond_dim if inject_semantic[i] else None,
                skip_dim=skip_dim,
                time_dim=time_dim,
                text_dim=cond_dim if text_dim is not None else None,
                dropout=dropout,
            )

        last = len(widths) - 1
        self.down = nn.ModuleList(level(i, num_blocks[i], 0) for i in range(last + 1))
        self.up = nn.ModuleList(
            level(i, up_blocks[i], widths[i] if i < last else 0) for i in reversed(range(last + 1))
        )
        self.downsample = downsamplers(widths)
        self.upsample = upsamplers(widths)
        self.norm = LayerNorm2d(widths[0])
        self.head = nn.Conv2d(widths[0], 2 * latent_channels * patch_size**2, 1)
        self._init_weights(sum(num_blocks))

    def _init_weights(self, depth: int) -> None:
        self.apply(xavier_init)
        if self.text_mapper is not None:
            nn.init.normal_(self.text_mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.stem.weight, gain=0.02)
        nn.init.zeros_(self.head.weight)
        for level in (*self.down, *self.up):
            if level.semantic_mapper is not None:
                # unit variance; with the published 0.02 the network learns late to use the latents
                channels = level.semantic_mapper.in_channels
                nn.init.normal_(level.semantic_mapper.weight, std=channels**-0.5)
            for block in level.blocks:
                block.scale_residual(depth)

    @property
    def size_multiple(self) -> int:
        """Height and width of the latents must be multiples of this."""
        return self.patch_size * 2 ** len(self.downsample)

    def inputs(
        self, t: Tensor, semantic: Tensor | None, text: Tensor | None, size: tuple[int, int]
    ) -> list[BlockInputs]:
        """Inputs of each block, in the order of the forward pass.

        Args:
            t: (B,) or (T,) times in [0, 1].
            semantic: (B, S, h, w) semantic latents of any resolution; None if no level uses them.
            text: (B, L, D) text embeddings, or None.
            size: (H, W) of the noised latents.
        """
        time = time_embedding(t, self.time_dim)
        if self.text_mapper is not None and text is not None:
            text = self.text_mapper(text.to(self.text_mapper.weight.dtype))
            text = F.layer_norm(text, (self.cond_dim,), eps=1e-6)
        folds = [self.patch_size * 2**i for i in range(len(self.down))]
        block_inputs: list[BlockInputs] = []
        for level, fold in zip([*self.down, *self.up], [*folds, *reversed(folds)], strict=True):
            resolution = (size[0] // fold, size[1] // fold)
            block_inputs += level.inputs(time, semantic, text, resolution)
        return block_inputs

    def cache_conditioning(
        self, times: Tensor, semantic: Tensor | None, text: Tensor | None, size: tuple[int, int]
    ) -> list[CachedConditioning]:
        """Every block's cached conditioning at (T,) upcoming times; see ``inputs``."""
        blocks = [block for level in (*self.down, *self.up) for block in level.blocks]
        return cache_conditioning(blocks, self.inputs(times, semantic, text, size))

    def heads(
        self, xt: Tensor, conditioning: Sequence[BlockInputs | CachedConditioning]
    ) -> tuple[Tensor, Tensor]:
        """The two heads a and b, (B, C, H, W) float32 each; see ``predict_noise``."""
        x = F.pixel_unshuffle(xt.to(self.stem.weight.dtype), self.patch_size)
        x = self.stem_norm(self.stem(x.contiguous(memory_format=torch.channels_last)))

        remaining = iter(conditioning)  # a level consumes one per block
        skips: list[Tensor | None] = []
        for i, level in enumerate(self.down):
            x = level(x, remaining)
            if i < len(self.downsample):
                skips.append(x)
                x = self.downsample[i](x)
        skips.append(None)  # the coarsest level has no skip
        for i, level in enumerate(self.up):
            x = level(x, remaining, skips.pop())
            if i < len(self.upsample):
                x = self.upsample[i](x)

        out = F.pixel_shuffle(self.head(self.norm(x)).float(), self.patch_size)
        a, b = out.chunk(2, dim=1)
        return a, b.sigmoid() * (1 - 2e-3) + 1e-3

    def predict_noise(
        self, xt: Tensor, conditioning: Sequence[BlockInputs | CachedConditioning]
    ) -> Tensor:
        """(B, C, H, W) noised latents, raw or cached conditioning per block -> the noise, float32.

        Conditions of k B rows give k predictions per sample, (k B, C, H, W).
        """
        a, b = self.heads(xt, conditioning)
        return (tile_batch(xt.float(), a) - a) / b

    def forward(
        self, xt: Tensor, t: Tensor, semantic: Tensor, text: Tensor | None = None
    ) -> Tensor:
        """Predict the noise.

        Args:
            xt: (B, C, H, W) noised Stage A latents.
            t: (B,) time in [0, 1], float32.
            semantic: (B, S, h, w) semantic latents of any resolution.
            text: (B, L, D) text embeddings; only if the network was built with ``text_dim``.

        Returns:
            (B, C, H, W) float32.
        """
        size = (xt.shape[-2], xt.shape[-1])
        return self.predict_noise(xt, self.inputs(t, semantic, text, size))
