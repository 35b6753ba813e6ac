"""Weights of a variant, such as fp16, in folders of the diffusers format."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.formats.conftest import random_model, tensors
from wuerstchen_pl.formats import hub, registry

Program = Callable[..., int]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the diffusers format, with plain names."""
    path = tmp_path_factory.mktemp("written") / "model"
    registry.write_model(random_model(), path, "diffusers")
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy whose files may be renamed."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def weights(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.safetensors")) if "compressor" not in p.parts]


def add_variant(folder: Path, variant: str, *, keep: bool = False, shards: bool = False) -> None:
    """Add the weights in half precision under a variant's names; remove the others."""
    for path in weights(folder):
        if path.name.count(".") > 1:  # another variant
            continue
        state = {name: tensor.half() for name, tensor in load_file(path).items()}
        if shards:
            names, stem = sorted(state), path.stem
            parts = [f"{stem}.{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
            for part, chosen in zip(parts, (names[::2], names[1::2]), strict=True):
                save_file({name: state[name] for name in chosen}, path.with_name(part))
            index = {n: parts[i % 2] for i, n in enumerate(names)}
            path.with_name(f"{stem}.safetensors.index.{variant}.json").write_text(
                json.dumps({"weight_map": index})
            )
        else:
            save_file(state, path.with_name(f"{path.stem}.{variant}.safetensors"))
        if not keep:
            path.unlink()


def dtypes(folder: Path, variant: str | None) -> set[torch.dtype]:
    model = registry.read_model(str(folder), variant=variant)
    parts = {name: part for name, part in model.parts.items() if name != "compressor"}
    stored = {
        t.dtype for part in parts.values() for n, t in part.tensors.items() if "scale" not in n
    }
    return stored - {torch.int64}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_requested_or_the_only_variant_is_read(
    folder: Path, variant: str | None, keep: bool, shards: bool, caplog: pytest.LogCaptureFixture
) -> None:
    add_variant(folder, "fp16", keep=keep, shards=shards)
    half = variant == "fp16" or not keep
    with caplog.at_level(logging.INFO):
        assert dtypes(folder, variant) == {torch.float16 if half else torch.float32}
    says_so = "has only the weights of variant=fp16" in caplog.text
    assert says_so == (variant is None and not keep)


def test_weights_without_a_variant_replace_a_missing_one_with_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="no weights of variant=fp16: using those without"):
        assert dtypes(folder, "fp16") == {torch.float32}


def test_a_variant_that_is_missing_is_refused_with_those_that_are_there(folder: Path) -> None:
    add_variant(folder, "fp16", keep=True)
    add_variant(folder, "bf16")
    for variant in (None, "fp32"):
        with pytest.raises(FileNotFoundError) as error:
            dtypes(folder, variant)
        assert re.search(r"use variant=bf16 or variant=fp16$", str(error.value))
        assert "it has model.bf16.safetensors, model.fp16.safetensors;" in str(error.value)


def test_a_variant_is_refused_where_it_would_have_no_effect(tmp_path: Path) -> None:
    registry.write_model(random_model(), tmp_path / "native", "native")
    with pytest.raises(ValueError, match=r"variant=fp16 applies to the diffusers format.*native"):
        registry.read_model(str(tmp_path / "native"), variant="fp16")


def test_a_variant_applies_to_the_cascade_with_a_stage_c_of_another_format(
    folder: Path, tmp_path: Path
) -> None:
    add_variant(folder, "fp16")
    registry.write_model(random_model(), tmp_path / "native", "native")
    model = registry.read_model(str(folder), prior=str(tmp_path / "native"), variant="fp16")
    read = {key: tensor.dtype for key, tensor in tensors(model).items()}
    assert read["prior.stem.weight"] == torch.float32
    assert read["decoder.stem.weight"] == torch.float16


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_hub_repository_with_only_fp16_weights_is_downloaded(
    folder: Path, variant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_variant(folder, "fp16")
    ignored = []

    def download(repo: str, *, allow_patterns: list[str], ignore_patterns: Any, **_: Any) -> str:
        target = tmp_path / "hub"
        if not target.exists():
            shutil.copytree(folder, target)
        for path in weights(target):
            if ignore_patterns and any(path.match(pattern) for pattern in ignore_patterns):
                path.unlink()
        if not ignore_patterns:
            for path in weights(folder):
                (target / path.relative_to(folder)).write_bytes(path.read_bytes())
        ignored.append(ignore_patterns)
        return str(target)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert dtypes(Path("someone/fp16-only"), variant) == {torch.float16}
    assert len(ignored) == (2 if variant is None else 1)


def commands(folder: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    small = ["height=128", "width=128", "sample.prior_steps=1", "sample.decoder_steps=1"]
    yield "sample", [f"model={folder}", "prompt=a heart", *small, f"output_dir={out}"]
    prompts = out.with_name("prompts.txt")
    prompts.write_text("red heart\nblue bird\n")
    images = out.with_name("images")
    images.mkdir()
    for i in range(2):
        Image.new("RGB", (128, 128), (i, 99, 0)).save(images / f"{i}.png")
    features = ["fid_features=random", "fid_features.widths=[2,2]", f"cache_dir={out}/kept"]
    judged = ["metric=[kid]", f"prompts={prompts}", f"reference={images}", *features]
    yield "evaluate", [f"model={folder}", *judged, *small, f"output_dir={out}"]
    yield "convert", [f"from={folder}", f"to={out}"]
    yield "interpolate", [f"a={folder}", f"b={folder}", f"to={out}"]


@pytest.mark.parametrize(
    ("number", "variant"),
    [
        pytest.param(number, variant, marks=[] if number % 2 == len(variant) else pytest.mark.slow)
        for number in range(4)
        for variant in ((), ("variant=fp16",))
    ],
)
def test_programs_read_a_folder_of_fp16_weights(
    folder: Path, tmp_path: Path, program: Program, number: int, variant: tuple[str, ...]
) -> None:
    add_variant(folder, "fp16")
    name, arguments = list(commands(folder, tmp_path / "out"))[number]
    assert program(name, *arguments, *variant) == 0


def test_a_run_has_no_variant(
    cascade: Path, tmp_path: Path, program: Program, capsys: pytest.CaptureFixture
) -> None:
    for name, prompt in (("sample", "prompt=a"), ("evaluate", "metric=[validation_loss]")):
        output = f"output_dir={tmp_path / name}"
        assert program(name, f"model={cascade / 'c'}", prompt, "variant=fp16", output) == 1
        assert "error: variant=fp16 applies to the diffusers format" in capsys.readouterr().err
