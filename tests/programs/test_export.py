"""Uploads of an export, and what a dry run says without a token."""

from collections.abc import Callable
from pathlib import Path

import pytest

from wuerstchen_pl.formats import hub, registry
from wuerstchen_pl.programs import export


@pytest.mark.parametrize("token", [None, "t"])
def test_an_export_is_uploaded_if_there_is_a_token(
    token: str | None,
    cascade: Path,
    program: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    uploads: list[set[str]] = []

    class Api:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            assert registry.read_model(folder_path).parts
            uploads.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(export, "get_token", lambda: token)
    keys = [f"ckpt={cascade / 'c'}", f"to={tmp_path / 'model'}", "license=mit", "push=me/mine"]
    assert program("export", *keys) == 0
    printed = capsys.readouterr().out
    if token is None:
        assert uploads == []
        files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
        assert all(str(path.relative_to(tmp_path / "model")) in printed for path in files)
        assert f"push=me/mine would upload {len(files)} files; log in with" in printed
    else:
        assert uploads == [{path.name for path in (tmp_path / "model").iterdir()}]
        assert printed.endswith("https://hub/me/mine\n")


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("adapter", "has no adapter, as all its weights were trained"),
        ("words", "learned no words, which experiment=token does"),
    ],
)
def test_what_a_run_added_is_exported_only_of_a_run_that_has_it(
    format: str,
    message: str,
    cascade: Path,
    program: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    keys = [f"ckpt={cascade / 'c'}", f"to={tmp_path / 'export'}", f"format={format}"]
    assert program("export", *keys) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
