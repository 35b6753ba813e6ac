"""The native format: a folder with a manifest, and for each part a config and its tensors."""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wuerstchen_pl.formats.lazy_tensors import read_safetensors, write_safetensors
from wuerstchen_pl.formats.model import (
    PART_TARGETS,
    Model,
    Part,
    check_tensors,
    validate_config,
    validate_settings,
)
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.models import tokenizer
from wuerstchen_pl.signatures import check_entries

logger = logging.getLogger(__name__)

MANIFEST = "wuerstchen_pl.json"
CARD = "README.md"
FORMAT = 1
KEYS: Mapping[str, Any] = {"format": int, "parts": list[str], "settings": dict}
"""Types of the keys of the manifest."""


def matches(path: Path) -> bool:
    """Whether a folder has this format."""
    return (path / MANIFEST).is_file()


def read(path: Path) -> Model:
    """Read the model of a folder.

    Raises:
        ValueError: if it is damaged, or has another format version.
        FileNotFoundError: if a part is missing.
    """
    manifest = load_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path / MANIFEST} has format {manifest.get('format')}, but this release reads "
            f"{FORMAT}; update the package"
        )
    with contents_of(path / MANIFEST):
        check_entries(manifest, KEYS)
        if unknown := sorted(manifest.keys() - KEYS.keys()):
            raise ValueError(f"{unknown[0]} is not a key of a model; remove it")
    settings = validate_settings(manifest["settings"], str(path / MANIFEST))
    card = path / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    model = Model(settings=settings, card=text)
    for name in manifest["parts"]:
        if name not in PART_TARGETS:
            raise ValueError(f"{path / MANIFEST} has an unknown part {name!r}; update the package")
        model.parts[name] = _read_part(path / name)
    return model


def _read_part(folder: Path) -> Part:
    weights = find_weights(folder, "model")
    files = folder / "tokenizer"
    tensors = read_safetensors(weights)
    config_file = folder / "config.json"
    config = validate_config(load_json(config_file), folder.name, len(tensors), str(config_file))
    part = Part(config, tensors, files if files.is_dir() else None)
    check_tensors(part, str(weights), config_file)
    return part


def write(model: Model, path: Path) -> None:
    """Write a model into a folder.

    Raises:
        OSError: if a file cannot be written.
    """
    for name, part in model.parts.items():
        folder = path / name
        folder.mkdir(parents=True)
        dump_json(folder / "config.json", part.config)
        write_safetensors(folder / "model.safetensors", part.tensors)
        if part.tokenizer is not None:
            copy_tokenizer(part, folder / "tokenizer")
    manifest = {"format": FORMAT, "parts": list(model.parts), "settings": model.settings}
    dump_json(path / MANIFEST, manifest)


# Helpers shared with the diffusers format


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path:
    """The safetensors file of a folder, or the index of its shards.

    Without ``variant``, these are the files without a variant in their names, or else those of the
    only variant in the folder. If ``variant`` is missing, they are the files without a variant,
    with a warning.

    Raises:
        FileNotFoundError: if there are none; the message lists the variants that are there.
    """
    by_variant = _weights_by_variant(folder, stem)
    if variant is None and None not in by_variant and len(by_variant) == 1:
        (variant,) = by_variant
        logger.info("%s has only the weights of variant=%s, which are used", folder, variant)
    if variant not in by_variant and None in by_variant:
        warnings.warn(
            f"{folder} has no weights of variant={variant}: using those without a variant",
            stacklevel=2,
        )
        return by_variant[None]
    if variant in by_variant:
        return by_variant[variant]
    dotted = f".{variant}" if variant else ""
    missing = (
        f"{folder} has neither {stem}{dotted}.safetensors nor {stem}.safetensors.index{dotted}.json"
    )
    if not by_variant:
        raise FileNotFoundError(missing)
    names = ", ".join(path.name for path in by_variant.values())
    choices = " or ".join(f"variant={name or 'null'}" for name in by_variant)
    raise FileNotFoundError(f"{missing}, but it has {names}; use {choices}")


def _weights_by_variant(folder: Path, stem: str) -> dict[str | None, Path]:
    """The weights in a folder by variant; the key is None for those without one."""
    by_variant: dict[str | None, Path] = {}
    for pattern in (r"\.safetensors\.index(?:\.(\w+))?\.json", r"(?:\.(\w+))?\.safetensors"):
        for path in sorted(folder.glob(f"{stem}.*")):
            match = re.fullmatch(re.escape(stem) + pattern, path.name)
            if match and path.is_file():
                by_variant[match[1]] = path  # a single file is preferred to an index
    return by_variant


def load_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; use another file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; use a config file")
    return content


def dump_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(part: Part, target: Path) -> None:
    """Copy a tokenizer's files, or write those of open_clip's vocabulary if the part has none."""
    if part.tokenizer is None:
        tokenizer.write_vocabulary(target, part.config["context_length"])
        return
    target.mkdir(parents=True)
    for name in tokenizer.FILES:
        if (part.tokenizer / name).is_file():
            shutil.copyfile(part.tokenizer / name, target / name)
