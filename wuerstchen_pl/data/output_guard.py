"""A folder that a program fills over several runs, and whose it is.

The settings that a result depends on are in the folder from the beginning, so that no later run
resumes with others.
"""

import json
from pathlib import Path
from typing import Any

from wuerstchen_pl.io.atomic import write_text

_SETTINGS = ".settings.json"


def claim_output(folder: Path, settings: dict[str, Any], *, key: str) -> None:
    """Make a folder that of a result with these settings, or make sure that it is.

    Args:
        folder: a new one, or one that an earlier run with the same settings began.
        settings: what the result depends on, in plain values.
        key: of the config, which names the folder.

    Raises:
        ValueError: it holds something else.
    """
    written = json.loads(json.dumps(settings))
    mark = folder / _SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        others = [path for path in folder.iterdir() if not path.name.startswith(mark.stem)]
        if others and not mark.is_file():  # else another process has just made it ours
            raise ValueError(f"{key}={str(folder)!r} holds something else: choose a new folder.")
        write_text(mark, json.dumps(written))
        return
    try:
        before: dict[str, Any] = dict(json.loads(mark.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{key}={str(folder)!r} has a damaged {_SETTINGS}, which says what it was made of: "
            "choose another folder, or delete that one."
        ) from error
    if other := sorted(k for k in {**before, **written} if before.get(k) != written.get(k)):
        raise ValueError(
            f"{key}={str(folder)!r} was begun with {other[0]}={before.get(other[0])!r}, and now "
            f"it is {written.get(other[0])!r}: choose another folder, or delete that one."
        )
