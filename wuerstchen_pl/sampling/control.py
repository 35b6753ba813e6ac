"""Control images of a sampling run, and what a ControlNet computes from them."""

from typing import NamedTuple

from torch import Tensor

from wuerstchen_pl.models.conditioning import Residuals
from wuerstchen_pl.models.controlnet import ControlNet
from wuerstchen_pl.plural import plural
from wuerstchen_pl.sampling.device import DevicePlacement


class Control(NamedTuple):
    """Control images, and the strength of their effect."""

    images: Tensor | None  # (B, 3, H, W) in [0, 1], or one for all or per prompt; None for scale 0
    scale: float = 1.0


def control_residuals(
    controlnet: ControlNet | None,
    control: Control | None,
    *,
    rows: int,
    size: tuple[int, int],
    placement: DevicePlacement,
) -> Residuals | None:
    """The residuals of all steps of a run, or None if they would change nothing.

    Args:
        controlnet: None without one.
        control: what it reads.
        rows: number of images.
        size: (h, w) of the latents.
        placement: the device to run on.

    Raises:
        ValueError: if one of ControlNet and control images is missing, or the number of control
            images does not fit.
    """
    if control is not None and control.scale == 0:
        return None
    if controlnet is None and control is None:
        return None
    if control is None or control.images is None:
        raise ValueError(
            "the ControlNet needs a control image; set control_image, or control_scale=0 to "
            "generate without it"
        )
    if controlnet is None:
        raise ValueError(
            "control_image needs a ControlNet; load one with load_controlnet, or set controlnet= "
            "to its file"
        )
    if not len(control.images) or rows % len(control.images):
        raise ValueError(
            f"{plural(len(control.images), 'control image')} for {plural(rows, 'image')}; give one "
            "per image, or one for all"
        )
    with placement.on_device(controlnet):
        residuals = controlnet(control.images.to(placement.device), size)
    repeats = 1 if len(control.images) == 1 else rows // len(control.images)
    return {
        block: control.scale * residual.repeat_interleave(repeats, dim=0)
        for block, residual in residuals.items()
    }
