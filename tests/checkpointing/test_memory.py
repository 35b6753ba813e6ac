"""Host memory that loading a stage takes: every process of a machine loads its frozen stages."""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wuerstchen_pl.checkpointing import load, sharded
from wuerstchen_pl.checkpointing.allowed import instantiate_allowed
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.stages.stage import Stage

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="Linux counts the memory of a process"
)
WIDTH = 512
SIZE = 38e6
"""Bytes of the stage's weights."""


def anonymous_bytes() -> int:
    """Memory of this process that it does not share, unlike memory-mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def release_freed_memory() -> None:
    """Return it to the system, where it is not counted."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of a function; how much memory it takes at its peak, and keeps, in ``SIZE``."""
    release_freed_memory()
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    result = function()
    done.set()
    thread.join()
    release_freed_memory()
    return result, (peak[0] - before) / SIZE, (anonymous_bytes() - before) / SIZE


@pytest.fixture(scope="module", params=["single file", "sharded"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Stage A with 38 MB of weights."""
    vqgan = {
        "_target_": "wuerstchen_pl.models.vqgan.VQGAN",
        "width": WIDTH, "bottleneck_blocks": 1, "codebook_size": 16,
    }  # fmt: skip
    discriminator = {
        "_target_": "wuerstchen_pl.models.discriminator.Discriminator", "width": 16, "depth": 3,
    }  # fmt: skip
    config = {
        "_target_": "wuerstchen_pl.stages.a.StageA",
        "vqgan": vqgan, "discriminator": discriminator,
    }  # fmt: skip
    stage: Stage = instantiate_allowed(config)
    shadow = {name: p.detach() + 1 for name, p in stage.named_parameters()}
    optimizer_state = {i: {"exp_avg": p.detach() + 2} for i, p in enumerate(stage.parameters())}
    content = {
        "stage": config, "state_dict": stage.state_dict(), "frozen": {},
        "ema": {"num_steps": 1, "num_updates": 1, "shadow": shadow},
        "optimizer_states": [{"state": optimizer_state}],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("run") / "step0000001.ckpt"
    if request.param == "sharded":
        sharded.write_sharded(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("ema", [True, False])
def test_a_stage_takes_the_memory_of_its_weights_only(checkpoint: Path, ema: bool) -> None:
    """Twice that for shards until the module has taken over the tensors; none for a mapped file."""
    stage, peak, kept = measure(lambda: load_stage(source=checkpoint, stage="a", ema=ema))
    weights = load.read_checkpoint(checkpoint, tensors="ema" if ema else "raw")
    name = "vqgan.encoder.block1.expand.weight"
    expected = (weights["ema"]["shadow"] if ema else weights["state_dict"])[name]
    assert torch.equal(stage.state_dict()[name], expected)
    is_single = checkpoint.is_file()
    assert peak < (1.3 if is_single else 2.3)
    assert kept < (0.2 if is_single else 1.2)


def test_the_config_of_a_checkpoint_takes_no_memory(checkpoint: Path) -> None:
    content, peak, _ = measure(lambda: load.read_checkpoint(checkpoint, tensors="none"))
    assert content["stage"]["vqgan"]["width"] == WIDTH
    assert peak < 0.3
