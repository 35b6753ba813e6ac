"""Any format, wherever it lies, to a model; and a model to any format."""

from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from wuerstchen_pl.formats import diffusers, native, run, upstream
from wuerstchen_pl.formats.model import Model
from wuerstchen_pl.io.atomic import atomic_folder

FormatName = Literal["native", "diffusers", "upstream"]
FORMATS = {"native": native, "diffusers": diffusers, "upstream": upstream}
HUB_PATTERNS = ["*.json", "*.txt", "*.safetensors"]
"""Files of a hub repository: no pickles."""


def detect_format(path: Path) -> FormatName:
    """The format of a file or folder.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is of none.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; train Stage C first (python -m wuerstchen_pl.train stage=c), "
            "or name another model"
        )
    if native.matches(path):
        return "native"
    if diffusers.matches(path):
        return "diffusers"
    if upstream.matches(path):
        return "upstream"
    raise ValueError(
        f"{path} is not a model: it has neither {native.MANIFEST} nor {diffusers.INDEX}, and none "
        "of the authors' .pt files"
    )


STAGE_C_PARTS = ("prior", "prior_text_encoder")


def read_model(source: str, *, prior: str | None = None, variant: str | None = None) -> Model:
    """The model at a path, of a run, or of a hub repository.

    Args:
        source: a path, or an id such as ``warp-ai/wuerstchen``.
        prior: likewise, where Stage C lies apart: its parts and settings are taken from there.
        variant: ``fp16`` reads those files of diffusers' format.

    Raises:
        FileNotFoundError: if there is nothing, or the hub cannot be reached.
        ValueError: if it is of no format, or damaged.
    """
    model = _read(source, variant)
    if prior is not None:
        other = _read(prior, variant)
        if "prior" not in other.parts:
            raise ValueError(f"prior={prior} holds no Stage C; name one that does")
        model.parts |= {name: other.parts[name] for name in STAGE_C_PARTS if name in other.parts}
        model.settings |= {k: v for k, v in other.settings.items() if k != "latent_dim_scale"}
    return model


def _read(source: str, variant: str | None) -> Model:
    path = resolve_source(source, variant)
    if run.is_run(path):
        return run.read_run(path)
    format = detect_format(path)
    if format == "diffusers":
        return diffusers.read(path, variant=variant)
    if variant is not None:
        raise ValueError(
            f"variant={variant} is of diffusers' format, and {path} of another; drop it"
        )
    return FORMATS[format].read(path)


def resolve_source(source: str, variant: str | None = None) -> Path:
    """A path as it is, or the folder into which a hub repository was downloaded.

    Raises:
        FileNotFoundError: if it is not a path, and cannot be downloaded.
    """
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/")):
        return Path(source)
    try:
        unwanted = ["*.fp16.*"] if variant is None else []
        return Path(
            snapshot_download(source, allow_patterns=HUB_PATTERNS, ignore_patterns=unwanted)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source} is not a path, and could not be had from the hub: {reason}"
        ) from error


def check_output_empty(path: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        FileExistsError: if it does, or is a file.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; choose another folder, or remove it")


def write_model(model: Model, path: Path, format: FormatName) -> None:
    """Write a model, and its card, into a new folder, whole or not at all.

    Raises:
        FileExistsError: if the folder is there and not empty.
        OSError: if it cannot be written, naming the folder.
        ValueError: if the format cannot hold the model.
    """
    check_output_empty(path)
    with atomic_folder(path) as folder:
        FORMATS[format].write(model, folder)
        if model.card is not None:
            (folder / native.CARD).write_text(model.card, encoding="utf-8")
