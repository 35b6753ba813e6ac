"""Optimizers by name: each trains, resumes bit for bit, and is as large as documented."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.conftest import run_program, small
from tests.distributed.launch import launch
from tests.stages.conftest import fit, stage_c
from tests.test_resume import differing
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.memory_estimate import state_bytes_per_byte
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.schedule_free import averaged

pytest.importorskip("prodigyopt", reason="needs the extra optimizers")
SCHEDULE_FREE = "adamw_schedulefree"
RATES = {"prodigy": 1.0, SCHEDULE_FREE: 3e-3, "adafactor": 0.1, "lion": 1e-3}
FIRST_ESTIMATE = 1e-4
"""Of Prodigy; from 1e-6, its default, it takes a hundred steps to the usual learning rates."""
STEPS, HALF = 6, 3
FAST = (SCHEDULE_FREE,)
"""Whose state is not only tensors; resuming with the others is a slow test."""


def factory(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer of ``conf/optimizer``, with a learning rate for small networks."""
    config = OmegaConf.load(Path(conf_dir(), "optimizer", f"{name}.yaml"))
    config.lr = RATES[name]
    if name == "prodigy":
        config.d0 = FIRST_ESTIMATE
    return hydra.utils.instantiate(config, _convert_="all")


def stage_for(name: str) -> Any:
    decay = 0.0 if name == SCHEDULE_FREE else 0.5
    return stage_c(optimizer=factory(name), ema=EMA(decay=decay))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's state, without numbers such as counts of steps."""
    values = (v for state in optimizer.state.values() for v in state.values())
    return [v for v in values if isinstance(v, torch.Tensor) and v.numel() > 1]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in RATES]
)
def test_the_loss_falls(name: str, batch: Batch) -> None:
    """With gradient clipping, for the weights that validation uses."""

    def loss(stage: Any) -> float:
        with stage.ema.swapped_in(stage):
            return float(stage.validation_losses(batch)[1].mean())

    stage = stage_for(name)
    before = loss(stage)
    fit(stage, batch, 40, gradient_clip_val=1.0)
    assert loss(stage) < 0.9 * before


@pytest.mark.parametrize(
    ("name", "size"),
    [("prodigy", 16), (SCHEDULE_FREE, 8), ("adafactor", 0.03), ("lion", 4)],
)
def test_the_state_has_the_documented_bytes_per_weight(
    name: str, size: float, batch: Batch
) -> None:
    assert bytes_per_weight(factory(name)) == pytest.approx(size, rel=0.05)
    stage = stage_for(name)
    optimizer = fit(stage, batch, 1).optimizers[0]
    measured = sum(t.nbytes for t in state_tensors(optimizer))
    per_weight = measured / sum(p.numel() for p in stage.parameters() if p.grad is not None)
    # Adafactor: small weights have more rows and columns per element. Prodigy: none for zeros.
    assert 0.9 * size < per_weight < 1.05 * size or (name == "adafactor" and per_weight < 0.5)


def test_8_bit_adamw_has_a_quarter_of_the_state_of_adamw() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra 8bit")
    assert bytes_per_weight(torch.optim.AdamW) == pytest.approx(8)
    assert bytes_per_weight(bitsandbytes.optim.AdamW8bit) == pytest.approx(2, rel=0.05)


def bytes_per_weight(build: Callable[..., torch.optim.Optimizer]) -> float:
    return 4 * state_bytes_per_byte(build([nn.Parameter(torch.ones(256, 256))]))


def test_a_schedule_free_optimizer_is_evaluated_at_its_average(batch: Batch) -> None:
    """At a constant learning rate, x is the mean of the iterates z (section 2 of its paper)."""
    stage, iterates = stage_for(SCHEDULE_FREE), []
    after_step = stage.after_step

    def record(step: int) -> None:
        after_step(step)
        states = stage.trainer.optimizers[0].state.values()
        iterates.append([state["z"].clone() for state in states])

    stage.after_step = record
    optimizer = fit(stage, batch, 5).optimizers[0]
    names = {p: name for name, p in stage.named_parameters()}
    for index, p in enumerate(optimizer.state):
        mean = torch.stack([z[index] for z in iterates]).mean(dim=0)
        torch.testing.assert_close(stage.ema.shadow[names[p]], mean, rtol=1e-5, atol=1e-6)
    raw = {name: p.detach().clone() for name, p in stage.named_parameters()}
    assert any(not torch.equal(raw[n], shadow) for n, shadow in stage.ema.shadow.items())
    with averaged(optimizer):
        assert all(torch.equal(p, stage.ema.shadow[n]) for n, p in stage.named_parameters())
    assert all(torch.equal(p, raw[n]) for n, p in stage.named_parameters())


def train(name: str, root: Path, cascade: Path, *overrides: str, stage: str = "c") -> int:
    replaced = ("stage.optimizer.lr", "validate_every", "checkpoint_every")
    kept = [a for a in small(stage, root, STEPS) if not a.startswith(replaced)]
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    chosen = [f"optimizer@stage.optimizer={name}", f"checkpoint_every_steps={HALF}"]
    if name in RATES:
        chosen.append(f"stage.optimizer.lr={RATES[name]}")
    if name == SCHEDULE_FREE:
        chosen.append("stage.ema.decay=0")
    chosen += [f"paths.data={cascade.parent / 'data'}", "validate_every_steps=2"]
    return run_program("train", [*kept, *paths, *chosen, *overrides])


