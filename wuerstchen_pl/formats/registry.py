"""Read a model from any format, path or hub repository, and write it in any format."""

from dataclasses import replace
from pathlib import Path

from wuerstchen_pl.formats import FormatName, native, run
from wuerstchen_pl.formats.compatibility import check_encoder, check_version, encoder_of
from wuerstchen_pl.formats.detection import FORMATS, detect_format
from wuerstchen_pl.formats.hub import resolve_source
from wuerstchen_pl.formats.model import DECODER_SETTING, STUDENT, Model
from wuerstchen_pl.io.atomic import atomic_folder

STAGE_C_PARTS = ("prior", "prior_text_encoder")


def read_model(
    source: str,
    *,
    prior: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    allow_mismatch: bool = False,
) -> Model:
    """Read a model from a path, a run or a hub repository.

    Args:
        source: a path, or a hub id such as ``warp-ai/wuerstchen``.
        prior: path or id of a separate Stage C, whose parts and settings replace those of
            ``source``.
        variant: of the weights in the diffusers format: ``fp16`` reads ``*.fp16.safetensors``. None
            reads those without a variant, or else the only variant that there is.
        revision: branch, tag or commit of ``source`` on the hub.
        allow_mismatch: accept a ``prior`` that was trained with another compressor.

    Raises:
        FileNotFoundError: if the path does not exist, or the hub cannot be reached.
        ValueError: if it is damaged or not a model, if ``variant`` applies to nothing, or if
            ``prior`` was trained with another compressor than that of ``source``.
    """
    path = resolve_source(source, variant, revision)
    prior_path = None if prior is None else resolve_source(prior, variant)
    if variant is not None and not any(_has_variants(p) for p in (path, prior_path) if p):
        raise ValueError(
            f"variant={variant} applies to the diffusers format, which {source} does not have; "
            "remove variant="
        )
    model = run.read_path(path, variant)
    if prior_path is not None:
        other = run.read_path(prior_path, variant)
        if "prior" not in other.parts:
            raise ValueError(f"prior={prior} has no Stage C; use a model that has one")
        if not allow_mismatch:
            check_encoder(encoder_of(other, "c"), encoder_of(model, "c"), f"prior={prior}")
            check_version(other, model, f"prior={prior}")
        names = (*STAGE_C_PARTS, "controlnet")
        parts = {name: other.parts[name] for name in names if name in other.parts}
        settings = {k: v for k, v in other.settings.items() if k != DECODER_SETTING}
        kept = {name: part for name, part in model.parts.items() if name != "controlnet"}
        rest = {k: v for k, v in model.settings.items() if k != STUDENT}
        return replace(model, parts=kept | parts, settings=rest | settings)
    return model


def _has_variants(path: Path) -> bool:
    return not run.is_run(path) and detect_format(path) == "diffusers"


def write_model(model: Model, path: Path, format: FormatName) -> None:
    """Atomically write a model and its card into a new or empty folder.

    Raises:
        OSError: if it cannot be written, or is not empty; the message names the folder.
        ValueError: if the format does not support the model.
    """
    if format != "native" and "controlnet" in model.parts:
        raise ValueError(
            f"format={format} has no ControlNet; use format=native, or format=controlnet for the "
            "ControlNet alone"
        )
    with atomic_folder(path) as folder:
        FORMATS[format].write(model, folder)
        if model.card is not None:
            (folder / native.CARD).write_text(model.card, encoding="utf-8")
