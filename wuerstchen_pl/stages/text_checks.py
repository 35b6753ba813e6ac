"""Whether the networks of a text-conditional stage fit together."""

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.unet import UNet
from wuerstchen_pl.plural import plural


def check_text_networks(
    prior: Prior | UNet,
    text_encoder: TextEncoder,
    *,
    latent_channels: int,
    text_adapter: Adapter | None,
    train_text_encoder: bool,
    text_encoder_lr: float | None,
) -> None:
    """Refuse arguments of ``TextConditionalStage`` that contradict each other.

    Raises:
        ValueError: naming the argument, its value and the fix.
    """
    if prior.latent_channels != latent_channels:
        raise ValueError(
            f"prior.latent_channels={prior.latent_channels}, but the frozen stage has latents "
            f"of {plural(latent_channels, 'channel')}; set them equal"
        )
    if prior.text_dim != text_encoder.width:
        raise ValueError(
            f"prior.text_dim={prior.text_dim}, but text_encoder.width={text_encoder.width}; "
            "set them equal"
        )
    if train_text_encoder and text_adapter is not None:
        raise ValueError(
            "train_text_encoder=true trains all weights of the text encoder, and text_adapter an "
            "adapter of it; set train_text_encoder=false or text_adapter=null"
        )
    if text_encoder_lr is not None and not train_text_encoder and text_adapter is None:
        raise ValueError(
            f"text_encoder_lr={text_encoder_lr} has no effect on a frozen text encoder; set "
            "train_text_encoder=true, text_adapter or text_encoder_lr=null"
        )
    if text_encoder_lr is not None and text_encoder_lr <= 0:
        raise ValueError(f"text_encoder_lr={text_encoder_lr} is out of range; use more than 0")
    if not train_text_encoder and text_encoder.is_random:
        raise ValueError(
            "text_encoder.weights=null leaves a frozen text encoder random; set it to CLIP's "
            "weights, or set train_text_encoder=true"
        )
