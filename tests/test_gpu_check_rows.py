"""Expectations of the GPU check: their verdicts, and the table."""

import json
import sys
from pathlib import Path

import pytest

from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check import section
from scripts.gpu_check.rows import Row, at_least, at_most, equal, failed, within
from scripts.gpu_check.sizes import FULL, TINY, Check, Size
from scripts.timing import hardware


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (at_least("a", 0.5, 0.5, "{:.0%}"), "ok"),
        (at_least("a", 0.49, 0.5, "{:.0%}"), "MISSED"),
        (at_most("a", 1.05, 1.05, "{:.2f}"), "ok"),
        (at_most("a", 1.06, 1.05, "{:.2f}"), "MISSED"),
        (at_most("a", float("nan"), 1.0, "{:.2f}"), "MISSED"),
        (within("a", 0.91, 0.1), "ok"),
        (within("a", 1.11, 0.1), "MISSED"),
        (within("a", 0.89, 0.1), "MISSED"),
        (within("a", 0.89, 0.1, judged=False), "not judged"),
        (equal("a", 1, 0), "MISSED"),
        (failed("a", RuntimeError("b")), "MISSED"),
        (Row("a", "b"), ""),
    ],
)
def test_a_verdict_compares_with_what_is_expected(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_a_row_survives_its_file_and_keeps_the_columns_of_the_table() -> None:
    row = at_least("a | b", 0.25, 0.5, "{:.0%}")
    assert Row(*json.loads(json.dumps(row))) == row
    assert row.in_table("s") == "| s | a / b | 25% | at least 50% | MISSED |"


@pytest.mark.parametrize("size", [FULL, TINY])
def test_a_check_reaches_the_process_of_a_section_unchanged(size: Size) -> None:
    check = Check(size, Path("out"), Path("work"), "shards", 12.5)
    decoded = Check.from_json(check.to_json())
    assert decoded == check
    assert hash(decoded.size) == hash(size)  # sections cache configurations by size


SECTIONS = {
    "quick": "yield Row('size', check.size.preset)",
    "cache": "yield Row('cache', os.environ['TORCHINDUCTOR_CACHE_DIR'])",
    "cache_again": "yield Row('cache', os.environ['TORCHINDUCTOR_CACHE_DIR'])",
    "failing": "raise ValueError('broken')",
    "endless": "time.sleep(600)",
}


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """A check whose sections are those of ``SECTIONS``."""
    package = tmp_path / "scripts/gpu_check"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    for name in ("rows", "sizes", "section"):
        source = Path(section.__file__).with_name(f"{name}.py").read_text()
        (package / f"{name}.py").write_text(source)
    for name, source in SECTIONS.items():
        source = f"def rows(check):\n    yield Row('one', '1')\n    {source}\n"
        imports = "import os\nimport time\nfrom scripts.gpu_check.rows import Row\n"
        (package / f"{name}.py").write_text(imports + source)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    return Check(TINY, tmp_path, tmp_path, "", 100.0)


def test_a_section_runs_in_its_own_process(checks: Check) -> None:
    assert gpu_check.run_section("quick", checks) == [Row("one", "1"), Row("size", "tiny")]


def test_a_section_that_fails_keeps_its_rows_and_says_why(
    checks: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = gpu_check.run_section("failing", checks)
    assert first == Row("one", "1")
    assert last.verdict == "MISSED"
    assert "ValueError: broken" in capsys.readouterr().out


def test_a_killed_section_cannot_damage_the_compiler_cache_of_the_next(checks: Check) -> None:
    names = ("cache", "cache_again")
    folders = {gpu_check.run_section(name, checks)[-1].measured for name in names}
    assert len(folders) == 2
    assert all(Path(folder).parent == checks.work for folder in folders)


def test_a_section_is_stopped_at_its_time_limit(checks: Check) -> None:
    *_, last = gpu_check.run_section("endless", checks._replace(seconds=3.0))
    assert last.measured == "TimeoutError: stopped after 3 s"


def test_the_table_names_the_hardware_and_tiny_ones_stay_out_of_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LIMITS", {"absent": 10.0})
    monkeypatch.setattr(gpu_check, "shards", lambda *_, **__: "")
    monkeypatch.setattr(gpu_check, "run_section", lambda *_: [equal("codes", 3, 3)])
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TINY", "1")
    before = set(gpu_check.ROOT.glob("benchmarks/*"))
    gpu_check.main()
    (table,) = tmp_path.glob("gpu_*.md")
    assert hardware() in table.read_text()
    assert "| absent | codes | 3 | 3 | ok |" in table.read_text()
    assert set(gpu_check.ROOT.glob("benchmarks/*")) == before
