"""Error messages, help and sweeps of the command-line programs."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from tests.cli.test_config import composed
from tests.conftest import small
from wuerstchen_pl.callbacks.signals import Preempted
from wuerstchen_pl.cli.command import Command
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.cli.errors import _with_full_key, explain
from wuerstchen_pl.cli.help import help_text
from wuerstchen_pl.cli.jobs import one_line_logs
from wuerstchen_pl.cli.signals import REQUEUE

Program = Any


def test_a_users_error_is_shown_without_its_type() -> None:
    assert explain(ValueError("seed=-1 is\n  out of range")) == "seed=-1 is out of range"
    assert explain(FileNotFoundError("x is missing")) == "x is missing"


def test_an_internal_error_says_how_to_get_a_traceback() -> None:
    shown = explain(RuntimeError("mat1 and mat2"))
    assert shown == "RuntimeError: mat1 and mat2 (HYDRA_FULL_ERROR=1 shows where)"
    assert explain(KeyError()).startswith("KeyError")


def test_a_failed_run_leaves_no_global_state(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for arguments in (["stage=d"], ["stage=a", "seed=x"], ["-m", "stage=a", "seed=x,y"]):
        assert program("train", *arguments, f"paths.root={tmp_path}") == 1
        assert "HYDRA_FULL_ERROR" not in os.environ
        assert not GlobalHydra.instance().is_initialized()
    assert capsys.readouterr().err.count("error: ") == 2 + 3  # two jobs and the sweep


def test_a_traceback_is_shown_on_request(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="seed is 'x'"):
        program("train", "stage=a", "seed=x")


@pytest.mark.slow
@pytest.mark.parametrize("requested", [True, False])
def test_a_process_shows_a_traceback_only_on_request(requested: bool) -> None:
    env = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    command = [sys.executable, "-m", "wuerstchen_pl.train", "stage=a", "seed=x"]
    env |= {"HYDRA_FULL_ERROR": "1"} if requested else {}
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stdout == ""
    assert ("Traceback" in process.stderr) is requested
    assert requested or process.stderr == "error: seed is 'x', and must be int; set seed=...\n"


@pytest.mark.parametrize(
    "name", ["train", "sample", "evaluate", "convert", "export", "interpolate"]
)
def test_help_names_every_key_and_choice(
    name: str, program: Program, capsys: pytest.CaptureFixture
) -> None:
    assert program(name, "--help") == 0
    shown = capsys.readouterr().out
    assert f"python -m wuerstchen_pl.{name}" in shown
    assert "hydra" not in shown
    expected = {
        "train": [
            "stage=a|b|c|ldm",
            "|distill|dreambooth|finetune|laion|",
            "init_from: null # ",
        ],
        "sample": ["prompt: null # one, or a list", "num_images_per_prompt: 1 # images per prompt"],
        "evaluate": ["metric: [", "model: outputs/demo/c # "],
        "convert": ["from: ??? # a model of any format", "format: native"],
        "interpolate": ["weight: 0.5 # 0 to 1", "format: native"],
        "export": ["ckpt: ??? # a run's folder", "license: null # "],
    }
    assert all(text in shown for text in expected[name])


def test_help_does_not_change_what_runs() -> None:
    assert help_text("train", "what it does").startswith("what it does\n")


def test_help_explains_nested_keys_that_exist() -> None:
    """With the values that the program uses."""
    text = help_text("train", "")
    assert "--cfg job" in text
    lines = re.findall(r"^((?:data|trainer|callbacks)\.[\w.]+): (.*?) #", text, re.MULTILINE)
    cfg = composed("stage=c")
    shown = {key: yaml.safe_load(value) for key, value in lines}
    assert {"data.crop", "data.filters.min_size", "trainer.max_time"} <= shown.keys()
    for key, value in shown.items():
        if "${" not in str(value):
            assert OmegaConf.select(cfg, key, default="missing") == value, key
    assert "sample.prior_steps: 30 #" in help_text("sample", "")


def test_a_job_is_named_after_its_program(program: Program, capsys: pytest.CaptureFixture) -> None:
    assert program("train", "stage=a", "--cfg", "hydra", "-p", "hydra.job.name") == 0
    assert capsys.readouterr().out == "train\n"


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["sample"])
    monkeypatch.setattr("wuerstchen_pl.programs.sample.run", lambda cfg: print("W\u00fcrstchen"))
    Command(name="sample")()
    terminal.flush()
    assert terminal.buffer.getvalue() == b"W\\xfcrstchen\n"  # type: ignore[attr-defined]


def test_a_command_composes_its_config_once(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    compose = Hydra.compose_config

    def record(self: Hydra, config_name: str, **options: Any) -> DictConfig:
        names.append(config_name)
        return compose(self, config_name, **options)

    monkeypatch.setattr(Hydra, "compose_config", record)
    assert program("export", "ckpt=/no/run", "to=x") == 1
    assert names == ["export"]


# Sweeps


def test_a_config_may_ask_for_a_sweep(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without ``-m``, by ``hydra.mode`` in an experiment."""
    shutil.copytree(conf_dir(), tmp_path / "conf")
    sweep = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"seed": "x,y"}}}}
    text = "# @package _global_\n" + yaml.dump(sweep)
    (tmp_path / "conf/experiment/seeds.yaml").write_text(text)
    monkeypatch.setattr("wuerstchen_pl.cli.jobs.conf_dir", lambda: str(tmp_path / "conf"))
    assert program("train", "stage=a", "experiment=seeds", f"paths.root={tmp_path / 'out'}") == 1
    assert capsys.readouterr().err.count("error: ") == 3  # two jobs and the sweep


