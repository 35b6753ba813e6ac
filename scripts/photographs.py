"""Collect photographs of Debian's packages: ``python -m scripts.photographs my/images``.

Before: ``sudo apt-get install plasma-workspace-wallpapers mate-backgrounds`` (Debian 12). Each
photograph is copied in its largest size; its caption is made from its name.
"""

import argparse
import re
import shutil
from pathlib import Path

WALLPAPERS = "usr/share/wallpapers"
BACKGROUNDS = "usr/share/backgrounds/mate/nature"


def photographs(root: Path) -> dict[str, Path]:
    """The largest file of each photograph, by name."""
    largest: dict[str, Path] = {}
    for path in sorted((root / WALLPAPERS).glob("*/contents/images/*")):
        name = path.parents[2].name
        if name not in largest or path.stat().st_size > largest[name].stat().st_size:
            largest[name] = path
    return largest | {path.stem: path for path in sorted((root / BACKGROUNDS).glob("*.jpg"))}


def caption(name: str) -> str:
    """FreshFlower -> fresh flower."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


def main() -> None:
    """Copy the photographs, and write their captions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("to", type=Path, help="a new folder")
    parser.add_argument("--root", type=Path, default=Path("/"), help="of the installed packages")
    options = parser.parse_args()
    options.to.mkdir(parents=True)
    for name, path in photographs(options.root).items():
        shutil.copy(path, options.to / f"{name}{path.suffix}")
        (options.to / f"{name}.txt").write_text(f"{caption(name)}\n")


if __name__ == "__main__":
    main()
