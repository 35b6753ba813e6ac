"""A sweep over guidance and steps, and its plot."""

import json
import sys
from pathlib import Path

import pytest

from scripts import plot_sweep
from tests.conftest import run_program


@pytest.mark.slow
def test_a_sweep_is_plotted_from_its_reports(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    overrides = ["-m", f"model={cascade / 'c'}", f"output_dir={tmp_path}", "metric=[retrieval]"]
    overrides += ["num_prompts=3", "sample.decoder_steps=1", "sample.prior_steps=1,2"]
    assert run_program("evaluate", [*overrides, "sample.prior_guidance_scale=1,4"]) == 0
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("*/metrics.json")]
    points = plot_sweep.points(tmp_path, "retrieval/top5", "prior_guidance_scale", "prior_steps")
    assert [(p.line, p.x) for p in points] == [
        (f"prior_steps {steps}", scale) for steps in (1, 2) for scale in (1, 4)
    ]
    values = {(r["settings"]["prior_steps"], r["settings"]["prior_guidance_scale"]):
              r["metrics"]["retrieval/top5"]["value"] for r in reports}  # fmt: skip
    assert [p.value for p in points] == [values[s, g] for s in (1, 2) for g in (1, 4)]
    command = ["plot_sweep.py", str(tmp_path), "--metric", "retrieval/top5"]
    monkeypatch.setattr(sys, "argv", command)
    plot_sweep.main()
    assert (tmp_path / "retrieval_top5.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_metric_or_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no report; evaluate first, with -m"):
        plot_sweep.points(tmp_path, "fid", "prior_steps", "sampler")
    report = {"settings": {"prior_steps": 1}, "metrics": {"clip": {}}}
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="has no metric fid; choose from clip"):
        plot_sweep.points(tmp_path, "fid", "prior_steps", "prior_steps")
    with pytest.raises(SystemExit, match="has no setting sampler; choose from prior_steps"):
        plot_sweep.points(tmp_path, "clip", "prior_steps", "sampler")
