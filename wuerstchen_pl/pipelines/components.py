"""Build a pipeline's components from a model on disk."""

from collections.abc import Callable
from typing import Any, TypedDict

from wuerstchen_pl.formats.compatibility import check_channels
from wuerstchen_pl.formats.model import (
    DECODER_SETTING,
    DIFFNEXT,
    PAELLA,
    Model,
    build_network,
)
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.sampling.decoder import DecoderSampler
from wuerstchen_pl.sampling.latent_decoder import LatentDecoderSampler
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.sampling.token_decoder import TokenDecoderSampler

DECODER_SAMPLERS: dict[str, Callable[..., DecoderSampler]] = {
    DIFFNEXT: LatentDecoderSampler,
    PAELLA: TokenDecoderSampler,
}
"""Stage B's network -> its sampler."""


class Components(TypedDict):
    """Constructor arguments of a ``CascadePipeline``."""

    prior: PriorSampler
    decoder: DecoderSampler
    compressor: SemanticCompressor | None
    image_size: int | None


def build_components(model: Model, where: str) -> Components:
    """Build the constructor arguments of a pipeline.

    Args:
        model: model with all parts that text to image needs.
        where: where the model was read from, for error messages.

    Raises:
        FileNotFoundError: if a part is missing.
        ValueError: if Stage B cannot generate images, or a text encoder does not fit its stage.
    """
    needed = {"prior", "prior_text_encoder", "decoder", "vqgan"}
    decoder = model.parts.get("decoder")
    if decoder is not None and decoder.config["text_dim"] is not None:
        needed.add("text_encoder")
    if missing := sorted(needed - model.parts.keys()):
        raise FileNotFoundError(
            f"{where} lacks {', '.join(missing)}; use a complete cascade, such as Stage C's run, "
            "or set a separate Stage C with prior="
        )
    check_channels(model.parts, where)
    nets: dict[str, Any] = {name: build_network(part) for name, part in model.parts.items()}
    for net, encoder in (("prior", "prior_text_encoder"), ("decoder", "text_encoder")):
        if encoder in nets and nets[net].text_dim != nets[encoder].width:
            raise ValueError(
                f"{where}: the {net} reads text of {nets[net].text_dim} channels, but the "
                f"{encoder} gives {nets[encoder].width}; use the one it was trained with"
            )
    if "controlnet" in nets:
        nets["controlnet"].arguments = model.parts["controlnet"].config
    settings: dict[str, Any] = dict(model.settings)
    image_size: float | None = settings.pop("image_size", None)
    scale = {key: settings.pop(key) for key in (DECODER_SETTING,) if key in settings}
    return {
        "prior": PriorSampler(
            prior=nets["prior"],
            text_encoder=nets["prior_text_encoder"],
            controlnet=nets.get("controlnet"),
            **settings,
        ),
        "decoder": DECODER_SAMPLERS[model.parts["decoder"].config["_target_"]](
            decoder=nets["decoder"],
            vqgan=nets["vqgan"],
            text_encoder=nets.get("text_encoder"),
            **scale,
        ),
        "compressor": nets.get("compressor"),
        "image_size": None if image_size is None else round(image_size),
    }
