"""Caches: training from a cache equals training on images, and a stale cache is an error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import frozen_text, run_program, small, what_cache_reads
from wuerstchen_pl.checkpointing import allowed, load
from wuerstchen_pl.data.caches.cached_dataset import CachedDataModule, CachedSource
from wuerstchen_pl.data.datamodule import ImageTextDataModule

STEPS = 8  # two epochs of the small data


SOURCE_KEYS = ("data.limit=24", "data.val_fraction=0.2")
"""Arguments that a cache does not take."""


def arguments(stage: str, root: Path, cascade: Path, *overrides: str) -> list[str]:
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    return [*small(stage, root, STEPS), *paths, f"paths.data={cascade.parent / 'data'}", *overrides]


def make(stage: str, out: Path, cascade: Path, *overrides: str) -> int:
    command = arguments(
        stage, out.parent / "none", cascade, f"out={out}", "dtype=float32", *overrides
    )
    return run_program("cache", what_cache_reads(command))


def train(stage: str, root: Path, cascade: Path, *overrides: str) -> dict[str, torch.Tensor]:
    command = arguments(stage, root, cascade, *overrides)
    if "data=cached" in command:
        command = [a for a in command if a not in SOURCE_KEYS]
    assert run_program("train", command) == 0
    return load.read_checkpoint(load.find_checkpoint(root / "default" / stage))["state_dict"]


def max_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


@pytest.mark.parametrize("stage", [pytest.param("b", marks=pytest.mark.slow), "c"])
def test_training_from_a_cache_equals_training_on_images(
    stage: str, cascade: Path, tmp_path: Path
) -> None:
    online = train(stage, tmp_path / "online", cascade, "data.crop=center")
    assert make(stage, tmp_path / "cache", cascade, "data.crop=center") == 0
    cached = ["data=cached", f"data.root={tmp_path / 'cache'}", "data.num_workers=0"]
    assert max_difference(online, train(stage, tmp_path / "cached", cascade, *cached)) < 1e-5
    shifted = train(stage, tmp_path / "seed", cascade, *cached, "data.seed=5")
    assert max_difference(online, shifted) > 1e-4  # another order gives another result


@pytest.mark.slow
def test_cached_text_is_dropped_as_captions_are(cascade: Path, tmp_path: Path, clip: Path) -> None:
    text = frozen_text(clip)
    online = train("c", tmp_path / "online", cascade, "data.crop=center", *text)
    assert make("c", tmp_path / "cache", cascade, "data.crop=center", "text=true", *text) == 0
    cached = ["data=cached", f"data.root={tmp_path / 'cache'}", "data.num_workers=0"]
    assert max_difference(online, train("c", tmp_path / "cached", cascade, *cached, *text)) < 1e-5
    undropped = [*cached, *text, "stage.caption_drop_prob=0"]
    assert max_difference(online, train("c", tmp_path / "undropped", cascade, *undropped)) > 1e-4


def module_of(root: Path, cascade: Path, **changes: Any) -> ImageTextDataModule:
    """The data module of Stage C's run config, with changed arguments."""
    import yaml

    config = yaml.safe_load((cascade / "c/config.yaml").read_text())["data"] | changes
    module: ImageTextDataModule = allowed.instantiate_allowed(config)
    module.prepare_data()
    module.setup()
    return module


def test_the_crops_are_those_of_the_first_epochs(cascade: Path, tmp_path: Path) -> None:
    assert make("b", tmp_path / "cache", cascade, "crops=2") == 0
    online = module_of(tmp_path, cascade).train_dataloader()
    seen: dict[str, list[torch.Tensor]] = {}
    for _ in range(12):
        for batch in online:
            for key, image in zip(batch["key"], batch["image"], strict=True):
                seen.setdefault(key, []).append(image)
    source, different = CachedSource(root=str(tmp_path / "cache")), 0
    for group in source.groups("train"):
        for name in group.shards:
            with safe_open(tmp_path / "cache" / name, framework="pt") as file:
                for sample in source.open(name).samples:
                    rows = file.get_slice(f"image/{sample.height}x{sample.width}")
                    crops = rows[sample.offset : sample.offset + 2]
                    assert torch.equal(crops[0], seen[sample.key][0])
                    assert torch.equal(crops[1], seen[sample.key][1])
                    different += not torch.equal(crops[0], crops[1])
    assert different > 3


def test_a_cached_module_samples_among_the_crops(cascade: Path, tmp_path: Path) -> None:
    assert make("b", tmp_path / "cache", cascade, "crops=3") == 0
    module = CachedDataModule(root=str(tmp_path / "cache"), batch_size=4)
    module.prepare_data()
    module.setup()
    loader, crops_by_key = module.train_dataloader(), {}
    for _ in range(12):
        for batch in loader:
            for key, image in zip(batch["key"], batch["image"], strict=True):
                crops_by_key.setdefault(key, set()).add(image.numpy().tobytes())
    assert {len(crops) for crops in crops_by_key.values()} >= {1, 3}
    first, second = (list(module.val_dataloader()) for _ in range(2))
    assert [b["key"] for b in first] == [b["key"] for b in second]
    assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_training_from_a_cache_resumes_bit_for_bit(
    stop: int, cascade: Path, tmp_path: Path
) -> None:
    assert make("c", tmp_path / "cache", cascade) == 0
    cached = ["data=cached", f"data.root={tmp_path / 'cache'}", "data.num_workers=0"]
    whole = train("c", tmp_path / "whole", cascade, *cached)
    train("c", tmp_path / "parts", cascade, *cached, f"trainer.max_steps={stop}")
    assert max_difference(whole, train("c", tmp_path / "parts", cascade, *cached, "ckpt=auto")) == 0


