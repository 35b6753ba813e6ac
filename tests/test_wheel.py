"""The wheel works outside the checkout: it contains conf/ and the console commands."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"wuerstchen_pl/{name}" for name in shipped} <= set(names)
    commands = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for program in ("train", "sample", "evaluate", "convert", "export", "interpolate"):
        assert f"wuerstchen-{program} = wuerstchen_pl.{program}:main" in commands
        stage = ["stage=c"] if program == "train" else []
        shown = subprocess.run(
            [sys.executable, "-m", f"wuerstchen_pl.{program}", "--cfg", "job", *stage],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        expected = (
            "format: native"
            if program in ("convert", "export", "interpolate")
            else "_target_: wuerstchen_pl."
        )
        assert expected in shown.stdout
    code = "import wuerstchen_pl.cli.config as c; print(c.conf_dir())"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert process.stdout.strip() == str(site / "wuerstchen_pl/conf")
