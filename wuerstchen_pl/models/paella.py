"""Stage B's network in version 1: noised Stage A tokens and two conditions -> the clean tokens.

Wuerstchen, first version (arXiv 2306.00637v1), whose Stage B is a Paella (Rampas et al. 2022, arXiv
2211.07292): it classifies tokens. Published as ``Paella`` in dome272/Wuerstchen (MIT).
Unlike in version 2 (``diffnext.py``), semantic latents are condition tokens like the text, without
positions, used by attention only; and a skip enters before the depthwise convolution, not after.

Dimensions: B batch, C channels, H and W height and width, K codebook entries, L condition tokens.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.models.grn import GeluGRN
from wuerstchen_pl.models.layers import (
    LAYER_NORM_EPS,
    AttentionBlock,
    LayerNorm2d,
    TimestepBlock,
    downsamplers,
    time_embedding,
    upsamplers,
    xavier_init,
)


class PaellaResBlock(nn.Module):
    """ConvNeXt V2 block whose depthwise convolution also reads a skip.

    Its C groups then read two channels each of [x, skip]: half of them of ``x``, half of the skip.
    """

    def __init__(self, channels: int, *, skip_channels: int, dropout: float) -> None:
        super().__init__()
        in_channels = channels + skip_channels
        self.depthwise = nn.Conv2d(in_channels, channels, 3, padding=1, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.expand = nn.Linear(channels, channels * 4)
        self.grn = GeluGRN(channels * 4)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(channels * 4, channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """(B, C, H, W) and (B, skip_channels, H, W) -> (B, C, H, W)."""
        inputs = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.expand(self.norm(self.depthwise(inputs)).permute(0, 2, 3, 1))
        return x + self.project(self.dropout(self.grn(h))).permute(0, 3, 1, 2)


class PaellaBlock(nn.Module):
    """Residual block, time conditioning, and attention if the level has heads."""

    def __init__(
        self, res: PaellaResBlock, time: TimestepBlock, attn: AttentionBlock | None
    ) -> None:
        super().__init__()
        self.res, self.time, self.attn = res, time, attn

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, skip: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, time_dim), (B, L, cond_dim), (B, C, H, W) -> (B, C, H, W)."""
        x = self.time(self.res(x, skip), self.time.mapper(time))
        return self.attn(x, *self.attn.project_kv(cond)) if self.attn is not None else x


