"""The demo's page, of a small cascade."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from scripts.demo_page import OWN_CAPTIONS, write_page
from wuerstchen_pl.evaluation.datasets import run_data


def test_the_page_shows_images_curves_and_numbers(
    program: Callable[..., int], cascade: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs" / "default"
    shutil.copytree(cascade, folder)
    fast = ["num_prompts=4", "sample.prior_steps=2", "sample.decoder_steps=1"]
    measured = folder / "evaluation"
    assert program("evaluate", f"model={folder / 'c'}", f"output_dir={measured}", *fast) == 0
    page = write_page(folder, bf16=False).read_text(encoding="utf-8")
    validation = sum(len(batch["image"]) for batch in run_data(folder / "c").in_order("val"))
    assert page.count("<figure") == len(OWN_CAPTIONS) + 2 * 4 + 3 * validation
    assert page.count("<svg") == 3
    numbers = json.loads((measured / "metrics.json").read_text())["metrics"]
    assert f"<th>stage_a/psnr</th><td>{numbers['stage_a/psnr']['value']:.4g}</td>" in page
    assert (folder / "own_captions.png").is_file()