def finished(folder: Path) -> bool:
    return json.loads((folder / "run.json").read_text())["steps"] == 1


@pytest.mark.slow
def test_a_sweep_numbers_its_runs_and_keeps_them_apart(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also from a single run of the same name; a table shows their results."""
    arguments = small("a", tmp_path, steps=1)
    assert program("train", *arguments) == 0
    single = sorted(p.name for p in (tmp_path / "default/a").iterdir())
    arguments.remove("stage.optimizer.lr=1e-3")
    capsys.readouterr()
    assert program("train", "-m", *arguments, "stage.optimizer.lr=1e-3,1e-4") == 0
    assert sorted(p.name for p in (tmp_path / "default/a").iterdir()) == single
    *_, head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["job", "result", "overrides"]
    for number, line in enumerate((first, second)):
        job, result, override = line.split()
        log = (tmp_path / f"default/a_sweep/{number}/metrics.csv").read_text()
        loss = float(re.findall(r"val/loss,(\S+)", log)[-1])
        assert (job, override) == (str(number), f"stage.optimizer.lr={('0.001', '0.0001')[number]}")
        assert float(result) == pytest.approx(loss, rel=1e-3)
    runs = tmp_path / "default/a_sweep"
    assert sorted(p.name for p in runs.iterdir()) == ["0", "1", "multirun.yaml"]
    assert all(finished(runs / number) for number in "01")
    for number, lr in (("0", "0.001"), ("1", "0.0001")):
        config = (runs / number / "config.yaml").read_text()
        assert f"lr: {lr}\n" in config
        assert f"output_dir: {runs / number}\n" in config


def test_a_sweep_goes_through_all_jobs_and_reports_those_that_fail(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*small("a", tmp_path, steps=1), "stage.vqgan.width=0.5,16"]
    arguments.remove("stage.vqgan.width=16")
    assert program("train", "-m", *arguments) == 1
    out, err = capsys.readouterr()
    results = [line.split()[:2] for line in out.splitlines()[-3:]]
    assert results[:2] == [["job", "result"], ["0", "failed"]]
    assert float(results[2][1]) > 0
    lines = err.splitlines()
    sentence = "stage.vqgan.width is 0.5, and must be int; set stage.vqgan.width=..."
    assert f"error: {sentence}" in lines
    assert lines[-1] == f"error: a job of the sweep failed: {sentence}"
    assert finished(tmp_path / "default/a_sweep/1")


def test_an_interruption_ends_the_whole_sweep(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trainer: L.Trainer, *args: object, **kwargs: object) -> None:
        raise Preempted(signal.SIGTERM)

    monkeypatch.setattr(L.Trainer, "fit", interrupted)
    arguments = [*small("a", tmp_path, steps=1), "stage.optimizer.lr=1e-3,1e-4"]
    arguments.remove("stage.optimizer.lr=1e-3")
    assert program("train", "-m", *arguments) == REQUEUE
    assert not (tmp_path / "default/a_sweep/1").exists()


@pytest.mark.slow
def test_optuna_searches(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = [*small("a", tmp_path, steps=1), "stage.optimizer.lr=interval(1e-4,1e-2)"]
    arguments.remove("stage.optimizer.lr=1e-3")
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    assert program("train", *search, *arguments) == 0
    runs = tmp_path / "default/a_sweep"
    assert finished(runs / "0")
    assert finished(runs / "1")
    assert "best_value" in (runs / "optimization_results.yaml").read_text()


@pytest.mark.slow
def test_optuna_goes_on_after_a_failed_job(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = [*small("a", tmp_path, steps=1), "stage.vqgan.width=choice(0.5,16)"]
    arguments.remove("stage.vqgan.width=16")
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.max_failure_rate=1",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
    ]
    assert program("train", "-m", *search, *arguments) == 1
    runs = (tmp_path / "default/a_sweep").iterdir()
    num_finished = sum((run / "run.json").is_file() for run in runs)
    assert 0 < num_finished < 4
    assert f"error: {4 - num_finished} of 4 jobs of the sweep failed" in capsys.readouterr().err


@pytest.mark.slow
def test_submitit_launches_a_sweep(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    arguments = [*small("a", tmp_path, steps=1), "stage.optimizer.lr=1e-3,1e-4"]
    arguments.remove("stage.optimizer.lr=1e-3")
    assert program("train", "-m", "hydra/launcher=submitit_local", *arguments) == 0
    assert all(finished(tmp_path / "default/a_sweep" / number) for number in "01")


@pytest.mark.parametrize(
    ("sentence", "report", "expected"),
    [
        ("keep=0 is too few", "keep=0 is too few\nfull_key: callbacks.checkpoints", True),
        ("keep=0 is too few", "no report of a node", False),
        ("callbacks.x=0 is bad", "callbacks.x=0 is bad\nfull_key: callbacks.checkpoints", False),
        ("no such file", "no such file\nfull_key: callbacks.checkpoints", False),
    ],
)
def test_an_argument_that_a_constructor_refused_gets_its_full_key(
    sentence: str, report: str, expected: bool
) -> None:
    prefix = "callbacks.checkpoints." if expected else ""
    assert _with_full_key(sentence, report) == prefix + sentence


def test_log_records_of_the_package_are_shown_while_a_program_runs(
    capsys: pytest.CaptureFixture,
) -> None:
    logger = logging.getLogger("wuerstchen_pl.anything")
    logger.info("before")
    with one_line_logs():
        logger.info("%d samples", 3)
        logging.getLogger("another.library").info("chatter")
    logger.info("after")
    assert capsys.readouterr().err == "3 samples\n"


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("sample", "paths.root", "paths is not a key; remove it"),
        ("sample", "paths", "paths is not a key of this program; remove it"),
        ("sample", "sed", "sed is not a key; did you mean seed?"),
    ],
)
def test_no_key_is_suggested_in_place_of_itself(
    name: str, key: str, message: str, program: Program, capsys: pytest.CaptureFixture
) -> None:
    assert program(name, "prompt=a", f"{key}=x") == 1
    assert capsys.readouterr().err == f"error: {message}\n"
