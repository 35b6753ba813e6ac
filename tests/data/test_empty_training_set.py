"""Every way in which a training set is empty names its cause; one image is enough to train."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import small
from tests.data.factories import image

Program = Callable[..., int]
CAPTIONED = {f"{i}.jpg": image(f"{i}", 80, 60) for i in range(3)}
TRUNCATED = {name: data[:700] for name, data in CAPTIONED.items()}  # with a size, without pixels
CASES: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "no file": ({}, [], "data.root='ROOT' contains no images"),
    "no row": ({"metadata.jsonl": b""}, [], "data.root='ROOT' contains no images"),
    "no image file": ({name: b"" for name in CAPTIONED}, [], "bad: 3 unreadable image); repair"),
    "no pixels": (TRUNCATED, [], "no image of a batch can be read"),
    "too small": (CAPTIONED, ["data.filters.min_size=99"], "; relax data.filters.min_size=99"),
    "no score": (CAPTIONED, ["data.filters.max_punsafe=0.5"], "3 no punsafe); relax data.filters."),
    "enlarged": (CAPTIONED, ["data.max_upscale=0.5"], "; relax data.max_upscale=0.5 (or lower"),
    "captions": (
        CAPTIONED,
        ["data.filters.forbidden_words=[word]"],
        "; relax data.filters.forbidden_words=['word']",
    ),
    "held out": (CAPTIONED, ["data.val_fraction=1"], "data.val_fraction=1 is out of range"),
    "limit": ({}, ["data=openmoji", "~data.root", "data.limit=0"], "data.limit=0 is out of range"),
}


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a word")
    return folder


def arguments(data: Path, out: Path) -> list[str]:
    network = [a for a in small("a", out, steps=2) if not a.startswith("data.")]
    return [*network, "data=folder", f"data.root={data}", "data.batch_size=2", "data.num_workers=0"]


@pytest.mark.parametrize("case", CASES)
def test_an_empty_training_set_names_its_cause(
    case: str, tmp_path: Path, program: Program, capsys: pytest.CaptureFixture
) -> None:
    files, overrides, message = CASES[case]
    root = written(tmp_path / "data", files)
    valid = arguments(root, tmp_path / "out")
    if "~data.root" in overrides:
        valid = [a for a in valid if not a.startswith("data.root=")]
        overrides = [o for o in overrides if o != "~data.root"]
    assert program("train", *valid, *overrides) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: .*{re.escape(message.replace('ROOT', str(root)))}", error)


@pytest.mark.parametrize(
    ("files", "overrides"),
    [
        (dict(list(CAPTIONED.items())[:1]), []),
        (dict.fromkeys(CAPTIONED, CAPTIONED["0.jpg"]), ["data.filters.deduplicate=true"]),
        (CAPTIONED, ["data.batch_size=64"]),
        (CAPTIONED, ["data.val_fraction=0.999"]),
    ],
    ids=["one image", "copies of one image", "batch larger than the set", "nearly all held out"],
)
def test_one_image_is_enough_to_train(
    files: dict[str, bytes], overrides: list[str], tmp_path: Path, program: Program,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    root = written(tmp_path / "data", files)
    assert program("train", *arguments(root, tmp_path / "out"), *overrides) == 0
    rows = (tmp_path / "out/default/a/metrics.csv").read_text()
    assert ("val/loss" in rows) == (len(files) > 1)
    messages = [str(warning.message) for warning in recwarn]
    skipped = [m for m in messages if "there is no validation sample" in m]
    assert len(skipped) == (len(files) == 1)
    assert not any("across ranks is zero" in m for m in messages)
