"""Several training runs in one torchrun: ``-m tests.distributed.launch JOBS.json``.

JOBS.json is a list of command lines of ``wuerstchen_pl.train``. They share their processes, as
starting one takes longer than training such a small model.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import run_program


def launch(jobs: list[list[str]], folder: Path, processes: int = 2, nodes: int = 1) -> None:
    """Run the jobs one after the other, each on ``processes`` processes of each of ``nodes``."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    rendezvous = "--standalone"
    if nodes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "torch.distributed.run", *rendezvous.split(), f"--nnodes={nodes}",
        f"--nproc-per-node={processes}", "-m", "tests.distributed.launch", str(path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(nodes)
    ]
    errors = [process.communicate(timeout=500)[1] for process in running]
    assert not any(process.returncode for process in running), "".join(errors)[-9000:]


if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        if run_program("train", arguments):
            sys.exit(f"failed: {' '.join(arguments)}")
