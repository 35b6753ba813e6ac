"""The claim on an output folder: a program writes only to a folder that it has claimed."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from wuerstchen_pl.io.atomic import write_text
from wuerstchen_pl.io.folder_lock import LOCK, locked

SETTINGS = ".settings.json"


@contextmanager
def claimed(
    folder: Path,
    *,
    key: str,
    settings: Mapping[str, Any] | None = None,
    record: str = SETTINGS,
    must_be_empty: bool = False,
    is_owner: bool = True,
) -> Iterator[None]:
    """Create a folder, unless it exists, to write to it within the block.

    No other program can claim it meanwhile. If the block fails before it writes anything, a folder
    that was created is removed again.

    Args:
        folder: the output folder.
        key: the config key that errors name.
        settings: what the contents depend on, as JSON values. They are recorded in the folder, and
            only a run with the same settings may resume what another one began. None: any run may
            add to the folder.
        record: name of the file that records ``settings``.
        must_be_empty: refuse a folder that contains anything. It is not locked, as it must be
            replaced by one that is complete; see ``atomic_folder``.
        is_owner: False for all but the first process of a program that runs in several.

    Raises:
        BlockingIOError: if another program has claimed it.
        FileExistsError: if the folder must be empty and is not.
        ValueError: if the folder has other settings, or contents without recorded settings.
        OSError: if it cannot be created.
    """
    if must_be_empty and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{key}={folder} already exists; choose another folder, or remove it")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder, key=key) if is_owner and not must_be_empty else nullcontext():
            if settings is not None:
                _record(folder / record, json.loads(json.dumps(settings)), key)
            yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def _record(path: Path, settings: dict[str, Any], key: str) -> None:
    """Record the settings, or check that those of an existing file are the same."""
    recorded = path.is_file()
    if all(file.name.startswith((path.name, LOCK)) for file in path.parent.iterdir()):
        write_text(path, json.dumps(settings, indent=1, ensure_ascii=False))
        return
    if not recorded and not path.is_file():  # another process may have just written it
        raise ValueError(f"{key}={path.parent} contains other files; use a new folder")
    try:
        old: dict[str, Any] = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{key}={path.parent} has a damaged {path.name}, which records its settings; "
            "use another folder, or delete that one"
        ) from error
    changed = sorted(k for k in {**old, **settings} if old.get(k) != settings.get(k))
    if changed:
        before, now = (reprlib.repr(values.get(changed[0])) for values in (old, settings))
        raise ValueError(
            f"{key}={path.parent} was begun with {changed[0]}={before}, but now it is {now}; "
            "use another folder, or delete that one"
        )
