"""Guards an output folder that several runs of a program fill.

The settings that the result depends on are stored in the folder first, so that no later run resumes
with different ones.
"""

import json
from pathlib import Path
from typing import Any

from wuerstchen_pl.io.atomic import write_text

_SETTINGS = ".settings.json"


def claim_output(folder: Path, settings: dict[str, Any], *, key: str) -> None:
    """Claim a new or empty folder for these settings, or check that an earlier run did.

    Args:
        folder: a new folder, or one that an earlier run with the same settings began.
        settings: what the result depends on, as JSON values.
        key: the config key that errors name.

    Raises:
        ValueError: the folder has other contents or other settings.
    """
    new = json.loads(json.dumps(settings))
    marker = folder / _SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.is_file():
        existing = [path for path in folder.iterdir() if not path.name.startswith(marker.stem)]
        if existing and not marker.is_file():  # another process may have just claimed it
            raise ValueError(f"{key}={str(folder)!r} contains other files; use a new folder")
        write_text(marker, json.dumps(new))
        return
    try:
        old: dict[str, Any] = dict(json.loads(marker.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{key}={str(folder)!r} has a damaged {_SETTINGS}, which records its settings; "
            "use another folder, or delete that one"
        ) from error
    if changed := sorted(k for k in {**old, **new} if old.get(k) != new.get(k)):
        raise ValueError(
            f"{key}={str(folder)!r} was begun with {changed[0]}={old.get(changed[0])!r}, but now "
            f"it is {new.get(changed[0])!r}; use another folder, or delete that one"
        )