def last_checkpoint(root: Path) -> dict[str, Any]:
    return load.read_checkpoint(load.find_checkpoint(root / "default/c"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in ("adamw", *RATES)],
)
def test_a_killed_run_resumes_bit_for_bit(name: str, cascade: Path, tmp_path: Path) -> None:
    steps = ["global_batch=8", "trainer.gradient_clip_val=0.1"]
    assert train(name, tmp_path / "whole", cascade, *steps) == 0
    whole = last_checkpoint(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    last = load.find_checkpoint(tmp_path / "killed/default/c")
    for path in last.parent.glob(f"{last.name}*"):
        path.unlink()
    assert last_checkpoint(tmp_path / "killed")["global_step"] == HALF
    assert train(name, tmp_path / "killed", cascade, *steps, "ckpt=auto") == 0
    resumed = last_checkpoint(tmp_path / "killed")
    assert resumed["global_step"] == whole["global_step"] == STEPS
    assert not differing(whole, resumed)
    groups = [c["optimizer_states"][0]["param_groups"] for c in (whole, resumed)]
    assert groups[0] == groups[1]  # with estimates and sums of weights


REFUSED = {
    "prodigy, sharded": ("prodigy", "c", ["trainer=fsdp"], "does not support sharded weights"),
    "adafactor, sharded": ("adafactor", "c", ["trainer=fsdp"], "does not support sharded weights"),
    "mean of means": (SCHEDULE_FREE, "c", ["stage.ema.decay=0.9"], "set stage.ema.decay=0 "),
    "decay": (SCHEDULE_FREE, "c", ["stage.lr_schedule.decay=cosine"], "stage.lr_schedule.decay=n"),
    "averaged codes": (SCHEDULE_FREE, "a", [], "also of codes that Stage A restarts"),
    "two networks": ("prodigy", "a", [], "Stage A trains two networks against each other"),
    "two rates": ("prodigy", "c", ["stage.text_encoder_lr=0.5"], "estimates one learning rate; se"),
    "AdamW's rate": ("lion", "c", ["adamw.lr=1"], "adamw.lr is not used; set stage.optimizer.lr"),
    "no package": (
        "adamw", "c", ["stage.optimizer._target_=no_such_package.Adam"],
        "needs the package no_such_package, which is not installed; run pip install",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_optimizer_does_not_support_is_refused_in_one_line(
    case: str, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name, stage, overrides, message = REFUSED[case]
    assert train(name, tmp_path, cascade, "trainer.accelerator=cpu", *overrides, stage=stage) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "default").exists()


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_a_learning_rate_that_depends_on_the_recipe_must_be_typed(
    name: str, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    without = [a for a in small("c", tmp_path) if not a.startswith("stage.optimizer.lr")]
    assert run_program("train", [*without, f"optimizer@stage.optimizer={name}"]) == 1
    assert "stage.optimizer.lr is missing; set stage.optimizer.lr=..." in capsys.readouterr().err


SHARDED = (SCHEDULE_FREE, "lion")


@pytest.mark.slow
def test_two_processes_train_like_one(cascade: Path, tmp_path: Path) -> None:
    """With DDP, and with FSDP where the weights may be sharded, resumed after half of the steps."""

    def arguments(run: str, name: str, *overrides: str) -> list[str]:
        usual = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
        usual += [f"paths.data={cascade.parent / 'data'}", "trainer.gradient_clip_val=0.1"]
        usual += [f"optimizer@stage.optimizer={name}", "stage.ema.decay=0"]
        small_c = [a for a in small("c", tmp_path / run / name, 20) if "data.batch" not in a]
        small_c = [a for a in small_c if not a.startswith("stage.optimizer.lr")]
        usual.append(f"stage.optimizer.lr={RATES[name]}")
        usual += [f"+stage.optimizer.d0={FIRST_ESTIMATE}"] * (name == "prodigy")
        return [*small_c, *usual, *overrides]

    two = ["trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=4"]
    jobs = [arguments("ddp", name, "trainer=ddp", *two) for name in RATES]
    for part in ("trainer.max_steps=10", "ckpt=auto"):
        jobs += [arguments("fsdp", name, "trainer=fsdp", *two, part) for name in SHARDED]
    launch(jobs, tmp_path)
    for name in RATES:
        one = ["trainer=cpu", "data.batch_size=8"]
        assert run_program("train", arguments("one", name, *one)) == 0
        first = arguments("first", name, *one, "trainer.max_steps=1")
        assert run_program("train", first) == 0
    for run, name in [("ddp", n) for n in RATES] + [("fsdp", n) for n in SHARDED]:
        first, expected, actual = (
            last_checkpoint(tmp_path / r / name)["ema"]["shadow"] for r in ("first", "one", run)
        )
        relative = distance(actual, expected) / distance(first, expected)
        # the sign of a gradient that is a rounding error, which Lion uses, is random
        assert relative < (0.1 if name == "lion" else 1e-3), (run, name, relative)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    squares = (float((value - other[key]).square().sum()) for key, value in one.items())
    return sum(squares) ** 0.5
