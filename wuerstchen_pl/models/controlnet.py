"""ControlNet: a network that steers a frozen prior by control images, such as edges.

Zhang et al. 2023, arXiv 2302.05543. The layers are those of Stable Cascade's ControlNet: image
features, and for each chosen block of the prior a projection that is zero at first.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.models.compressor import ConvBackbone, EfficientNet, ImageFeatures
from wuerstchen_pl.models.conditioning import Residuals
from wuerstchen_pl.models.control_images import ControlImages
from wuerstchen_pl.models.pretrained import Pretrained
from wuerstchen_pl.models.prior import Prior

MAX_DEPTH = 1000
"""Limit on the number of a prior's blocks, which a file may state."""


class ControlNet(ImageFeatures, Pretrained):
    """Control images -> residuals, which are added to the inputs of some of a prior's blocks.

    Args:
        backbone: see ``ImageFeatures``.
        control_images: what the control images show.
        prior_width: channels of the prior's blocks.
        prior_depth: number of the prior's blocks.
        blocks: numbers of the blocks, from 0, that get a residual; None is ``default_blocks``.
        resize: see ``ImageFeatures``.

    Raises:
        ValueError: for a block that the prior does not have, or one that is given twice.
    """

    def __init__(
        self,
        *,
        backbone: EfficientNet | ConvBackbone,
        control_images: ControlImages,
        prior_width: int,
        prior_depth: int,
        blocks: Sequence[int] | None = None,
        resize: float = 0.75,
    ) -> None:
        super().__init__(backbone=backbone, resize=resize)
        if not 1 <= prior_depth <= MAX_DEPTH:
            raise ValueError(f"prior_depth={prior_depth} is out of range; use 1 to {MAX_DEPTH}")
        self.control_images, self.prior_depth = control_images, prior_depth
        self.prior_width = prior_width
        self.blocks = default_blocks(prior_depth) if blocks is None else list(blocks)
        if not self.blocks or sorted({*self.blocks} & {*range(prior_depth)}) != sorted(self.blocks):
            raise ValueError(
                f"controlnet.blocks={self.blocks} are not those of a prior with {prior_depth}; use "
                f"different numbers from 0 to {prior_depth - 1}"
            )
        self.projections = nn.ModuleList(
            _projection(backbone.channels, prior_width) for _ in self.blocks
        )
        self.backbone.eval()

    def train(self, mode: bool = True) -> "ControlNet":
        """Set the mode; the backbone's batch norms always use their running statistics."""
        super().train(mode)
        self.backbone.eval()
        return self

    def copy_backbone(self, other: ImageFeatures) -> None:
        """Start from the backbone of another network, such as the compressor.

        Raises:
            ValueError: if its layers differ.
        """
        try:
            self.backbone.load_state_dict(other.backbone.state_dict())
        except RuntimeError:
            raise ValueError(
                "controlnet.backbone has other layers than the compressor's; use the same ones"
            ) from None

    def check_prior(self, prior: Prior) -> None:
        """Refuse a prior of other sizes.

        Raises:
            ValueError: with the sizes of both.
        """
        actual = (len(prior.blocks), prior.stem.out_channels)
        if actual != (self.prior_depth, self.prior_width):
            raise ValueError(
                f"the ControlNet is for a prior with {self.prior_depth} blocks of "
                f"{self.prior_width} channels, but this one has {actual[0]} of {actual[1]}; use "
                "the prior that it was trained with"
            )

    def forward(self, images: Tensor, size: tuple[int, int]) -> Residuals:
        """Residuals of the chosen blocks.

        Args:
            images: (B, 3, H, W) control images in [0, 1].
            size: (h, w) of the latents.

        Returns:
            The number of each block -> (B, prior_width, h, w).
        """
        features = self.features(images, next(self.projections.parameters()).dtype)
        projected = zip(self.blocks, self.projections, strict=True)
        return {block: _resized(projection(features), size) for block, projection in projected}


def default_blocks(depth: int) -> list[int]:
    """Every second block of the first and the last quarter, with the first and the last block.

    Of v2's 32 blocks, these are 0, 2, 4, 6, 25, 27, 29 and 31.
    """
    quarter = -(-depth // 4)
    return sorted({*range(0, quarter, 2), *range(depth - 1, depth - 1 - quarter, -2)})


def _projection(channels: int, width: int) -> nn.Sequential:
    last = nn.Conv2d(channels, width, 1, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.LeakyReLU(0.2), last)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=True)
