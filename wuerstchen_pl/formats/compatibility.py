"""Whether a network was trained on the latents that it is used with."""

from collections.abc import Mapping

from wuerstchen_pl.formats.model import PAELLA, V1_SCALING, Model, Part, build_network
from wuerstchen_pl.models.fingerprint import network_fingerprint

ENCODERS = {"b": "stage_a", "c": "stage_b", "ldm": "stage_a"}
"""Stage -> its frozen stage, whose latents it is trained on."""
ENCODER_PARTS = {"b": "vqgan", "c": "compressor"}
"""Stage -> the part of a model that encodes images to these latents."""


def encoder_of(model: Model, stage: str) -> str | None:
    """Fingerprint of the network that encodes images for a stage; None if the model lacks it."""
    part = model.parts.get(ENCODER_PARTS[stage]) if stage in ENCODER_PARTS else None
    return None if part is None else network_fingerprint(build_network(part).float())


def check_scaling(
    trained_on: tuple[float, float] | None, used_with: tuple[float, float], origin: str
) -> None:
    """Refuse a prior that was trained on other latents (s + shift) / scale; None is not known.

    Args:
        trained_on: (shift, scale) in training.
        used_with: those of the stage.
        origin: see ``check_encoder``.

    Raises:
        ValueError: with both.
    """
    if trained_on is not None and trained_on != used_with:
        raise ValueError(
            f"{origin} was trained with stage.semantic_shift={trained_on[0]:g} and "
            f"stage.semantic_scale={trained_on[1]:g}, but these are {used_with[0]:g} and "
            f"{used_with[1]:g}; set them to the former, or allow_mismatch=true"
        )


def check_encoder(trained_on: str | None, used_with: str | None, origin: str) -> None:
    """Refuse a network that was trained on the latents of another one; None is not known.

    Args:
        trained_on: fingerprint of the encoder in training.
        used_with: fingerprint of the encoder that it is combined with.
        origin: the key that named the network, with its value; errors start with it.

    Raises:
        ValueError: with both fingerprints.
    """
    if trained_on is not None and used_with is not None and trained_on != used_with:
        raise ValueError(
            f"{origin} was trained on latents of an encoder of sha256 {trained_on[:12]}, but is "
            f"used with one of {used_with[:12]}; use the encoder that it was trained with, or set "
            "allow_mismatch=true"
        )


def check_version(prior: Model, cascade: Model, origin: str) -> None:
    """Refuse a published prior of one version with Stage B of the other.

    Args:
        prior: has Stage C, without the compressor that it was trained with.
        cascade: the model that it is used with.
        origin: see ``check_encoder``.

    Raises:
        ValueError: with both versions.
    """
    if "compressor" in prior.parts or "decoder" not in cascade.parts:
        return
    prior_version = 1 if V1_SCALING.items() <= prior.settings.items() else 2
    version = 1 if cascade.parts["decoder"].config["_target_"] == PAELLA else 2
    if prior_version != version:
        raise ValueError(
            f"{origin} is a prior of version {prior_version}, but the model has Stage B of version "
            f"{version}; use both of one version, or set allow_mismatch=true"
        )


CHANNELS = (
    ("prior", "latent_channels", "compressor", "latent_channels"),
    ("decoder", "semantic_channels", "compressor", "latent_channels"),
    ("decoder", "latent_channels", "vqgan", "latent_channels"),
    ("decoder", "codebook_size", "vqgan", "codebook_size"),
)
"""Arguments of networks that must be equal, as one network reads what the other writes."""


def check_channels(parts: Mapping[str, Part], where: str) -> None:
    """Refuse networks of a cascade that cannot read each other's latents.

    Args:
        parts: of a model.
        where: where they were read from, for the message.

    Raises:
        ValueError: with both values.
    """
    for reader, its_argument, writer, argument in CHANNELS:
        values = (
            parts[part].config.get(name) if part in parts else None
            for part, name in ((reader, its_argument), (writer, argument))
        )
        read, written = values
        if read is not None and written is not None and read != written:
            raise ValueError(
                f"{where}: {reader}.{its_argument}={read}, but {writer}.{argument}={written}; use "
                "networks that were trained together"
            )
