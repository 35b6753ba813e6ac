"""Several training runs in one torchrun: ``-m tests.distributed.launch JOBS.json``.

JOBS.json is a list of command lines of ``wuerstchen_pl.train``. They share their processes, as
starting one takes longer than training such a small model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import run_program


def launch(jobs: list[list[str]], folder: Path, processes: int = 2) -> None:
    """Run the jobs one after the other, each on ``processes`` processes."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "-m", "tests.distributed.launch", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-9000:]


if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        if run_program("train", arguments):
            sys.exit(f"failed: {' '.join(arguments)}")
