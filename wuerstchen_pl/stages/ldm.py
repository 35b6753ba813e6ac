"""The paper's baseline: a latent diffusion model in Stage A's latents (section 4).

Stage C without Stage B: the same objective, text, averages and sampling, in latents as large as
those that Stage B decodes to. What sets the two apart is Wuerstchen's compression.
"""

from collections.abc import Sequence

from torch import Tensor

from wuerstchen_pl.models.unet import UNet
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.c import StageC


class StageLDM(StageC):
    """Noise prediction in Stage A's latents, conditioned on text; arguments as of ``StageC``.

    ``decoder`` is a trained Stage A, and ``prior`` a ``UNet``.
    """

    decoder: StageA  # type: ignore[assignment]
    prior: UNet  # type: ignore[assignment]

    @property
    def resolution_multiple(self) -> float:
        """Pixels to a position of the latents."""
        return self.decoder.vqgan.factor

    @property
    def size_multiple(self) -> int:
        """Stage A's factor times the denoiser's."""
        return self.decoder.size_multiple * self.prior.size_multiple

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Positions (h, w) of the latents of an image of (height, width) pixels."""
        return height // self.decoder.vqgan.factor, width // self.decoder.vqgan.factor

    def images(
        self,
        semantic: Tensor,
        *,
        size: tuple[int, int],
        seeds: Sequence[int],
        captions: Sequence[str],
    ) -> Tensor:
        """Latents -> (B, 3, *size) in [0, 1], by Stage A."""
        return self.decoder.decode(semantic)
