"""The commands ``python -m wuerstchen_pl.data check`` and ``build``."""

import json
import os
import sys
from pathlib import Path

import hydra
import pytest
from PIL import Image

from tests.conftest import run_program
from tests.data.factories import encode, image
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.data import __main__ as program
from wuerstchen_pl.data import build as building
from wuerstchen_pl.data.histogram import plot_histograms
from wuerstchen_pl.data.sources.shards import ShardSource


def run(*arguments: str) -> int:
    return run_program("data", list(arguments))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i, (width, height) in enumerate([(64, 64)] * 6 + [(96, 48)] * 3 + [(20, 20)] * 2):
        (root / f"{i:02d}.a.jpg").write_bytes(image(f"{i}", width, height))
        (root / f"{i:02d}.a.txt").write_text(f"number {i}")
    (root / "00.a.txt").unlink()
    whole = (root / "01.a.jpg").read_bytes()
    (root / "01.a.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    return root


def test_check_reports_contents_and_usable_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "data=folder",
        f"data.root={folder}",
        "bucket_multiple=32",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert run("check", *arguments, "full=true") == 0
    output = capsys.readouterr().out
    assert "1 shard, 0 of them damaged" in output
    assert "11 complete samples" in output
    assert "1 dropped: no caption" in output
    assert "1 bad: unreadable image, such as 000000000-000000011/01.a.jpg" in output
    assert "2 dropped: max_upscale" in output
    assert "7 images left" in output
    assert "4 in 64 x 64 px, 4 x 4 semantic positions" in output
    assert "3 in 64 x 96 px, 4 x 6 semantic positions" in output
    # 96 x 48 is cropped to 72 x 48: a quarter of three of seven images is cropped away.
    cropped = 3 * 24 * 48 / (3 * 96 * 48 + 4 * 64 * 64)
    assert f"{cropped:.1%} of their pixels" in output
    assert (tmp_path / "out/sizes.png").read_bytes().startswith(b"\x89PNG")
    assert run("check", *arguments) == 0
    assert "8 images left" in capsys.readouterr().out  # metadata do not reveal the truncated one


@pytest.mark.parametrize(
    ("stage", "experiment", "keys"),
    [
        ("a", None, []),
        ("b", "demo", ["image_size=96", "bucket_multiple=32"]),
        ("c", "laion", ["preset=v2"]),
    ],
)
def test_check_inspects_the_data_of_the_training(
    stage: str, experiment: str | None, keys: list[str]
) -> None:
    overrides = [f"stage={stage}", *keys]
    overrides += [f"experiment={experiment}"] if experiment else []
    overrides += ["data.urls=x"] if experiment == "laion" else []
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        train, check = (hydra.compose(name, overrides) for name in ("train", "check"))
    assert check.data == train.data
    assert check.image_size_at_24 == train.image_size_at_24


def test_check_fails_if_nothing_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "data=folder",
        f"data.root={folder}",
        "image_size=64",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert run("check", *arguments, "data.filters.min_size=500") == 1
    captured = capsys.readouterr()
    assert "11 dropped: min_size" in captured.out
    assert "nothing is left to train on" in captured.err


def test_the_histogram_shows_the_distribution() -> None:
    ratios, sides = plot_histograms([(64, 64)] * 9 + [(128, 64)], [(64, 64), (32, 64)]).axes
    bars = {patch.get_x() + patch.get_width() / 2: patch.get_height() for patch in ratios.patches}
    filled = {ratio: height for ratio, height in bars.items() if height}
    assert sorted(filled.values()) == [1, 9]
    assert max(filled, key=filled.__getitem__) == pytest.approx(1, rel=0.05)
    assert max(filled) == pytest.approx(2, rel=0.05)
    assert [line.get_xdata()[0] for line in ratios.lines] == [1, 2]  # the buckets
    assert sum(patch.get_height() for patch in sides.patches) == 10


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_build_writes_the_folder_to_shards(
    folder: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture
) -> None:
    (folder / "02.a.jpg").unlink()
    (folder / "02.a.png").write_bytes(encode(Image.new("RGB", (64, 64), "red"), "PNG"))
    to = tmp_path / "shards"
    assert (
        run("build", f"from={folder}", f"to={to}", "shard_samples=4", f"num_workers={workers}") == 0
    )
    assert "10 samples in 3 shards" in capsys.readouterr().out
    source = ShardSource(urls=str(to))
    samples = [
        s for group in source.groups("train") for n in group.shards for s in source.open(n).samples
    ]
    assert [s.captions[0] for s in samples] == [f"number {i}" for i in range(1, 11)]
    for i, sample in enumerate(samples, start=1):
        kind = "png" if i == 2 else "jpg"
        assert source.read(sample) == (folder / f"{i:02d}.a.{kind}").read_bytes()
    entries = json.loads((to / "shards.json").read_text())["shards"]
    assert [entry["samples"] for entry in entries] == [4, 4, 2]
    assert [entry["bytes"] for entry in entries] == [
        os.path.getsize(to / e["name"]) for e in entries
    ]


def test_build_resumes_after_an_interruption(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "build",
        f"from={folder}",
        f"to={tmp_path / 'parts'}",
        "shard_samples=3",
        "num_workers=0",
    ]
    members, calls = building._members, []

    def interrupt(data: bytes, sample: object) -> dict[str, bytes]:
        calls.append(sample)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return members(data, sample)

    monkeypatch.setattr(building, "_members", interrupt)
    assert run(*arguments) != 0
    assert [p.name for p in (tmp_path / "parts").glob("*.tar")] == ["00000.tar"]
    calls.clear()
    monkeypatch.setattr(building, "_members", lambda d, s: calls.append(s) or members(d, s))
    assert run(*arguments) == 0
    assert len(calls) == 7  # of ten, three were written before
    whole = [arg.replace("parts", "whole") for arg in arguments]
    assert run(*whole) == 0
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    first, second = (
        json.loads((tmp_path / n / "shards.json").read_text()) for n in ("parts", "whole")
    )
    assert first == second


def test_check_also_inspects_validation_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("build", f"from={folder}", f"to={tmp_path / 'tars'}", "num_workers=0") == 0
    (tmp_path / "val.tar").write_bytes(b"garbage")
    arguments = [
        "image_size=64",
        f"data.urls={tmp_path / 'tars'}",
        f"data.val_urls={tmp_path / 'val.tar'}",
    ]
    assert run("check", "data=shards", *arguments, f"output_dir={tmp_path / 'out'}") == 0
    train, val = capsys.readouterr().out.split("for validation:")
    assert "1 shard, 0 of them damaged" in train
    assert "1 shard, 1 of them damaged" in val
    assert "1 bad: damaged shard" in val


def test_names_with_invalid_unicode_are_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    arguments = ["data=folder", f"data.root={folder}", "image_size=512"]
    assert run("check", *arguments, f"output_dir={tmp_path / 'o'}") == 1
    assert "caf\\udce9.jpg" in capsys.readouterr().out


def test_damaged_build_records_are_rebuilt_or_rejected(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [f"from={folder}", f"to={tmp_path / 'out'}", "shard_samples=4", "num_workers=0"]
    assert run("build", *arguments) == 0
    before = (tmp_path / "out/shards.json").read_text()
    (tmp_path / "out/.written.jsonl").write_text('null\n[1]\n{"number": 0}\n{"number": 1, "con')
    (tmp_path / "out/00009.tar").write_bytes(b"written, but not recorded, before the source shrank")
    assert run("build", *arguments) == 0
    assert (tmp_path / "out/shards.json").read_text() == before
    assert not (tmp_path / "out/00009.tar").exists()
    (tmp_path / "out/.settings.json").write_text('{"shard')
    assert run("build", *arguments) == 1
    assert "has a damaged .settings.json" in capsys.readouterr().err


def test_build_rewrites_changed_shards(folder: Path, tmp_path: Path) -> None:
    def built(name: str) -> dict[str, int]:
        arguments = [f"from={folder}", f"to={tmp_path / name}", "shard_samples=3", "num_workers=0"]
        assert run("build", *arguments) == 0
        return {p.stem: p.stat().st_mtime_ns for p in sorted((tmp_path / name).glob("*.tar"))}

    first = built("out")
    (folder / "06.a.txt").write_text("another caption")  # in the second shard
    (folder / "09.a.jpg").unlink()  # in the third shard, which the samples of the fourth now fill
    second = built("out")
    assert [second.get(name) == time for name, time in first.items()] == [True, False, False, False]
    assert len(second) == 3
    (tmp_path / "out/00001.tar").write_bytes(b"cut short")
    third = built("out")
    assert [third[name] == time for name, time in second.items()] == [True, False, True]
    assert built("new").keys() == third.keys()
    for name in ("00000.tar", "00001.tar", "00002.tar", "shards.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_build_keeps_several_captions(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(image("a", 64, 64))
    (tmp_path / "in/metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    assert run("build", f"from={tmp_path / 'in'}", f"to={tmp_path / 'out'}", "num_workers=0") == 0
    source = ShardSource(urls=str(tmp_path / "out"))
    assert source.open(str(tmp_path / "out/00000.tar")).samples[0].captions == ("one", "two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["look"], "look is not a command; use check or build"),
        (["build", "to=x"], "from is missing; set from="),
        (
            ["build", "from=x", "to=y", "data=openmoji"],
            "from=x needs data=folder",
        ),
        (["build", "from=/nowhere", "to=y"], r"data.root='/nowhere' is not a folder"),
        (["build", "from={folder}", "to={folder}"], "contains other files; use a new folder"),
        (
            ["build", "from={folder}", "to={out}", "shard_samples=0"],
            "shard_samples=0 is out of ran",
        ),
        (["check", "data=folder"], "data.root is missing"),
        (["check", "data.no_such_key=1"], "data.no_such_key"),
        (["check"], "data is not set; use data=folder data.root=..., or another data="),
        (["check", "data=folder", "data.root="], "data.root='' is empty; use the folder"),
        (["check", "data=hf", "data.name="], "data.name='' is empty; use the name"),
        (["check", "data=shards", "data.urls="], "data.urls=() names no shard"),
        (["check", "data=openmoji", "trainer.devices=2"], "check does not read trainer.devices"),
    ],
)
def test_wrong_calls_end_with_a_one_line_error(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    filled = [a.format(folder=folder, out=tmp_path / "out") for a in arguments]
    before = sys.argv
    sys.argv = ["data", *filled]
    try:
        with pytest.raises(SystemExit) as stop:
            program.main()
    finally:
        sys.argv = before
    output = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in output
    assert output.strip().count("\n") == 0


def test_a_folder_begun_with_other_settings_is_rejected(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["build", f"from={folder}", f"to={tmp_path / 'out'}", "num_workers=0"]
    assert run(*arguments, "shard_samples=4") == 0
    assert run(*arguments, "shard_samples=5") == 1
    assert "was begun with shard_samples=4, but now it is 5" in capsys.readouterr().err
