"""What the programs import, and how a signal ends them while they do."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import run_program
from wuerstchen_pl.cli.signals import INTERRUPTED, REQUEUE, TERMINATED

COMMANDS = {
    "train": ["wuerstchen_pl.train", "stage=c"],
    "cache": ["wuerstchen_pl.cache", "stage=c"],
    "sample": ["wuerstchen_pl.sample", "prompt=frog"],
    "evaluate": ["wuerstchen_pl.evaluate"],
    "convert": ["wuerstchen_pl.convert"],
    "export": ["wuerstchen_pl.export"],
    "interpolate": ["wuerstchen_pl.interpolate"],
    "extract": ["wuerstchen_pl.lora", "extract"],
    "resize": ["wuerstchen_pl.lora", "resize"],
    "check": ["wuerstchen_pl.data", "check"],
    "build": ["wuerstchen_pl.data", "build"],
}
HEAVY = {"torch", "lightning", "open_clip", "torchvision", "transformers", "numpy", "matplotlib"}
LIST_MODULES = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("MODULES", *sys.modules)
"""
SEND_SIGNAL = """
import importlib.abc, os, runpy, sys
module, signum, *sys.argv = sys.argv[1:]

class Sender(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            os.kill(os.getpid(), int(signum))

sys.meta_path.insert(0, Sender())
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def imported(*arguments: str) -> set[str]:
    """The modules that a program imports."""
    command = [sys.executable, "-c", LIST_MODULES, *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    return set(process.stdout.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_no_library_but_omegaconf(name: str) -> None:
    modules = imported(*COMMANDS[name], "--help")
    assert "wuerstchen_pl.cli.help" in modules
    assert not {*HEAVY, "hydra", "tqdm", "wuerstchen_pl.programs"} & modules
    assert len(modules) < 300  # 214 on Python 3.11; 4,554 with Lightning and open_clip


def test_data_lists_its_commands(capsys: pytest.CaptureFixture) -> None:
    assert run_program("data", ["--help"]) == 0
    assert "wuerstchen_pl.data build from=" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_config_is_composed_without_torch(name: str) -> None:
    modules = imported(*COMMANDS[name], "--cfg", "job")
    assert "wuerstchen_pl.cli.jobs" in modules
    assert not {*HEAVY, "wuerstchen_pl.programs"} & modules


@pytest.mark.parametrize(
    "arguments",
    [
        ["--info", "defaults-tree"],
        ["sead=1"],
        ["stage.optimizer.lrr=1"],
        ["data.batchsize=4"],
        ["seed=x"],
        ["+surplus=1"],
    ],
    ids=" ".join,
)
def test_what_needs_no_constructor_needs_no_torch(arguments: list[str]) -> None:
    modules = imported(*COMMANDS["train"], *arguments)
    assert "wuerstchen_pl.cli.jobs" in modules
    assert not {*HEAVY, "wuerstchen_pl.programs"} & modules


def test_a_program_that_does_not_train_imports_neither_lightning_nor_open_clip() -> None:
    programs = ("sample", "convert", "export", "interpolate", "extract", "resize")
    imports = "; ".join(f"import wuerstchen_pl.programs.{name}" for name in programs)
    command = [sys.executable, "-c", f"import sys; {imports}; print(*sys.modules)"]
    modules = set(subprocess.run(command, capture_output=True, text=True).stdout.split())
    assert HEAVY & modules == {"torch", "numpy"}
    assert not {"torch._dynamo", "torch.distributed.checkpoint"} & modules


def test_runs_of_all_stages_are_read_without_lightning(cascade: Path) -> None:
    runs = [str(cascade / stage) for stage in "abc"]
    script = (
        "import sys; from wuerstchen_pl.formats.run import read_run; "
        f"[read_run(run) for run in {runs}]; print(*sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    modules = set(process.stdout.split())
    assert "wuerstchen_pl.models.vqgan" in modules
    assert not {"lightning", "torchmetrics", "peft", "wuerstchen_pl.stages"} & modules


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Started processes handle Ctrl-C, even if a shell runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Hydra is imported first. An exception while torch first imports numpy is lost (torch 2.14).
SENT_BEFORE = ("hydra", "torch", "numpy", "wuerstchen_pl.programs")
FAST = {("train", "numpy"), ("sample", "hydra")}
REQUIRED = {
    "cache": ["out=x"],
    "convert": ["from=x", "to=y"],
    "export": ["ckpt=x", "to=y"],
    "interpolate": ["a=x", "b=y", "to=z"],
    "extract": ["base=x", "tuned=y", "to=z"],
    "resize": ["lora=x", "base=y", "to=z"],
    "build": ["from=x", "to=y"],
}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        pytest.param(name, module, marks=[pytest.mark.slow] * ((name, module) not in FAST))
        for name in COMMANDS
        for module in SENT_BEFORE
    ],
)
def test_a_signal_during_imports_ends_the_program_with_its_code(
    name: str, module: str, signum: signal.Signals, tmp_path: Path
) -> None:
    script = [sys.executable, "-c", SEND_SIGNAL, module, str(int(signum))]
    command = [*script, *COMMANDS[name], *REQUIRED.get(name, [])]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    resume = "; the same command with ckpt=auto starts or resumes the run"
    code, said = {
        (signal.SIGINT, True): (INTERRUPTED, ""),
        (signal.SIGINT, False): (INTERRUPTED, ""),
        (signal.SIGTERM, True): (REQUEUE, f"stopped by SIGTERM{resume}\n"),
        (signal.SIGTERM, False): (TERMINATED, "stopped by SIGTERM\n"),
    }[signum, name == "train"]
    assert (process.returncode, process.stderr, process.stdout) == (code, said, "")
    assert not list(tmp_path.iterdir())
