"""Read a model from any format, path or hub repository, and write it in any format."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from wuerstchen_pl.formats import diffusers, native, run, upstream
from wuerstchen_pl.formats.lazy_tensors import checked
from wuerstchen_pl.formats.model import Model
from wuerstchen_pl.io.atomic import atomic_folder

FormatName = Literal["native", "diffusers", "upstream"]
FORMATS = {"native": native, "diffusers": diffusers, "upstream": upstream}
HUB_PATTERNS = ["*.json", "*.txt", "*.safetensors"]
"""Files that are downloaded from a hub repository; pickles are not."""


def detect_format(path: Path) -> FormatName:
    """The format of a file or folder.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if it has none of the formats.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; train Stage C first (python -m wuerstchen_pl.train stage=c), "
            "or use another model"
        )
    if native.matches(path):
        return "native"
    if diffusers.matches(path):
        return "diffusers"
    if upstream.matches(path):
        return "upstream"
    raise ValueError(
        f"{path} is not a model: it has no {native.MANIFEST}, {diffusers.INDEX} or upstream .pt "
        "file; use another path"
    )


STAGE_C_PARTS = ("prior", "prior_text_encoder")


def read_model(source: str, *, prior: str | None = None, variant: str | None = None) -> Model:
    """Read a model from a path, a run or a hub repository.

    Args:
        source: a path, or a hub id such as ``warp-ai/wuerstchen``.
        prior: path or id of a separate Stage C, whose parts and settings replace those of
            ``source``.
        variant: ``fp16`` reads the files of that variant in the diffusers format.

    Raises:
        FileNotFoundError: if the path does not exist, or the hub cannot be reached.
        ValueError: if it is damaged or not a model.
    """
    model = _read(source, variant)
    if prior is not None:
        other = _read(prior, variant)
        if "prior" not in other.parts:
            raise ValueError(f"prior={prior} has no Stage C; use a model that has one")
        parts = {name: other.parts[name] for name in STAGE_C_PARTS if name in other.parts}
        settings = {k: v for k, v in other.settings.items() if k != "latent_dim_scale"}
        return replace(model, parts=model.parts | parts, settings=model.settings | settings)
    return model


def _read(source: str, variant: str | None) -> Model:
    path = resolve_source(source, variant)
    if run.is_run(path):
        return run.read_run(path)
    format = detect_format(path)
    if format == "diffusers":
        return _checked(diffusers.read(path, variant=variant), path)
    if variant is not None:
        raise ValueError(
            f"variant={variant} applies to the diffusers format, but {path} has the {format} "
            "format; remove variant="
        )
    return _checked(FORMATS[format].read(path), path)


def _checked(model: Model, path: Path) -> Model:
    """The model, whose tensors are refused when they are read if they are not finite."""
    for name, part in model.parts.items():
        part.tensors = {
            key: checked(lazy, f"{name}.{key}", str(path)) for key, lazy in part.tensors.items()
        }
    return model


def resolve_source(source: str, variant: str | None = None) -> Path:
    """A local path unchanged, or the folder of a downloaded hub repository.

    Raises:
        FileNotFoundError: if it is not a path and cannot be downloaded.
    """
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/")):
        return Path(source)
    try:
        ignored = ["*.fp16.*"] if variant is None else []
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source} is not a path and could not be downloaded from the hub: {reason}"
        ) from error


def write_model(model: Model, path: Path, format: FormatName) -> None:
    """Atomically write a model and its card into a new or empty folder.

    Raises:
        OSError: if it cannot be written, or is not empty; the message names the folder.
        ValueError: if the format does not support the model.
    """
    with atomic_folder(path) as folder:
        FORMATS[format].write(model, folder)
        if model.card is not None:
            (folder / native.CARD).write_text(model.card, encoding="utf-8")
