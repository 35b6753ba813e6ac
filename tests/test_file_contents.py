"""Files that a user names: whatever they contain, an error is one sentence that names the file.

Of each kind, a valid file is changed in every way: an entry is removed, added, or replaced by a
value of another type; the file is truncated, emptied, or replaced by a folder or by random bytes.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import run_program, small, what_cache_reads
from tests.formats.conftest import random_model
from wuerstchen_pl.cli.errors import explain
from wuerstchen_pl.data.caches.cached_dataset import CachedDataModule
from wuerstchen_pl.evaluation.datasets import data_from_yaml
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.prompt_sets import read_prompts
from wuerstchen_pl.formats import model_card, registry
from wuerstchen_pl.formats.model import PARTS, build_network
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.pipelines.loading import stage_of_run

UNKNOWN = "unknown_entry"
TO_TRY: dict[type, Any] = {
    str: 3, int: "text", float: "text", bool: "text", list: 5, dict: "text", type(None): [{}],
}  # fmt: skip
"""Type -> a value of another one."""
SAMPLE = 1
"""Number of changes of a kind in the fast test."""


class Kind(NamedTuple):
    """A kind of file: where it is in a folder, how to write it, and what reads it."""

    file: str
    read: Callable[[Path], object]
    dump: Callable[[Any, Path], None] | None = None
    parse: Callable[[Path], Any] | None = None
    is_optional: bool = False


def changes(node: Any, depth: int = 4) -> Iterator[tuple[str, Any]]:
    """A name and a copy of nested dicts and lists for each change."""
    if isinstance(node, dict):
        yield f"+{UNKNOWN}", {**node, UNKNOWN: 1}
        yield "{}", {}
        for key in node:
            yield f"-{key}", {k: v for k, v in node.items() if k != key}
    if isinstance(node, dict | list) and depth:
        for key, value in (
            list(node.items()) if isinstance(node, dict) else list(enumerate(node[:1]))
        ):
            replaced = TO_TRY.get(type(value), "text")
            for name, changed in (("!", replaced), *changes(value, depth - 1)):
                result = copy.copy(node)
                result[key] = changed
                yield f"{key}.{name}", result


def to_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content))


def from_json(path: Path) -> Any:
    return json.loads(path.read_text())


def to_yaml(content: Any, path: Path) -> None:
    path.write_text(yaml.safe_dump(content))


def from_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def from_checkpoint(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def read_model(folder: Path, *parts: str) -> object:
    """Read a model, and build those parts of it, or else all."""
    model = registry.read_model(str(folder))
    return [build_network(model.parts[name]) for name in parts or model.parts]


def read_part(name: str, files: Path) -> object:
    """Read the files of a part in the diffusers format, or those that text encoders share."""
    return read_model(files / "diffusers", name if name in PARTS else "text_encoder")


def card_of(checkpoint: Path) -> str:
    return model_card.render_card(model_card.checkpoint_chain(checkpoint), license=None, ema=True)


def checkpoint_in(folder: Path) -> Path:
    return folder / "checkpoints" / "step0000004.ckpt"


JSON: dict[str, Any] = {"dump": to_json, "parse": from_json}
KINDS = {
    "checkpoint": Kind(
        "run/checkpoints/step0000004.ckpt",
        lambda folder: load_stage(source=checkpoint_in(folder / "run"), stage="a"),
        torch.save, from_checkpoint,
    ),
    "config.yaml": Kind(
        "run/config.yaml", lambda f: data_from_yaml(f / "run/config.yaml"), to_yaml, from_yaml
    ),
    "config.yaml of a model": Kind(
        "run/config.yaml", lambda f: stage_of_run(str(f / "run")), to_yaml, from_yaml, True
    ),
    "config.yaml of a card": Kind(
        "run/config.yaml",
        lambda f: card_of(checkpoint_in(f / "run")),
        to_yaml, from_yaml, True,
    ),
    "run.json": Kind(
        "run/run.json",
        lambda f: card_of(checkpoint_in(f / "run")),
        **JSON,
    ),
    "manifest": Kind("native/wuerstchen_pl.json", lambda f: read_model(f / "native"), **JSON),
    "native config": Kind(
        "native/prior/config.json", lambda f: read_model(f / "native", "prior"), **JSON
    ),
    "native weights": Kind(
        "native/prior/model.safetensors", lambda f: read_model(f / "native", "prior")
    ),
    "index of shards": Kind(
        "sharded/prior/model.safetensors.index.json",
        lambda f: read_model(f / "sharded", "prior"),
        **JSON,
    ),
    "model_index.json": Kind(
        "diffusers/wuerstchen/model_index.json", lambda f: read_model(f / "diffusers"), **JSON
    ),
    **{
        f"diffusers' {part}": Kind(
            f"diffusers/{part}/{name}",
            partial(read_part, Path(part).name),
            **JSON,
        )
        for part, name in (
            ("wuerstchen-prior/prior", "config.json"),
            ("wuerstchen/decoder", "config.json"),
            ("wuerstchen/vqgan", "config.json"),
            ("wuerstchen/text_encoder", "config.json"),
            ("wuerstchen/compressor", "config.json"),
            ("wuerstchen/scheduler", "scheduler_config.json"),
            ("wuerstchen/tokenizer", "special_tokens_map.json"),
        )
    },
    **{
        name: Kind(
            f"diffusers/wuerstchen/tokenizer/{name}",
            lambda f: read_model(f / "diffusers", "text_encoder"),
        )
        for name in ("vocab.json", "merges.txt")
    },
    "upstream": Kind(
        "upstream/model_v3_stage_c.pt", lambda f: read_model(f / "upstream"),
        torch.save, from_checkpoint,
    ),
    "cache.json": Kind("cache/cache.json", lambda f: open_cache(f / "cache"), **JSON),
    "images.json": Kind("images/images.json", lambda f: ImageFolder(f / "images").prompts, **JSON),
    "COCO prompts": Kind("coco.json", lambda f: read_prompts(str(f / "coco.json")), **JSON),
}  # fmt: skip


def open_cache(folder: Path) -> None:
    data = CachedDataModule(root=str(folder), batch_size=2)
    data.prepare_data()
    data.setup()
    next(iter(data.train_dataloader()))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file of every kind."""
    root = tmp_path_factory.mktemp("files")
    assert run_program("train", small("a", root / "out")) == 0
    shutil.move(root / "out/default/a", root / "run")
    for sidecar in (root / "run/checkpoints").glob("*.sha256"):
        sidecar.unlink()
    for format in ("native", "diffusers", "upstream"):
        model = random_model()
        if format == "upstream":
            model.parts = {k: p for k, p in model.parts.items() if "text" not in k}
        registry.write_model(model, root / format, format)
    shutil.copytree(root / "native", root / "sharded")
    prior = root / "sharded/prior"
    state = load_file(prior / "model.safetensors")
    (prior / "model.safetensors").rename(prior / "one.safetensors")
    to_json(
        {"weight_map": dict.fromkeys(state, "one.safetensors")},
        prior / "model.safetensors.index.json",
    )
    cached = [*what_cache_reads(small("b", root / "out")), f"paths.stage_a={root / 'run'}"]
    assert run_program("cache", [*cached, f"out={root / 'cache'}"]) == 0
    (root / "images").mkdir()
    Image.new("RGB", (32, 32)).save(root / "images/0.png")
    to_json({"prompts": ["a"]}, root / "images/images.json")
    to_json({"annotations": [{"image_id": 1, "id": 1, "caption": "a"}]}, root / "coco.json")
    return root


