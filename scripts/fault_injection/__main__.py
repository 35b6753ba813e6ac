"""Inject faults into programs: ``python -m scripts.fault_injection kills --times 50``.

kills: SIGKILL at random times, during startup, steps and saves; with ``--processes 2``, of one of
the two processes. full-disk: the disk fills up during the run, and is then enlarged. read-only: the
disk becomes read-only during the run, and then writable again. ends: the run ends by max_steps,
max_epochs and max_time. startup: SIGTERM and SIGINT before the first step. folders: two programs
in one output folder.

Except for folders, the run then resumes with ckpt=auto. At the end, every tensor and counter is
compared with those of an undisturbed run; the exit code is 1 if any differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.fault_injection.disk import disk_fault
from scripts.fault_injection.ends import ends
from scripts.fault_injection.folders import folders
from scripts.fault_injection.kills import kills
from scripts.fault_injection.startup import startup
from wuerstchen_pl.plural import plural

DISK = ("full-disk", "read-only")
MAY_MOUNT = "FAULT_INJECTION_MAY_MOUNT"


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["kills", *DISK, "ends", "startup", "folders"])
    parser.add_argument("overrides", nargs="*", help="keys of the run, such as trainer=fsdp")
    parser.add_argument("--times", type=int, default=50, help="number of kills or signals")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the run")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run; kills only")
    parser.add_argument("--seed", type=int, default=0, help="seed of their times")
    options = parser.parse_intermixed_args()
    if options.kind in DISK and MAY_MOUNT not in os.environ:
        command = ["unshare", "--map-root-user", "--mount"]
        command += [sys.executable, "-m", "scripts.fault_injection", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, MAY_MOUNT: "1"}).returncode)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors = inject(options, Path(folder))
    if errors:
        shown = ", ".join(errors[:5])
        sys.exit(f"{plural(len(errors), 'difference')} from the undisturbed run: {shown}")
    print("as expected" if options.kind == "folders" else "bit-equal to the undisturbed run")


def inject(options: argparse.Namespace, root: Path) -> list[str]:
    """Inject the faults of a kind; returns what is not as it should be."""
    if options.kind == "folders":
        return folders(root)
    run = {"steps": options.steps, "overrides": options.overrides}
    if options.kind == "ends":
        return ends(root, **run)
    if options.kind in DISK:
        return disk_fault(root, kind=options.kind, **run)
    run |= {"times": options.times, "seed": options.seed}
    if options.kind == "startup":
        return startup(root, **run)
    return kills(root, processes=options.processes, **run)


if __name__ == "__main__":
    main()
