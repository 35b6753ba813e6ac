"""Fill ``.gpu/`` for a machine without a network: ``make gpu-prepare``.

The machine has Python 3.12 and torch 2.11 with torchvision, lightning, torchmetrics, timm and
transformers. ``.gpu/`` gets the wheels of what else the check needs, and OpenMoji drawn at 128 px.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from wuerstchen_pl.data.sources.openmoji import OpenMoji

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu"
WHEELS = (
    "hydra-core", "omegaconf<2.4", "open_clip_torch", "ftfy", "wcwidth", "webdataset",
    "braceexpand", "simplejpeg", "diffusers", "importlib_metadata",
)  # fmt: skip
SOURCES = ("antlr4-python3-runtime==4.9.3",)
"""Packages without a wheel; omegaconf needs this version."""
PLATFORM = (
    "--only-binary=:all:", "--python-version=3.12", "--implementation=cp",
    "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
)  # fmt: skip
LIMIT = 60e6
"""Bytes that the folder may have, so that it is quick to copy."""


def main() -> None:
    """Download the wheels and draw OpenMoji."""
    wheels = FOLDER / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = [sys.executable, "-m", "pip"]
    options = ["--quiet", "--no-deps"]
    download = [*pip, "download", *options, *PLATFORM, "--dest", str(wheels), *WHEELS]
    subprocess.run(download, check=True)
    build = [*pip, "wheel", *options, "--wheel-dir", str(wheels), *SOURCES]
    subprocess.run(build, check=True)
    OpenMoji(root=str(FOLDER), image_size=128).prepare()
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {size / 1e6:.0f} MB")
    if size > LIMIT:
        sys.exit(f"{FOLDER} has more than {LIMIT / 1e6:.0f} MB; remove what the check does not use")


if __name__ == "__main__":
    main()
