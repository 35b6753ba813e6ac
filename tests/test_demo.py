"""The demo's report page, for a small cascade."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from scripts.demo_page import NEW_CAPTIONS, write_page
from wuerstchen_pl.evaluation.datasets import run_data


def test_the_page_shows_images_curves_and_metrics(
    program: Callable[..., int], cascade: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs" / "default"
    shutil.copytree(cascade, folder)
    overrides = ["num_prompts=4", "sample.prior_steps=2", "sample.decoder_steps=1"]
    evaluation = folder / "evaluation"
    assert program("evaluate", f"model={folder / 'c'}", f"output_dir={evaluation}", *overrides) == 0
    page = write_page(folder, bf16=False).read_text(encoding="utf-8")
    num_validation = sum(len(batch["image"]) for batch in run_data(folder / "c").in_order("val"))
    assert page.count("<figure") == len(NEW_CAPTIONS) + 2 * 4 + 3 * num_validation
    assert page.count("<svg") == 3
    metrics = json.loads((evaluation / "metrics.json").read_text())["metrics"]
    assert f"<th>stage_a/psnr</th><td>{metrics['stage_a/psnr']['value']:.4g}</td>" in page
    assert (folder / "new_captions.png").is_file()
