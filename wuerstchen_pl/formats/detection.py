"""Models on disk: their formats, and reading one in any of them."""

from pathlib import Path

from wuerstchen_pl.formats import FormatName, diffusers, native, upstream
from wuerstchen_pl.formats.lazy_tensors import checked
from wuerstchen_pl.formats.model import Model

FORMATS = {"native": native, "diffusers": diffusers, "upstream": upstream}


def find_format(path: Path) -> FormatName | None:
    """The format of a file or folder; None if it is not a model."""
    if native.matches(path):
        return "native"
    if diffusers.matches(path):
        return "diffusers"
    return "upstream" if upstream.matches(path) else None


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
    if (format := find_format(path)) is not None:
        return format
    raise ValueError(
        f"{path} is not a model: it has no {native.MANIFEST}, {diffusers.INDEX} or upstream .pt "
        "file; use another path"
    )


def read_files(path: Path, variant: str | None = None) -> Model:
    """Read a model, whose tensors are refused when they are read if they are not finite.

    Args:
        path: the file or folder.
        variant: of the weights in the diffusers format; see ``registry.read_model``.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if it is damaged or not a model.
    """
    format = detect_format(path)
    if format == "diffusers":
        model = diffusers.read(path, variant=variant)
    else:
        model = FORMATS[format].read(path)
    for name, part in model.parts.items():
        part.tensors = {
            key: checked(lazy, f"{name}.{key}", str(path)) for key, lazy in part.tensors.items()
        }
    return model
