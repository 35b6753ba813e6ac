"""The train program: signals, faults and errors leave the last checkpoint intact."""

import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.conftest import frozen_text, run_program, small
from tests.data.factories import image, shards, write
from tests.stages.conftest import stage_b
from tests.test_resume import differing
from wuerstchen_pl import train
from wuerstchen_pl.callbacks.signals import SignalHandler
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.cli.signals import REQUEUE, STOP_SIGNALS
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.io import atomic
from wuerstchen_pl.programs.train import accumulation, build_stage
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.data_checks import check_sizes
from wuerstchen_pl.stages.stage import Batch


def arguments(cascade: Path, root: Path, *overrides: str) -> list[str]:
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    data = f"paths.data={cascade.parent / 'data'}"
    return [*small("c", root), "checkpoint_every_steps=2", data, *stage_paths, *overrides]


def test_a_full_disk_leaves_the_previous_checkpoint(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    replace = os.replace

    def full(source: str, target: str) -> None:
        if "step0000004" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run_program("train", arguments(cascade, tmp_path)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint ")
    assert line.endswith("could not be written: No space left on device")
    folder = tmp_path / "default/c/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step0000002.ckpt", "step0000002.ckpt.sha256")
    ]
    assert load.read_checkpoint(load.find_checkpoint(folder.parent))["global_step"] == 2


