"""The images of the fine-tuning demo: OpenMoji drawings as line art, and vehicles."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from wuerstchen_pl.data.sources.openmoji import Drawing, drawings, select
from wuerstchen_pl.data.sources.rasterize import rasterize

DEMO_GROUPS = ("animals-nature", "food-drink")
"""The drawings that the demo's model was trained on."""
VEHICLES = (*range(0x1F680, 0x1F6A3), *range(0x1F6E9, 0x1F6FD))
"""Code points of vehicles, which the demo's model never saw."""
IMAGE_SIZE = 64
_SVG = "{http://www.w3.org/2000/svg}"
_FILLS = ("color", "hair", "skin", "skin-shadow")
"""OpenMoji's layers below the lines."""


def demo_drawings() -> list[Drawing]:
    """All drawings of the demo's model."""
    return select(drawings(), DEMO_GROUPS, None)


def vehicles(count: int) -> list[Drawing]:
    """``count`` vehicles and what belongs to traffic."""
    candidates = [d for d in drawings() if int(d.key.split("-")[0], 16) in VEHICLES]
    return select(candidates, None, count)


def write_images(folder: Path, chosen: Sequence[Drawing], *, line_art: bool = False) -> None:
    """Write each drawing as a PNG, and its caption beside it."""
    folder.mkdir(parents=True)
    for drawing in chosen:
        image = render_line_art(drawing) if line_art else rasterize(drawing.path, IMAGE_SIZE)
        image.save(folder / f"{drawing.key}.png")
        (folder / f"{drawing.key}.txt").write_text(drawing.caption)


def render_line_art(drawing: Drawing) -> Image.Image:
    """A drawing without its fills."""
    tree = ElementTree.parse(drawing.path)
    for layer in tree.getroot().findall(f"{_SVG}g"):
        if layer.get("id") in _FILLS:
            layer.clear()
    with tempfile.NamedTemporaryFile(suffix=".svg") as file:
        tree.write(file)
        file.flush()
        return rasterize(file.name, IMAGE_SIZE)