def contents(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "cache.json").read_text())
    return {s["name"]: (folder / s["name"]).read_bytes() for s in manifest["shards"]} | {
        "manifest": manifest
    }


def test_an_interrupted_cache_resumes(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wuerstchen_pl.data.caches import build_cache

    out, write, written = tmp_path / "parts", build_cache._write, []

    def interrupted_write(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(build_cache, "_samples_per_file", lambda *_: 6)
    monkeypatch.setattr(build_cache, "_write", interrupted_write)
    assert make("c", out, cascade) != 0
    assert not (out / "cache.json").exists()
    with pytest.raises(FileNotFoundError, match="is not a finished cache"):
        CachedSource(root=str(out))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(before) == 2
    monkeypatch.setattr(build_cache, "_write", write)
    assert make("c", out, cascade) == 0
    assert {n: t for n, t in _times(out).items() if n in before} == before
    assert make("c", tmp_path / "whole", cascade) == 0
    assert contents(out) == contents(tmp_path / "whole")


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_two_processes_make_the_same_cache(cascade: Path, tmp_path: Path) -> None:
    assert make("c", tmp_path / "one", cascade) == 0
    overrides = arguments("c", tmp_path, cascade, f"out={tmp_path / 'two'}", "dtype=float32")
    command = [sys.executable, "-m", "wuerstchen_pl.cache", *what_cache_reads(overrides)]
    processes = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# Errors


def test_a_stale_cache_is_an_error_that_names_the_difference(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert make("c", tmp_path / "cache", cascade) == 0
    other = tmp_path / "other" / "b"
    assert (
        run_program("train", [*small("b", tmp_path / "new", 2), f"paths.stage_a={cascade / 'a'}"])
        == 0
    )
    shutil.copytree(tmp_path / "new/default/b", other)
    command = arguments(
        "c", tmp_path / "run", cascade, "data=cached", f"data.root={tmp_path / 'cache'}"
    )
    command = [a for a in command if a not in SOURCE_KEYS]
    capsys.readouterr()
    assert run_program("train", [*command, f"paths.stage_b={tmp_path / 'new/default/b'}"]) == 1
    assert "is a cache made with encoder " in capsys.readouterr().err
    manifest = json.loads((tmp_path / "cache/cache.json").read_text())
    (tmp_path / "cache/cache.json").write_text(json.dumps(manifest | {"preprocessing": 0}))
    assert run_program("train", command) == 1
    assert "is stale" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cache_of_another_text_encoder_is_refused(
    cascade: Path, tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture
) -> None:
    assert make("c", tmp_path / "cache", cascade, "text=true", *frozen_text(clip)) == 0
    state = torch.load(clip, weights_only=True)
    changed = tmp_path / "changed.safetensors"
    save_file({k: v.contiguous() * 1.01 for k, v in state.items()}, changed)
    command = arguments(
        "c", tmp_path / "run", cascade, "data=cached", f"data.root={tmp_path / 'cache'}"
    )
    command = [a for a in command if a not in SOURCE_KEYS]
    capsys.readouterr()
    assert run_program("train", [*command, *frozen_text(changed)]) == 1
    assert "is a cache made with text_encoder " in capsys.readouterr().err
    assert run_program("train", command) == 1  # this run trains its own text encoder
    assert "this run has none" in capsys.readouterr().err


def test_a_stage_that_trains_on_images_is_refused(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert program("cache", "stage=a", f"out={tmp_path / 'out'}") == 1
    assert "stage=a trains on images, not on a cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("c", ["crops=0"], "crops=0 is out of range"),
        ("c", ["trainer.max_steps=9"], "cache does not read trainer.max_steps"),
        ("c", ["logger=csv"], "cache does not read logger"),
        ("c", ["stage.optimizer.lr=1"], "cache does not read stage.optimizer.lr"),
        ("c", ["optimizer@stage.optimizer=adamw"], "cache does not read stage.optimizer"),
        ("c", ["dtype=int8"], "dtype is 'int8'"),
        ("b", ["data.mask=alpha"], "data.mask='alpha' needs the images; remove it, or"),
        ("b", ["data.control=true"], "data.control=True needs the images; remove it, or"),
        ("c", ["text=true"], "stage.train_text_encoder=true; set text=false"),
        ("b", ["text=true"], "stage=b has none"),
        (
            "c",
            ["text=true", "stage.train_text_encoder=false", "data.captions.trigger=sks"],
            "data.captions.trigger='sks' cannot change cached text embeddings; remove it, or",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused(
    cascade: Path,
    tmp_path: Path,
    stage: str,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    command = what_cache_reads(arguments(stage, tmp_path, cascade))
    assert run_program("cache", [*command, f"out={tmp_path / 'out'}", *more]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_or_other_settings_is_refused(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    assert make("c", tmp_path / "mine", cascade) == 1
    assert "contains other files" in capsys.readouterr().err
    assert make("c", tmp_path / "cache", cascade) == 0
    assert make("c", tmp_path / "cache", cascade, "crops=2") == 1
    assert "was begun with crops=1, but now it is 2" in capsys.readouterr().err


def test_a_damaged_file_of_a_cache_is_refused_by_name(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert make("c", tmp_path / "cache", cascade) == 0
    path = next((tmp_path / "cache").glob("train*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    module = CachedDataModule(root=str(tmp_path / "cache"), batch_size=4)
    with pytest.raises(ValueError, match=rf"{path.name} is not the file that cache\.json lists"):
        module.prepare_data()