def send_signals(monkeypatch: pytest.MonkeyPatch, signals: list[int], *, step: int) -> None:
    """Send signals to this process during a step of Stage C."""
    train = StageC.training_step

    def interrupted(stage: StageC, batch: Batch, batch_idx: int) -> Tensor:
        if stage.global_step == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return train(stage, batch, batch_idx)

    monkeypatch.setattr(StageC, "training_step", interrupted)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", REQUEUE),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGUSR1", REQUEUE, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_the_current_step_and_the_run_resumes(
    name: str, code: int, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, rarely = tmp_path / "default/c", "checkpoint_every_steps=100"
    with pytest.MonkeyPatch.context() as patch:
        send_signals(patch, [signal.Signals[name]], step=2)
        assert run_program("train", arguments(cascade, tmp_path, rarely)) == code
    assert f"was stopped by {name} after step 3; a checkpoint was saved" in capsys.readouterr().err
    assert load.parse_step(load.find_checkpoint(run)) == 3
    assert run_program("train", arguments(cascade, tmp_path, rarely, "ckpt=auto")) == 0
    assert run_program("train", arguments(cascade, tmp_path / "whole", rarely)) == 0
    whole = load.read_checkpoint(load.find_checkpoint(tmp_path / "whole/default/c"))
    assert not differing(whole, load.read_checkpoint(load.find_checkpoint(run)))


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_spares_the_workers(
    cascade: Path, tmp_path: Path
) -> None:
    run = tmp_path / "default/c"
    shards(tmp_path / "tars", 4, 8)
    usual = [a for a in arguments(cascade, tmp_path) if not a.startswith(("data.", "trainer.max"))]
    data = ["data=shards", f"data.urls={tmp_path / 'tars'}", "data.num_workers=2"]
    more = ["data.max_upscale=null", "data.batch_size=4", "trainer.max_steps=100000"]
    command = [sys.executable, "-m", "wuerstchen_pl.train", *usual, *data, *more]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (list(run.glob("checkpoints/*.ckpt")) or process.poll() is not None):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun and systemd do
    _, said = process.communicate(timeout=120)
    assert process.returncode == REQUEUE, said[-2000:]
    saved = int(re.findall(r"was stopped by SIGTERM after step (\d+)", said)[0])
    assert load.parse_step(load.find_checkpoint(run)) == saved


def test_a_second_ctrl_c_exits_at_once(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    send_signals(monkeypatch, [signal.SIGINT, signal.SIGINT], step=3)
    assert run_program("train", arguments(cascade, tmp_path)) == 130
    signal.signal(signal.SIGINT, handler)  # Lightning ignores all further signals
    assert "interrupted at step 3; ckpt=auto resumes" in capsys.readouterr().err
    assert load.parse_step(load.find_checkpoint(tmp_path / "default/c")) == 2


def test_signal_handlers_are_removed_after_a_run(cascade: Path, tmp_path: Path) -> None:
    assert run_program("train", arguments(cascade, tmp_path)) == 0
    handlers = [getattr(signal.getsignal(number), "__self__", None) for number in STOP_SIGNALS]
    assert not any(isinstance(owner, SignalHandler) for owner in handlers)


def test_a_step_has_its_whole_global_batch_and_validation_follows_steps(
    cascade: Path, tmp_path: Path
) -> None:
    # an epoch has five batches of four: two steps of two batches, and one batch that is left out
    usual = [a for a in arguments(cascade, tmp_path) if not a.startswith("validate_every_steps")]
    command = [*usual, "global_batch=8", "validate_every_steps=2", "trainer.log_every_n_steps=1"]
    assert run_program("train", command) == 0
    run = tmp_path / "default/c"
    content = load.read_checkpoint(load.find_checkpoint(run))
    assert content["global_step"] == 4
    assert content["ImageTextDataModule"]["samples"] == 4 * 8
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    assert [int(step) for step, name, _ in rows if name == "val/loss"] == [1, 3]
    assert [int(step) for step, name, _ in rows if name == "train/grad_norm"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_accumulated_steps_resume_bit_for_bit_and_save_nothing_between(
    cascade: Path, tmp_path: Path
) -> None:
    def accumulating(root: Path, *overrides: str) -> list[str]:
        usual = arguments(cascade, root)
        return [*usual, "global_batch=8", "callbacks.checkpoints.keep=9", *overrides]

    assert run_program("train", accumulating(tmp_path / "whole")) == 0
    assert run_program("train", accumulating(tmp_path / "parts", "trainer.max_steps=2")) == 0
    run = tmp_path / "parts/default/c"
    first = load.find_checkpoint(run)
    before = first.read_bytes()
    assert run_program("train", accumulating(tmp_path / "parts", "ckpt=auto")) == 0
    assert first.read_bytes() == before  # not overwritten with half a step's gradients
    whole = load.read_checkpoint(load.find_checkpoint(tmp_path / "whole/default/c"))
    assert not differing(whole, load.read_checkpoint(load.find_checkpoint(run)))
    steps = sorted(load.parse_step(p) for p in run.glob("checkpoints/*.ckpt"))
    assert steps == [2, 4]


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "processes", "expected"),
    [(1536, 24, 64, 1), (1536, 24, 8, 8), (1536, 6, 256, 1), (8, 8, 1, 1)],
)
def test_accumulation_follows_from_the_global_batch(
    global_batch: int, batch_size: int, processes: int, expected: int
) -> None:
    assert accumulation(global_batch, batch_size, processes) == expected


def test_an_impossible_global_batch_is_an_error_that_names_a_possible_one() -> None:
    message = r"global_batch=1536 is not a multiple of 6144.*divisor of 6$"
    with pytest.raises(ValueError, match=message):
        accumulation(1536, 24, 256)


@pytest.mark.slow
def test_a_run_requires_the_clip_that_it_was_trained_with(
    cascade: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    clip_copy = shutil.copy(clip, tmp_path / "clip.pt")
    command = [*arguments(cascade, tmp_path), *frozen_text(Path(clip_copy))]
    assert run_program("train", [*command, "trainer.max_steps=2"]) == 0
    run = tmp_path / "default/c"
    content = load.read_checkpoint(load.find_checkpoint(run))
    assert content["files"]["text_encoder"]["sha256"] == atomic.sha256(clip)
    assert content["versions"].keys() == {"torch", "lightning"}
    assert load_stage(source=run, stage="c").text_encoder.weights == str(clip_copy)
    torch.save({k: v * 2 for k, v in torch.load(clip_copy, weights_only=True).items()}, clip_copy)
    with pytest.raises(ValueError, match=r"text_encoder\.weights=.*clip\.pt has sha256"):
        load_stage(source=run, stage="c")
    assert run_program("train", [*command, "ckpt=auto"]) == 1
    assert "restore that file" in capsys.readouterr().err


def test_every_nth_checkpoint_is_kept(cascade: Path, tmp_path: Path) -> None:
    more = ["checkpoint_every_steps=1", "callbacks.checkpoints.keep_every_steps=2"]
    usual = [a for a in arguments(cascade, tmp_path) if "max_steps" not in a]
    command = [*usual, *more, "callbacks.checkpoints.keep=1", "trainer.max_steps=5"]
    assert run_program("train", command) == 0
    checkpoints = (tmp_path / "default/c/checkpoints").glob("*.ckpt")
    assert sorted(load.parse_step(path) for path in checkpoints) == [2, 4, 5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.precision=bf16-true", "use bf16-mixed or 32-true"),
        pytest.param(
            "trainer.accelerator=gpu",
            "trainer.accelerator=gpu finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("validate_every_steps=0", "validate_every_steps=0 is out of range"),
        ("checkpoint_every_steps=0", "checkpoint_every_steps=0 is out of range"),
        ("callbacks.checkpoints.keep_every_steps=3", "keep_every_steps=3 is not a multiple of"),
        ("stage.optimizer.lr=-1", "stage.optimizer.lr=-1 is out of range"),
        ("stage.prior.latent_channels=8", "stage.prior.latent_channels=8"),
        ("stage.prior.text_dim=99", "stage.prior.text_dim=99"),
        ("stage.prior.num_heads=5", "num_heads=5 does not divide the width 16"),
        ("stage.train_text_encoder=false", "leaves a frozen text encoder random"),
        ("paths.stage_b=nowhere", "train Stage B first"),
        ("ckpt=nowhere", "nowhere"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(
    override: str, message: str, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    key = override.split("=")[0]
    usual = [a for a in arguments(cascade, tmp_path) if a.split("=")[0] != key]
    assert run_program("train", [*usual, override]) == 1
    stderr = capsys.readouterr().err.strip()
    assert message in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "default").exists()


def test_sizes_that_a_stage_cannot_encode_are_refused() -> None:
    stage = stage_b()
    multiple = stage.size_multiple
    sizes = [(multiple, 3 * multiple), (multiple, multiple + 2)]
    with pytest.raises(ValueError, match=rf"x {multiple + 2} px .*bucket_multiple={multiple} or"):
        check_sizes(stage, SimpleNamespace(sizes=sizes))  # type: ignore[arg-type]
    check_sizes(stage, SimpleNamespace(sizes=sizes[:1]))  # type: ignore[arg-type]


def test_an_8_bit_optimizer_of_sharded_weights_is_refused(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The strategy is recognized by its class in the config, not by the name of the YAML."""
    eight_bit = ["trainer=fsdp", "trainer.accelerator=cpu", "optimizer@stage.optimizer=adamw_8bit"]
    assert run_program("train", [*arguments(cascade, tmp_path), *eight_bit]) == 1
    assert "adamw_8bit does not support sharded weights" in capsys.readouterr().err
    assert not (tmp_path / "default").exists()


def test_init_from_starts_from_the_ema_weights_of_that_run_and_says_so(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = load.read_checkpoint(load.find_checkpoint(cascade / "c"))["ema"]["shadow"]
    slow = arguments(cascade, tmp_path, f"init_from={cascade / 'c'}")
    slow = [a for a in slow if not a.startswith(("stage.optimizer.lr", "trainer.max_steps"))]
    assert run_program("train", [*slow, "stage.optimizer.lr=1e-12", "trainer.max_steps=2"]) == 0
    state = load.read_checkpoint(load.find_checkpoint(tmp_path / "default/c"))["state_dict"]
    assert max(float((state[k] - v).abs().max()) for k, v in source.items()) < 1e-6
    path = load.find_checkpoint(cascade / "c")
    assert f"init_from: {path}, weights: EMA, step 4\n" in capsys.readouterr().err


def test_init_from_says_that_a_run_has_no_ema_weights_yet(
    cascade: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "no_ema.ckpt"
    state = torch.load(load.find_checkpoint(cascade / "a"), weights_only=True)
    torch.save({**state, "ema": {**state["ema"], "shadow": {}}}, path)
    cfg = OmegaConf.create(
        {"stage": state["stage"], "init_from": str(path), "allow_mismatch": False}
    )
    with caplog.at_level(logging.INFO, "wuerstchen_pl.formats.initial_weights"):
        stage = build_stage(cfg)
    assert caplog.messages == [f"init_from: {path}, weights: raw (there is no EMA yet), step 4"]
    assert all(torch.equal(v, state["state_dict"][k]) for k, v in stage.state_dict().items())


@pytest.mark.slow
def test_a_mixture_of_sources_trains_and_is_counted(cascade: Path, tmp_path: Path) -> None:
    shards(tmp_path / "tars", 2, 6)
    write(tmp_path / "tars/00009.tar", {"a.jpg": b"no image", "a.txt": b"a"})
    (tmp_path / "images").mkdir()
    for i in range(8):
        (tmp_path / f"images/{i}.jpg").write_bytes(image(str(i), 64, 64))
        (tmp_path / f"images/{i}.txt").write_text(f"number {i}")
    usual = [a for a in arguments(cascade, tmp_path) if not a.startswith("data.limit")]
    package = "wuerstchen_pl.data.sources"
    sources = (
        f"{{web:{{_target_:{package}.shards.ShardSource,urls:{tmp_path / 'tars'}}},"
        f"own:{{_target_:{package}.folder.FolderSource,root:{tmp_path / 'images'}}}}}"
    )
    more = [f"data.sources={sources}", "data.weights={web:1,own:2}", "data.num_workers=0"]
    filters = ["data.max_upscale=2", "data.filters.max_ratio=1.9", "trainer.max_steps=24"]
    with pytest.warns(UserWarning, match="skipped, unreadable image"):
        assert run_program("train", [*usual, "data=mix", *more, *filters]) == 0
    log = (tmp_path / "default/c/metrics.csv").read_text()
    for name in ("seen", "bad/unreadable image", "dropped/max_ratio", "cropped_share"):
        assert f"data/{name}," in log, log
    share = float(re.findall(r"data/cropped_share,([\d.]+)", log)[-1])
    assert 0 < share < 0.4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data=mix", "data.sources={a:{_target_:os.system,command:x}}"], "data.sources.a"),
        (["data=shards", "data.urls='pipe:touch ran'"], "would run a command on this machine"),
        (["data=folder", "data.root=/nowhere"], "data.root='/nowhere' is not a folder"),
        (["data=cached", "data.root=/nowhere"], "data.root='/nowhere' is not a finished cache"),
        (["data=openmoji", "data.buckets=paper", "data.ratios=[1.0]"], "data.ratios=[1.0] is of"),
        (
            ["data=openmoji", "data.filters.scripts=[elvish]"],
            "filters.scripts=['elvish'] contains",
        ),
        (["data=openmoji", "data.no_key=1"], "data.no_key"),
        (["data=openmoji", "data.batch_size=many"], "data.batch_size is 'many', and must be int"),
    ],
)
def test_wrong_data_is_an_error_of_one_line(
    cascade: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    replaced = ("data.limit", "data.val_fraction", "data.batch_size")
    usual = [a for a in arguments(cascade, tmp_path / "run") if not a.startswith(replaced)]
    assert run_program("train", [*usual, *more]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", "bc")
def test_init_from_other_networks_is_refused_by_name(
    stage: str, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of another stage for B, and of another size for C."""
    other = cascade / ("a" if stage == "b" else "c")
    command = [*small(stage, tmp_path), *(f"paths.stage_{s}={cascade / s}" for s in "ab")]
    command += ["stage.prior.width=32"] * (stage == "c") + [f"init_from={other}"]
    assert run_program("train", command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: init_from={other}")
    expected = {"b": "is a checkpoint of stage=a", "c": "stage.prior.width was 16, and is now 32"}
    assert expected[stage] in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stage=a", "seed=1"], [["stage=a", "seed=1"]]),
        (["stage=ldm"], [["stage=ldm"]]),
        (["--help"], [["--help"]]),
        (["-m", "stage=bc", "x=1,2"], [["-m", "stage=b", "x=1,2"], ["-m", "stage=c", "x=1,2"]]),
        (["seed=1", "stage=abc"], [["seed=1", f"stage={stage}"] for stage in "abc"]),
    ],
)
def test_several_stages_are_trained_one_after_the_other(
    arguments: list[str], expected: list[list[str]]
) -> None:
    assert train.for_each_stage(arguments) == expected