class PaellaLevel(nn.Module):
    """The blocks of one resolution on one side of the U."""

    def __init__(self, blocks: Iterable[PaellaBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, skip: Tensor | None) -> Tensor:
        """As in ``PaellaBlock``; ``skip`` enters the first block."""
        for j, block in enumerate(self.blocks):
            x = block(x, time, cond, skip if j == 0 else None)
        return x


class Paella(nn.Module):
    """logits = W LN(U(LN(E[tokens]), t, cond)), cond = LN([semantic tokens, text tokens]).

    Args:
        codebook_size: K, entries of Stage A's codebook.
        token_dim: channels of an embedded token, on the way in and before the classifier.
        semantic_channels: channels of the semantic latents.
        patch_size: pixel-unshuffle factor, applied to the embedded tokens first.
        widths: channels per level, finest first.
        num_blocks: blocks per level, on each side of the U.
        num_heads: attention heads per level; None for a level without; it ignores the conditions.
        cond_dim: channels of a condition token.
        text_dim: D of the text embeddings, or None: a Stage B without text.
        time_dim: channels of the time embedding, even.
        dropout: probability in blocks and attention.

    Raises:
        ValueError: if the per-level lists differ in length, or heads do not divide a width.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 8192,
        token_dim: int = 256,
        semantic_channels: int = 16,
        patch_size: int = 2,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        num_heads: Sequence[int | None],
        cond_dim: int,
        text_dim: int | None = None,
        time_dim: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not len(widths) == len(num_blocks) == len(num_heads):
            lengths = f"{widths=}, {num_blocks=} and {num_heads=} differ in length"
            raise ValueError(f"{lengths}; give one entry of each per level")
        self.codebook_size, self.patch_size = codebook_size, patch_size
        self.semantic_channels = semantic_channels
        self.cond_dim, self.text_dim, self.time_dim = cond_dim, text_dim, time_dim
        self.text_mapper = nn.Linear(text_dim, cond_dim) if text_dim is not None else None
        self.semantic_mapper = nn.Linear(semantic_channels, cond_dim)
        self.token_embedding = nn.Embedding(codebook_size, token_dim)
        self.stem = nn.Conv2d(token_dim * patch_size**2, widths[0], 1)
        self.stem_norm = LayerNorm2d(widths[0])

        def block(c: int, heads: int | None, skip_channels: int) -> PaellaBlock:
            res = PaellaResBlock(c, skip_channels=skip_channels, dropout=dropout)
            attn = AttentionBlock(c, cond_dim, heads, dropout=dropout) if heads else None
            return PaellaBlock(res, TimestepBlock(c, time_dim), attn)

        def level(i: int, skip_channels: int) -> PaellaLevel:
            skips = (skip_channels if j == 0 else 0 for j in range(num_blocks[i]))
            return PaellaLevel(block(widths[i], num_heads[i], c) for c in skips)

        skips = [*widths[:-1], 0]  # the coarsest level has no skip
        self.down = nn.ModuleList(level(i, 0) for i in range(len(widths)))
        self.up = nn.ModuleList(level(i, skips[i]) for i in reversed(range(len(widths))))
        self.downsample = downsamplers(widths)
        self.upsample = upsamplers(widths)
        self.norm = LayerNorm2d(widths[0])
        self.head = nn.Conv2d(widths[0], token_dim * patch_size**2, 1)
        self.token_norm = LayerNorm2d(token_dim)  # on the way in and on the way out
        self.classifier = nn.Conv2d(token_dim, codebook_size, 1, bias=False)
        self._init_weights(sum(num_blocks))

    def _init_weights(self, depth: int) -> None:
        """Make all tokens equally likely, and the classifier a copy of the embedding."""
        self.apply(xavier_init)
        for mapper in filter(None, (self.semantic_mapper, self.text_mapper)):
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.stem.weight, gain=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.token_embedding.weight, std=self.codebook_size**-0.5)
        with torch.no_grad():
            self.classifier.weight.copy_(self.token_embedding.weight[:, :, None, None])
            for block in (m for m in self.modules() if isinstance(m, PaellaBlock)):
                block.res.project.weight.mul_(depth**-0.5)
                block.time.mapper.weight.zero_()

    @property
    def size_multiple(self) -> int:
        """Height and width of the tokens must be multiples of this."""
        return self.patch_size * 2 ** len(self.downsample)

    def cache_conditioning(self, semantic: Tensor, text: Tensor | None = None) -> Tensor:
        """Both conditions, as in ``forward`` -> (B, h * w + L, cond_dim) tokens."""
        dtype = self.semantic_mapper.weight.dtype
        cond = self.semantic_mapper(semantic.to(dtype).flatten(2).transpose(1, 2))
        if self.text_mapper is not None and text is not None:
            cond = torch.cat([cond, self.text_mapper(text.to(dtype))], dim=1)
        return F.layer_norm(cond, (self.cond_dim,), eps=LAYER_NORM_EPS)

    def predict_logits(self, tokens: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Tokens and time as in ``forward``, and the cached conditioning -> logits."""
        time = time_embedding(t, self.time_dim).to(self.stem.weight.dtype)
        x = self.token_norm(self.token_embedding(tokens).permute(0, 3, 1, 2))
        x = F.pixel_unshuffle(x, self.patch_size).contiguous(memory_format=torch.channels_last)
        x = self.stem_norm(self.stem(x))

        skips: list[Tensor | None] = []
        for i, level in enumerate(self.down):
            x = level(self.downsample[i - 1](x) if i else x, time, cond, None)
            skips.append(x)
        skips[-1] = None  # the coarsest level's output is ``x`` itself
        for i, level in enumerate(self.up):
            x = level(self.upsample[i - 1](x) if i else x, time, cond, skips.pop())

        x = F.pixel_shuffle(self.head(self.norm(x)), self.patch_size)
        return self.classifier(self.token_norm(x))

    def forward(
        self, tokens: Tensor, t: Tensor, semantic: Tensor, text: Tensor | None = None
    ) -> Tensor:
        """Predict the clean tokens.

        Args:
            tokens: (B, H, W) integers in [0, K), of which a share t is random.
            t: (B,) time in [0, 1], float32.
            semantic: (B, S, h, w) semantic latents of any resolution.
            text: (B, L, D) text embeddings; only if the network was built with ``text_dim``.

        Returns:
            (B, K, H, W) logits, in the dtype of the weights.
        """
        return self.predict_logits(tokens, t, self.cache_conditioning(semantic, text))
