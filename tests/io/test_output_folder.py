"""The claim on an output folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from wuerstchen_pl.io.output_folder import SETTINGS, claimed


def fill(folder: Path, **options: Any) -> None:
    with claimed(folder, key="to", **options):
        (folder / "result").write_text("done")


def test_runs_with_equal_settings_share_a_folder(tmp_path: Path) -> None:
    settings = {"crops": 2, "sizes": [(64, 64)]}
    fill(tmp_path / "out", settings=settings)
    fill(tmp_path / "out", settings=settings)
    assert json.loads((tmp_path / "out" / SETTINGS).read_text()) == {
        "crops": 2,
        "sizes": [[64, 64]],
    }
    message = r"to=.*out was begun with crops=2, but now it is 3; use another folder"
    with pytest.raises(ValueError, match=message):
        fill(tmp_path / "out", settings=settings | {"crops": 3})
    with pytest.raises(ValueError, match=r"was begun with text=None, but now it is True"):
        fill(tmp_path / "out", settings=settings | {"text": True})


def test_settings_that_nothing_was_made_with_do_not_bind(tmp_path: Path) -> None:
    with claimed(tmp_path, key="to", settings={"crops": 1}):
        pass
    fill(tmp_path, settings={"crops": 2})
    assert json.loads((tmp_path / SETTINGS).read_text()) == {"crops": 2}


def test_contents_of_unknown_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="contains other files; use a new folder"):
        fill(tmp_path, settings={})
    with pytest.raises(FileExistsError, match=r"to=.* already exists; choose another folder"):
        fill(tmp_path, must_be_empty=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    fill(tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    fill(tmp_path, settings={"crops": 1}, record="made.json")
    (tmp_path / "made.json").write_text('{"crops')
    with pytest.raises(ValueError, match=r"has a damaged made\.json"):
        fill(tmp_path, settings={"crops": 1}, record="made.json")


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_removes_only_a_new_and_empty_folder(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
    with pytest.raises(ZeroDivisionError), claimed(folder, key="to"):
        _ = 1 / 0
    assert folder.exists() == exists
    with pytest.raises(FileExistsError), claimed(folder, key="to"):
        [(folder / "part").mkdir() for _ in range(2)]
    assert (folder / "part").exists()
