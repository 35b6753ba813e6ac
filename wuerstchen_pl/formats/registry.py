"""Read a model from any format, path or hub repository, and write it in any format."""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from wuerstchen_pl.formats import FormatName, diffusers, native, run, upstream
from wuerstchen_pl.formats.compatibility import check_encoder, check_version, encoder_of
from wuerstchen_pl.formats.lazy_tensors import checked
from wuerstchen_pl.formats.model import DECODER_SETTING, STUDENT, Model
from wuerstchen_pl.io.atomic import atomic_folder

FORMATS = {"native": native, "diffusers": diffusers, "upstream": upstream}
HUB_PATTERNS = ["*.json", "*.txt", "*.safetensors"]
"""Files that are downloaded from a hub repository; pickles are not."""


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
    model = _read(path, variant)
    if prior_path is not None:
        other = _read(prior_path, variant)
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


def _read(path: Path, variant: str | None) -> Model:
    if run.is_run(path):
        return run.read_run(path)
    format = detect_format(path)
    if format == "diffusers":
        return _checked(diffusers.read(path, variant=variant), path)
    return _checked(FORMATS[format].read(path), path)


def _checked(model: Model, path: Path) -> Model:
    """The model, whose tensors are refused when they are read if they are not finite."""
    for name, part in model.parts.items():
        part.tensors = {
            key: checked(lazy, f"{name}.{key}", str(path)) for key, lazy in part.tensors.items()
        }
    return model


def is_hub_id(source: str) -> bool:
    """Whether a source can only be a repository of the hub, as no such path exists."""
    has_its_form = source.count("/") == 1 and not source.startswith((".", "/"))
    return has_its_form and not Path(source).exists()


def resolve_source(source: str, variant: str | None = None, revision: str | None = None) -> Path:
    """A local path unchanged, or the folder of a downloaded hub repository.

    Weights of the variant fp16 are downloaded only if ``variant`` is set, or there are no others.

    Raises:
        FileNotFoundError: if it is not a path and cannot be downloaded.
        ValueError: if ``revision`` is set for a path.
    """
    if not is_hub_id(source):
        if revision is not None:
            raise ValueError(f"revision={revision} is of a hub id, but {source} is not; remove it")
        return Path(source)
    try:
        if variant is None:
            folder = _download(source, revision, ignore=["*.fp16.*", "*.fp16-*"])
            parts = [config.parent for config in folder.rglob("config.json")]
            if all(any(part.glob("*.safetensors")) for part in parts):
                return folder
        return _download(source, revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source} is not a path and could not be downloaded from the hub: {reason}"
        ) from error


def resolve_file(path: str | Path, name: str, *, key: str, use: str) -> Path:
    """A local file: the path itself, or the file ``name`` of a folder or of a hub repository.

    Args:
        path: a file, a folder or a hub id.
        name: of the file in a folder.
        key: that named the path, for messages.
        use: what to use instead of a file that does not exist.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    source = resolve_source(str(path))
    file = source / name if source.is_dir() else source
    if not file.is_file():
        raise FileNotFoundError(f"{key}={path} does not exist; use {use}")
    return file


def _download(source: str, revision: str | None, ignore: list[str] | None = None) -> Path:
    folder = snapshot_download(
        source, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=ignore
    )
    return Path(folder)


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
