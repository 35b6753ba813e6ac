"""The parts of a model that are a stage's networks."""

from collections.abc import Mapping
from pathlib import Path

from wuerstchen_pl.formats.model import Model, Part

STAGE_PARTS = {
    "a": {"vqgan": "vqgan"},
    "b": {
        "diffnext": "decoder",
        "paella": "decoder",  # of version 1
        "compressor": "compressor",
        "text_encoder": "text_encoder",
    },
    "c": {"prior": "prior", "text_encoder": "prior_text_encoder"},
}
"""Stage -> attribute of the network -> name of the part."""


NEEDED = {
    "a": ("vqgan",),
    "b": ("vqgan", "decoder", "compressor"),
    "c": ("prior", "prior_text_encoder", "compressor"),
}
"""Stage -> the parts that it cannot do without, in an order that every format has."""


def parts_of_stage(parts: Mapping[str, Part], name: str, where: str | Path) -> dict[str, Part]:
    """The parts that a frozen Stage A or B needs, in an order that every format has.

    Args:
        parts: of a model.
        name: ``a`` or ``b``.
        where: where they were read from, for the message.

    Raises:
        ValueError: if one is missing.
    """
    needed = list(NEEDED[name])
    if name == "b" and "decoder" in parts and parts["decoder"].config.get("text_dim") is not None:
        needed.append("text_encoder")
    if missing := [part for part in needed if part not in parts]:
        raise ValueError(
            f"{where} lacks {' and '.join(missing)}, which a frozen Stage {name.upper()} needs; "
            "add missing parts with python -m wuerstchen_pl.convert, or use another model"
        )
    return {part: parts[part] for part in needed}


def compressor_of(model: Model, source: str | Path) -> Part:
    """The compressor of a model.

    Raises:
        ValueError: if it has none.
    """
    if "compressor" not in model.parts:
        raise ValueError(
            f"compressor={source} has no compressor; use a model that has one (the published one "
            "is in model_v2_stage_b.pt)"
        )
    return model.parts["compressor"]
