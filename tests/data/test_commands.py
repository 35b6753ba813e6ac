"""`python -m wuerstchen_pl.data check` and `build`, as a user calls them."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_program
from tests.data.factories import encode, image
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


def test_check_says_what_there_is_and_what_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    told = ["data=folder", f"data.root={folder}", "image_size=64", f"output_dir={tmp_path / 'out'}"]
    assert run("check", *told, "full=true") == 0
    said = capsys.readouterr().out
    assert "1 shards, 0 of them damaged" in said
    assert "10 complete samples" in said
    assert "1 bad: no caption, such as " in said
    assert "1 bad: unreadable image, such as 000000000-000000011/01.a.jpg" in said
    assert "2 dropped by max_upscale" in said
    assert "7 images left" in said
    assert "4 in 64 x 64 px, 2 x 2 semantic positions" in said
    assert "3 in 64 x 96 px, 2 x 3 semantic positions" in said
    # Of 96 x 48, 72 x 48 are shown: a quarter of three of seven images is cut away.
    cropped = 3 * 24 * 48 / (3 * 96 * 48 + 4 * 64 * 64)
    assert f"{cropped:.1%} of their pixels" in said
    assert Image.open(tmp_path / "out/sizes.png").size[1] > 100
    assert run("check", *told) == 0
    assert "8 images left" in capsys.readouterr().out  # metadata do not tell of the cut one


def test_check_fails_where_nothing_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    told = ["data=folder", f"data.root={folder}", "image_size=64", f"output_dir={tmp_path / 'out'}"]
    assert run("check", *told, "data.filters.min_size=500") == 1
    captured = capsys.readouterr()
    assert "10 dropped by min_size" in captured.out
    assert "nothing is left to train on" in captured.err


def test_the_histogram_shows_where_the_images_are() -> None:
    img = np.asarray(plot_histograms([(64, 64)] * 9 + [(128, 64)], [(64, 64)]))
    blue = (img[..., 2].astype(int) - img[..., 0] > 80)[:, : img.shape[1] // 2]
    columns = np.flatnonzero(blue.any(0))
    heights = blue.sum(0)
    tall, short = heights[columns[0] + 3], heights[columns[-1] - 3]
    assert tall / short == pytest.approx(9, rel=0.1)
    middle = 52 + (520 - 52 - 16) / 2
    assert abs(columns[0] - middle) < 12  # 1:1 is in the middle
    assert columns[-1] > middle + 80  # and 2:1 to its right


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_build_writes_shards_that_hold_the_folder(
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
    for i, found in enumerate(samples, start=1):
        kind = "png" if i == 2 else "jpg"
        assert source.read(found) == (folder / f"{i:02d}.a.{kind}").read_bytes()
    listed = json.loads((to / "shards.json").read_text())["shards"]
    assert [entry["samples"] for entry in listed] == [4, 4, 2]
    assert [entry["bytes"] for entry in listed] == [os.path.getsize(to / e["name"]) for e in listed]


def test_build_goes_on_where_it_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        "build",
        f"from={folder}",
        f"to={tmp_path / 'parts'}",
        "shard_samples=3",
        "num_workers=0",
    ]
    members, calls = building._members, []

    def stops(data: bytes, sample: object) -> dict[str, bytes]:
        calls.append(sample)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return members(data, sample)

    monkeypatch.setattr(building, "_members", stops)
    assert run(*told) != 0
    assert [p.name for p in (tmp_path / "parts").glob("*.tar")] == ["00000.tar"]
    calls.clear()
    monkeypatch.setattr(building, "_members", lambda d, s: calls.append(s) or members(d, s))
    assert run(*told) == 0
    assert len(calls) == 7  # of ten, three were written before
    whole = [arg.replace("parts", "whole") for arg in told]
    assert run(*whole) == 0
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    first, second = (
        json.loads((tmp_path / n / "shards.json").read_text()) for n in ("parts", "whole")
    )
    assert first == second


def test_check_looks_at_shards_for_validation_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("build", f"from={folder}", f"to={tmp_path / 'tars'}", "num_workers=0") == 0
    (tmp_path / "val.tar").write_bytes(b"garbage")
    told = [
        "image_size=64",
        f"data.urls={tmp_path / 'tars'}",
        f"data.val_urls={tmp_path / 'val.tar'}",
    ]
    assert run("check", "data=shards", *told, f"output_dir={tmp_path / 'out'}") == 0
    train, val = capsys.readouterr().out.split("for validation:")
    assert "1 shards, 0 of them damaged" in train
    assert "1 shards, 1 of them damaged" in val
    assert "1 bad: damaged shard" in val


def test_names_that_are_no_unicode_are_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    assert run("check", "data=folder", f"data.root={folder}", f"output_dir={tmp_path / 'o'}") == 1
    assert "caf\\udce9.jpg" in capsys.readouterr().out


def test_damaged_notes_of_a_build_cost_work_or_end_with_a_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    told = [f"from={folder}", f"to={tmp_path / 'out'}", "shard_samples=4", "num_workers=0"]
    assert run("build", *told) == 0
    before = (tmp_path / "out/shards.json").read_text()
    (tmp_path / "out/.written.jsonl").write_text('null\n[1]\n{"number": 0}\n{"number": 1, "con')
    (tmp_path / "out/00009.tar").write_bytes(b"written, and not noted, before the source shrank")
    assert run("build", *told) == 0
    assert (tmp_path / "out/shards.json").read_text() == before
    assert not (tmp_path / "out/00009.tar").exists()
    (tmp_path / "out/.settings.json").write_text('{"shard')
    assert run("build", *told) == 1
    assert "has a damaged .settings.json" in capsys.readouterr().err


def test_build_writes_again_what_has_changed_since(folder: Path, tmp_path: Path) -> None:
    def built(name: str) -> dict[str, int]:
        told = [f"from={folder}", f"to={tmp_path / name}", "shard_samples=3", "num_workers=0"]
        assert run("build", *told) == 0
        return {p.stem: p.stat().st_mtime_ns for p in sorted((tmp_path / name).glob("*.tar"))}

    first = built("out")
    (folder / "06.a.txt").write_text("another caption")  # in the second shard
    (folder / "09.a.jpg").unlink()  # in the third, which the fourth and last now completes
    second = built("out")
    assert [second.get(name) == time for name, time in first.items()] == [True, False, False, False]
    assert len(second) == 3
    (tmp_path / "out/00001.tar").write_bytes(b"cut short")
    third = built("out")
    assert [third[name] == time for name, time in second.items()] == [True, False, True]
    assert built("new").keys() == third.keys()
    for name in ("00000.tar", "00001.tar", "00002.tar", "shards.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_captions_to_draw_from_survive_the_building(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(image("a", 64, 64))
    (tmp_path / "in/metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    assert run("build", f"from={tmp_path / 'in'}", f"to={tmp_path / 'out'}", "num_workers=0") == 0
    source = ShardSource(urls=str(tmp_path / "out"))
    assert source.open(str(tmp_path / "out/00000.tar")).samples[0].captions == ("one", "two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["look"], "look is not a command; give check or build"),
        (["build", "to=x"], "from is missing; set from="),
        (
            ["build", "from=x", "to=y", "data=openmoji"],
            "from=x names a folder, and data is another",
        ),
        (["build", "from=/nowhere", "to=y"], r"data.root='/nowhere' is not a folder"),
        (["build", "from={folder}", "to={folder}"], "holds something else: choose a new folder"),
        (
            ["build", "from={folder}", "to={out}", "shard_samples=0"],
            "shard_samples=0 is out of ran",
        ),
        (["check", "data=folder"], "data.root is missing"),
        (["check", "data.no_such_key=1"], "data.no_such_key"),
    ],
)
def test_wrong_calls_end_with_one_sentence(
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
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in said
    assert said.strip().count("\n") == 0


def test_a_folder_begun_with_other_settings_is_not_mixed_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    told = ["build", f"from={folder}", f"to={tmp_path / 'out'}", "num_workers=0"]
    assert run(*told, "shard_samples=4") == 0
    assert run(*told, "shard_samples=5") == 1
    assert "was begun with shard_samples=4, and now it is 5" in capsys.readouterr().err
