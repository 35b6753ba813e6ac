"""The denoiser of the paper's baseline: a U-Net from noised latents and text to the noise.

Wuerstchen (arXiv 2306.00637), section 4 and appendix: a latent diffusion model of matched compute,
here built from Stage B's blocks, without semantic latents.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from wuerstchen_pl.models.conditioning import BlockInputs, CachedConditioning
from wuerstchen_pl.models.diffnext import DiffNeXt


class UNet(nn.Module):
    """Stage B's network, conditioned on text alone, with the interface of ``Prior``.

    Args:
        latent_channels: channels of Stage A's latents.
        patch_size: pixel-unshuffle factor of the latents; 2 turns Stage A's f4 into f8.
        widths: channels per level, finest first (paper 320, 640, 1280, 1280).
        num_blocks: blocks per level on the way down (paper 2, 4, 14, 4).
        num_up_blocks: blocks per level on the way up, finest first (paper 3, 5, 15, 5).
        num_heads: attention heads per level (paper 5, 10, 20, 20).
        cond_dim: channels of the mapped text.
        text_dim: D of the text embeddings.
        time_dim: channels of the time embedding.
        dropout: probability in blocks and attention.

    Raises:
        ValueError: if the per-level lists differ in length.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        patch_size: int = 2,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        num_up_blocks: Sequence[int],
        num_heads: Sequence[int | None],
        cond_dim: int,
        text_dim: int,
        time_dim: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.latent_channels, self.text_dim = latent_channels, text_dim
        self.net = DiffNeXt(
            latent_channels=latent_channels,
            patch_size=patch_size,
            widths=widths,
            num_blocks=num_blocks,
            num_up_blocks=num_up_blocks,
            num_heads=num_heads,
            inject_semantic=[False] * len(widths),
            cond_dim=cond_dim,
            text_dim=text_dim,
            time_dim=time_dim,
            dropout=dropout,
        )

    @property
    def size_multiple(self) -> int:
        """Height and width of the latents must be multiples of this."""
        return self.net.size_multiple

    def inputs(self, t: Tensor, text: Tensor) -> list[BlockInputs]:
        """(B,) or (T,) times and (B, L, D) text embeddings -> the inputs of every block."""
        return self.net.inputs(t, None, text, (0, 0))  # the size is for semantic latents only

    def cache_conditioning(self, times: Tensor, text: Tensor) -> list[CachedConditioning]:
        """(T,) times and (B, L, D) text embeddings -> every block's cached conditioning."""
        return self.net.cache_conditioning(times, None, text, (0, 0))

    def predict_noise(
        self, xt: Tensor, conditioning: Sequence[BlockInputs | CachedConditioning]
    ) -> Tensor:
        """(B, C, h, w) noised latents, raw or cached conditioning per block -> noise, float32."""
        return self.net.predict_noise(xt, conditioning)

    def forward(self, xt: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(B, C, h, w) noised latents, (B,) times, (B, L, D) text -> the noise, float32."""
        return self.predict_noise(xt, self.inputs(t, text))
