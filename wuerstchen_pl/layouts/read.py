"""Any layout, wherever it lies, to a model; and a model to any layout."""

import os
import shutil
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from wuerstchen_pl.layouts import diffusers, original, ours, run
from wuerstchen_pl.layouts.model import Model

LayoutName = Literal["ours", "diffusers", "original"]
LAYOUTS = {"ours": ours, "diffusers": diffusers, "original": original}
WANTED = ["*.json", "*.txt", "*.safetensors"]
"""Files of a hub repository: no pickles."""


def layout_of(path: Path) -> LayoutName:
    """The layout of a file or folder.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is of none.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; train Stage C first (python -m wuerstchen_pl.train stage=c), "
            "or name another model"
        )
    if ours.found(path):
        return "ours"
    if diffusers.found(path):
        return "diffusers"
    if original.found(path):
        return "original"
    raise ValueError(
        f"{path} is no model: it has neither {ours.MANIFEST} nor {diffusers.INDEX}, and none of "
        "the authors' .pt files"
    )


def read(source: str, *, prior: str | None = None, variant: str | None = None) -> Model:
    """The model at a path, of a run, or of a hub repository.

    Args:
        source: a path, or an id such as ``warp-ai/wuerstchen``.
        prior: likewise, where Stage C lies apart.
        variant: ``fp16`` reads those files of diffusers' layout.

    Raises:
        FileNotFoundError: if there is nothing, or the hub cannot be reached.
        ValueError: if it is of no layout, or damaged.
    """
    path = locate(source, variant)
    if run.found(path):
        return run.read_run(path)
    if layout_of(path) == "diffusers":
        apart = None if prior is None else locate(prior, variant)
        return diffusers.read(path, prior=apart, variant=variant)
    model = LAYOUTS[layout_of(path)].read(path)
    if prior is not None:
        model.parts |= read(prior, variant=variant).parts
    return model


def locate(source: str, variant: str | None = None) -> Path:
    """A path as it is, or the folder into which a hub repository was downloaded.

    Raises:
        FileNotFoundError: if it is no path, and cannot be downloaded.
    """
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/")):
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source} is no path, and could not be had from the hub: {reason}"
        ) from error


def write(model: Model, path: Path, layout: LayoutName, *, readme: str | None = None) -> None:
    """Write a model, and its card, into a new folder, whole or not at all.

    Raises:
        FileExistsError: if the folder is there and not empty.
        OSError: if it cannot be written, naming the folder.
        ValueError: if the layout cannot hold the model.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; choose another folder, or remove it")
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        LAYOUTS[layout].write(model, aside)
        if readme is not None:
            (aside / "README.md").write_text(readme, encoding="utf-8")
        if path.exists():
            path.rmdir()
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
