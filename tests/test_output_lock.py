"""No program writes to a folder that another one is writing to."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import small, what_cache_reads
from wuerstchen_pl.io.folder_lock import locked

COMMANDS = {
    "train": "{train} paths.output_dir={out}",
    "cache": "{cache} out={out}",
    "data": "build from={images} to={out}",
    "evaluate": "fid_features=random fid_features.widths=[2] model=null metric=[fid] "
    "images={images} reference={images} output_dir={out}",
    "sample": "model={model} prompt=x output_dir={out} device=cpu",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_use_is_refused_and_stays_as_it_is(
    name: str, cascade: Path, tmp_path: Path, program: Any, capsys: pytest.CaptureFixture
) -> None:
    out, images = tmp_path / "out", tmp_path / "images"
    out.mkdir()
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a")
    training = [*small("a", tmp_path), f"paths.data={cascade.parent / 'data'}"]
    with_b = [a for a in small("b", tmp_path) if not a.startswith("paths.root")]
    with_b += [f"paths.stage_a={cascade / 'a'}", f"paths.data={cascade.parent / 'data'}"]
    command = COMMANDS[name].format(
        out=out, images=images, model=cascade / "c",
        train=" ".join(training), cache=" ".join(what_cache_reads(with_b)),
    )  # fmt: skip
    with locked(out, key="test"):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert program(name, *command.split(" ")) == 1
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert f"={out} is in use by process " in capsys.readouterr().err.strip().splitlines()[-1]
