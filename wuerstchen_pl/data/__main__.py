"""Inspect data, or write them to shards: ``python -m wuerstchen_pl.data check|build``.

python -m wuerstchen_pl.data check data=folder data.root=my/images full=true
python -m wuerstchen_pl.data build from=my/images to=my/shards
"""

import sys
from collections.abc import Mapping
from typing import Any

from wuerstchen_pl.cli import command

CHECK_KEYS: Mapping[str, Any] = {
    "data": dict,
    "image_size": int,
    "bucket_multiple": int,
    "seed": int,
    "require_caption": bool,
    "full": bool,
    "output_dir": str,
    "paths.data": str,
}
COMMANDS = {
    "check": command("check", __doc__, CHECK_KEYS),
    "build": command("build", __doc__),
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name in COMMANDS:
        del sys.argv[1]
        COMMANDS[name]()
    elif name in ("--help", "-h"):
        print(__doc__)
    else:
        sys.exit(f"data: {name} is not a command; use check or build, then key=value ...")


if __name__ == "__main__":
    main()
