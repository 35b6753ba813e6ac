"""The fine-tuning demo: its images, and the share of line art among generated ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts import demo_finetuning
from scripts.finetuning_images import demo_drawings, render_line_art, vehicles
from wuerstchen_pl.data.sources.openmoji import select
from wuerstchen_pl.data.sources.rasterize import rasterize
from wuerstchen_pl.evaluation.image_folder import MANIFEST, ImageFolder


def saturation(image: np.ndarray) -> np.ndarray:
    """Largest minus smallest channel of each pixel."""
    return np.ptp(image.astype(int), axis=-1)


def test_line_art_has_the_lines_of_a_drawing_and_no_color() -> None:
    for drawing in select(demo_drawings(), None, 12):
        colored = np.asarray(rasterize(drawing.path, 64))
        lines = np.asarray(render_line_art(drawing).resize(colored.shape[1::-1]))
        assert saturation(lines).max() <= 8, drawing.caption
        assert lines.min() < 64, drawing.caption  # black
        assert lines.mean() > colored.mean(), drawing.caption


def test_vehicles_are_not_among_the_drawings_of_the_demo() -> None:
    chosen = vehicles(20)
    assert len({drawing.caption for drawing in chosen}) == 20
    assert not {d.key for d in chosen} & {d.key for d in demo_drawings()}


@pytest.mark.parametrize(("kind", "share"), [("line-art", 1.0), ("colored", 0.0)])
def test_the_share_of_line_art_among_line_art_and_among_colored_drawings(
    kind: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_finetuning, "ROOT", tmp_path)
    monkeypatch.setattr(demo_finetuning, "NUM_UNSEEN", 8)
    demo_finetuning.write_all_images()
    assert len((tmp_path / "captions.txt").read_text().splitlines()) == 291
    folder = tmp_path / f"{kind}-unseen"
    paths = sorted(folder.glob("*.png"))
    prompts = [path.with_suffix(".txt").read_text() for path in paths]
    (folder / MANIFEST).write_text(json.dumps({"prompts": prompts}))
    for index, path in enumerate(paths):  # names of generated images
        path.rename(folder / f"{index:06d}-0.png")
        path.with_suffix(".txt").rename(folder / f"{index:06d}-0.txt")
    assert demo_finetuning.share_of_line_art(ImageFolder(folder)) == share
