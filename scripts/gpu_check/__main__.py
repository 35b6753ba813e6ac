"""Check the package on a GPU: ``make gpu-check``, or ``python -m scripts.gpu_check [SECTION ...]``.

Each section runs in its own process with its own time limit; one that fails is reported, and the
next one runs. The table goes to ``benchmarks/``, and with the logs, grids and the profile to the
folder that the environment variable OUT names. ``TINY=1`` runs everything at tiny sizes, on the
CPU too, and writes to OUT only.
"""

import argparse
import glob
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.gpu_check.rows import HEADER, Row, failed
from scripts.gpu_check.sizes import FULL, TINY, Check, Size
from wuerstchen_pl.plural import plural

ROOT = Path(__file__).parents[2]
PREPARED = ROOT / ".gpu"
LIMITS = {
    "environment": 30, "parity": 45, "compiled": 90, "programs": 170, "stage_c": 100,
    "stage_c_fsdp": 80, "stage_b": 70, "sampling": 80, "kernels": 30, "profile_c": 30,
    "openmoji": 600,
}  # fmt: skip
"""Section -> its time limit in seconds; the last one uses what is left."""
LOG_LINES = 15
"""Lines of its log that are shown of a section that fails."""


def main() -> None:
    """Run the sections, and write the table after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", default=list(LIMITS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=570, help="time limit of all sections")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(LIMITS):
        parser.error(f"unknown section {unknown.pop()!r}; choose from {', '.join(LIMITS)}")
    install_wheels()
    tiny = os.environ.get("TINY") == "1"
    out = Path(os.environ.get("OUT", ROOT / "outputs/gpu_check"))
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as work:
        drawings = shards(Path(work), tiny=tiny)
        check = Check(TINY if tiny else FULL, out, Path(work), drawings, 0.0)
        lines: list[str] = []
        for name in options.sections:
            left = deadline - time.monotonic()
            limit = left if tiny else min(LIMITS[name], left)
            rows = run_section(name, check._replace(seconds=limit))
            lines += [row.in_table(name) for row in rows]
            write(lines, check.size, out)
    missed = sum(line.endswith("MISSED |") for line in lines)
    print(f"{plural(missed, 'expectation')} missed")


def install_wheels() -> None:
    """Install the wheels of ``.gpu/`` beside them, if the package's dependencies are missing."""
    if importlib.util.find_spec("hydra") is None:
        site = PREPARED / "site"
        wheels = glob.glob(str(PREPARED / "wheels/*.whl"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(site), *wheels], check=True)
        sys.path.append(str(site))


def shards(work: Path, *, tiny: bool) -> str:
    """OpenMoji at 128 px: what ``gpu-prepare`` drew; where there is nothing, it is drawn now."""
    prepared = next(PREPARED.glob("openmoji-128-*"), None)
    if prepared is not None and not tiny:
        return str(prepared)
    from wuerstchen_pl.data.sources.openmoji import OpenMoji  # needs the wheels

    source = OpenMoji(root=str(work), image_size=128, limit=64 if tiny else None)
    source.prepare()
    return str(source.folder)


def run_section(name: str, check: Check) -> list[Row]:
    """Run a section in a process group, which is killed after the section's time limit."""
    rows_file, log = check.work / f"{name}.jsonl", check.out / "log.txt"
    rows_file.touch()
    command = [sys.executable, "-m", "scripts.gpu_check.section", name, str(rows_file)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        # a section that is killed may leave truncated files in the compiler's cache
        "TORCHINDUCTOR_CACHE_DIR": str(check.work / f"inductor_{name}"),
    }
    start = time.monotonic()
    error: Exception | None = None
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, check.to_json()], cwd=ROOT, env=environment, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(0.0, check.seconds))
            if code:
                error = RuntimeError(f"exit code {code}")
        except subprocess.TimeoutExpired:
            error = TimeoutError(f"stopped after {check.seconds:.0f} s")
        finally:
            kill_group(process)
    rows = [Row(*json.loads(line)) for line in rows_file.read_text().splitlines()]
    if error is not None:
        print("\n".join(log.read_text().splitlines()[-LOG_LINES:]))
        rows.append(failed("the section", error))
    print(f"-- {name}: {time.monotonic() - start:.0f} s", flush=True)
    return rows


def kill_group(process: subprocess.Popen) -> None:
    """Kill what is left of a section: itself, its training runs and their workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        return
    process.wait()


def write(lines: list[str], size: Size, out: Path) -> None:
    """Write the table to OUT, and at full size to ``benchmarks/``."""
    from scripts.timing import OUTPUT_DIR, write_table  # torch may come from the wheels

    notes = "See CONTRIBUTING.md for what each section decides."
    path = write_table("gpu", "make gpu-check", notes, HEADER, lines, folder=out)
    if size.full:
        shutil.copy(path, OUTPUT_DIR)


if __name__ == "__main__":
    main()