def sentence(kind: Kind, folder: Path) -> str | None:
    """The error that a user reads, or None if the file is accepted."""
    try:
        kind.read(folder)
    except Exception as error:
        return explain(error)
    return None


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_a_file_with_any_contents_is_accepted_or_named(
    name: str, every: bool, files: Path, tmp_path: Path
) -> None:
    kind = KINDS[name]
    top = kind.file.split("/")[0]
    if (files / top).is_dir():
        shutil.copytree(files / top, tmp_path / top)
    else:
        shutil.copyfile(files / top, tmp_path / top)
    path = tmp_path / kind.file
    assert sentence(kind, tmp_path) is None
    valid = path.read_bytes()
    contents = list(changes(kind.parse(path))) if kind.parse and kind.dump else []
    if not every and len(contents) > SAMPLE:
        contents = random.Random(0).sample(contents, SAMPLE)
    raw = {"half": valid[: len(valid) // 2], "empty": b"", "random": os.urandom(999)}
    wrong, refused = {}, 0
    for change, content in [*contents, *raw.items(), ("folder", None)]:
        path.unlink()
        if change == "folder":
            path.mkdir()
        elif change in raw:
            path.write_bytes(content)
        else:
            assert kind.dump
            kind.dump(content, path)
        message = sentence(kind, tmp_path)
        refused += message is not None
        if message is not None and (path.name not in message or "HYDRA_FULL_ERROR" in message):
            wrong[change] = message
    assert wrong == {}
    assert kind.is_optional or refused >= 2


def without(content: dict[str, Any], *path: str) -> dict[str, Any]:
    """A copy of nested dicts without one entry."""
    key, *rest = path
    if not rest:
        return {k: v for k, v in content.items() if k != key}
    return {**content, key: without(content[key], *rest)}


@pytest.mark.parametrize(
    "path",
    ["loops.fit_loop", "optimizer_states", "lr_schedulers", "files", "ema", "ema.shadow",
     "ImageTextDataModule.pending", "pytorch-lightning_version"],
)  # fmt: skip
def test_a_run_resumes_only_from_a_complete_checkpoint(
    path: str, files: Path, tmp_path: Path, program: Callable[..., int],
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    content = from_checkpoint(checkpoint_in(files / "run"))
    damaged = tmp_path / "step0000004.ckpt"
    torch.save(without(content, *path.split(".")), damaged)
    assert program("train", *small("a", tmp_path / "new", steps=5), f"ckpt={damaged}") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {damaged} " in error
    assert "HYDRA_FULL_ERROR" not in error
