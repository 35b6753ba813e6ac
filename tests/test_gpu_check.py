"""The sections of the GPU check at tiny size on the CPU."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scripts.gpu_check import (
    compiled,
    environment,
    kernels,
    parity,
    profile_c,
    stage_b,
    stage_c,
    stage_c_fsdp,
    training,
)
from scripts.gpu_check.rows import Row
from scripts.gpu_check.sizes import TINY, Check
from scripts.gpu_check.training import Measurement, Mode
from wuerstchen_pl.models.wrapping import find_blocks

ROOT = Path(__file__).parents[1]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(TINY, tmp_path, tmp_path, "", 100.0)


@pytest.fixture(autouse=True)
def _restored_precision() -> Iterator[None]:
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


def misses(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.verdict == "MISSED"]


def test_the_environment_has_versions_and_rates(check: Check) -> None:
    rows = list(environment.rows(check))
    assert f"torch {torch.__version__}" in rows[0].measured
    assert float(rows[-1].measured.split()[0]) > 0


@pytest.mark.slow
def test_the_networks_agree_with_themselves(check: Check) -> None:
    rows = list(parity.rows(check))
    assert len(rows) == 4 * 4 + 3 + 1
    assert misses(rows) == []


def test_an_error_in_a_network_on_the_device_is_missed() -> None:
    net = torch.nn.Linear(8, 8)
    calls = []

    def forward(net: torch.nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return net(*inputs) * (1.0 if len(calls) == 1 else 1.001)

    rows = list(parity.compare("a", net, [torch.randn(4, 8)], forward))
    assert [row.verdict for row in rows] == ["MISSED", "MISSED", "ok", "ok"]


@pytest.mark.slow
def test_compiled_networks_agree_with_others(
    graphs: list[torch.fx.GraphModule], check: Check
) -> None:
    rows = list(compiled.rows(check))
    assert len(rows) == 2 * 2
    assert misses(rows) == []


def test_gradients_that_compilation_loses_are_missed(
    monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    def without_one(module: torch.nn.Module) -> None:
        for block in find_blocks(module):
            block.res.grn.register_full_backward_hook(lambda _, g, h: (torch.zeros_like(g[0]),))

    monkeypatch.setattr(compiled, "compile_blocks", without_one)
    rows = list(compiled.rows(check))
    assert [row.verdict for row in rows] == ["ok", "MISSED", "ok", "MISSED"]


def test_depthwise_layouts_are_timed(check: Check) -> None:
    assert len(list(kernels.rows(check))) == 2 * len(kernels.SHAPES)


def test_a_step_is_measured() -> None:
    cost = training.measure("c", Mode(2), TINY)
    assert cost.seconds > 0
    assert cost.samples_per_second == pytest.approx(2 / cost.seconds)
    assert cost.graphs == 0
    assert cost.syncs == {}
    assert cost.estimated_bytes > 1e6


@pytest.mark.slow
def test_blocks_that_would_run_eagerly_are_missed(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wuerstchen_pl.models.wrapping import compile_blocks

    def limited(module: torch.nn.Module) -> None:
        compile_blocks(module)
        torch._dynamo.config.recompile_limit = 1

    monkeypatch.setattr(training, "compile_blocks", limited)
    row = training.measure_or_fail("b", Mode(2, compiled=True), TINY)
    assert isinstance(row, Row)
    assert "FailOnRecompileLimitHit" in row.measured


COST = Measurement(0.1, 1.0, 20.0, 1e12, 100, 100, 0, None)


@pytest.mark.parametrize(
    ("peak", "compiled", "verdict"),
    [(109, False, "ok"), (89, False, "MISSED"), (89, True, "ok"), (111, True, "MISSED")],
)
def test_the_memory_is_compared_with_its_estimate(peak: int, compiled: bool, verdict: str) -> None:
    cost = COST._replace(peak_bytes=peak)
    (row,) = training.memory_rows("a", Mode(2, compiled=compiled), cost)
    assert row.verdict == verdict


def test_the_goals_of_speed_are_judged_at_full_size(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(name: str, mode: Mode, *_: object) -> Measurement:
        return COST._replace(seconds=0.106 if mode.sharded else 0.1, graphs=1, syncs=Counter())

    monkeypatch.setattr(stage_c, "product_rate", lambda _: 2.04e12)
    for section in (stage_b, stage_c, stage_c_fsdp):
        monkeypatch.setattr(section, "measure_or_fail", cost)
    full = check._replace(size=TINY._replace(full=True))
    for section, number in ((stage_b, 1), (stage_c, 1), (stage_c_fsdp, 2)):
        assert len(misses(list(section.rows(full)))) == number
        assert misses(list(section.rows(check))) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "modes", "compiled"), [(stage_b, 5, 1), (stage_c, 6, 3), (stage_c_fsdp, 2, 1)]
)
def test_training_steps_are_measured_in_all_modes(
    section: Any, modes: int, compiled: int, check: Check, graphs: list[torch.fx.GraphModule]
) -> None:
    rows = list(section.rows(check))
    assert misses(rows) == []
    assert sum(row.what.endswith("wait for the GPU") for row in rows) == modes
    assert sum(row.what.endswith("graphs") for row in rows) == compiled
    assert not dist.is_initialized()


@pytest.mark.slow
def test_the_profile_names_the_costliest_operations(check: Check) -> None:
    rows = list(profile_c.rows(check))
    shares = [float(row.measured.split("%")[0]) for row in rows]
    assert len(shares) == profile_c.TOP
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 101  # rounded
    assert "addmm" in (check.out / "profile_c.txt").read_text()


@pytest.mark.slow
def test_a_compiled_stage_b_trains() -> None:
    cost = training.measure("b", Mode(2, compiled=True), TINY)
    assert cost.graphs > 0


@pytest.mark.slow
def test_sampling_is_compared_with_diffusers(check: Check) -> None:
    pytest.importorskip("diffusers", reason="extra: compare")
    from scripts.gpu_check import sampling

    rows = list(sampling.rows(check))
    assert misses(rows) == []
    assert "ours compiled" in rows[-1].what


def run_check(out: Path, *sections: str) -> str:
    """The output of the command at tiny size, in which each section has its own process."""
    variables = {**os.environ, "OUT": str(out), "TINY": "1"}
    command = [sys.executable, "-m", "scripts.gpu_check", *sections, "--seconds", "900"]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_command_measures_training_steps(tmp_path: Path) -> None:
    output = run_check(tmp_path, "kernels", "profile_c")
    assert "0 expectations missed" in output, output
    (table,) = tmp_path.glob("gpu_*.md")
    assert table.read_text().count("| profile_c |") == profile_c.TOP


@pytest.mark.slow
def test_the_programs_run(tmp_path: Path) -> None:
    output = run_check(tmp_path, "programs", "openmoji")
    assert "0 expectations missed" in output, output
    assert {path.name for path in tmp_path.glob("grid_?.png")} == {
        f"grid_{stage}.png" for stage in "abc"
    }
