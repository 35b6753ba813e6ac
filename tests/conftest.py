"""Shared fixtures: a cascade of tiny networks, trained for a few steps once per session.

Torch is imported by the fixtures that need it: pytest-xdist's main process, which runs no test,
imports this module before it starts the others.
"""

import atexit
import copy
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wuerstchen_pl import cache, convert, evaluate, export, interpolate, lora, sample, train
from wuerstchen_pl.data import __main__ as data

if TYPE_CHECKING:
    import torch

NO_GRIDS = "callbacks.sample_grids=null"
NO_PLOT = "callbacks.loss_by_timestep=null"
"""Rendering grids and plots takes half of a short run."""
NO_PROFILE = ("callbacks.memory_estimate=null", "callbacks.throughput=null")
"""Profiling a step takes an eighth of a short run."""
SMALL_DATA = ("data.limit=24", "data.val_fraction=0.2", "data.batch_size=4")
SMALL_NETWORK = {
    "a": (
        "stage.vqgan.width=16",
        "stage.vqgan.bottleneck_blocks=1",
        "stage.vqgan.codebook_size=16",
        "stage.discriminator.width=16",
        "stage.perceptual.widths=[4,8]",
        "stage.adversarial_start_step=10000",
    ),
    "b": (
        "stage.diffnext.widths=[16,16]",
        "stage.diffnext.num_blocks=[1,1]",
        "stage.diffnext.num_heads=[null,2]",
        "stage.diffnext.cond_dim=8",
        "stage.compressor.backbone.width=4",
    ),
    "ldm": (
        "stage.prior.widths=[16,16]",
        "stage.prior.num_blocks=[1,1]",
        "stage.prior.num_up_blocks=[1,1]",
        "stage.prior.num_heads=[2,2]",
        "stage.prior.cond_dim=8",
        "stage.prior.text_dim=16",
        "stage.text_encoder.width=16",
        "stage.text_encoder.depth=1",
        "stage.text_encoder.num_heads=2",
    ),
    "c": (
        "stage.prior.width=16",
        "stage.prior.depth=1",
        "stage.prior.num_heads=2",
        "stage.prior.text_dim=16",
        "stage.text_encoder.width=16",
        "stage.text_encoder.depth=1",
        "stage.text_encoder.num_heads=2",
    ),
}
PROGRAMS = {
    "train": train,
    "cache": cache,
    "data": data,
    "sample": sample,
    "evaluate": evaluate,
    "convert": convert,
    "export": export,
    "interpolate": interpolate,
    "lora": lora,
}


@lru_cache
def rendered_data() -> str:
    """``paths.data`` of short runs, so that drawings are rendered once and not by each run."""
    folder = tempfile.mkdtemp(prefix="wuerstchen-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def small(stage: str, root: Path, steps: int = 4) -> list[str]:
    """The arguments of ``train`` for a small stage, with outputs under ``root``."""
    return [
        f"stage={stage}",
        f"paths.root={root}",
        f"paths.data={rendered_data()}",
        f"trainer.max_steps={steps}",
        "trainer.accelerator=cpu",
        "stage.lr_schedule.warmup_steps=0",
        "stage.lr_schedule.decay=none",  # so that a part of a run is that of a shorter one
        "stage.optimizer.lr=1e-3",
        f"validate_every_steps={steps}",
        f"checkpoint_every_steps={steps}",
        "logger=csv",
        NO_GRIDS,
        NO_PLOT,
        *NO_PROFILE,
        *SMALL_DATA,
        *SMALL_NETWORK[stage],
    ]


def what_cache_reads(arguments: list[str]) -> list[str]:
    """The arguments of ``train`` that ``cache`` accepts: those that change what is cached."""
    networks = (
        "stage.prior.",
        "stage.diffnext.",
        "stage.compressor.",
        "stage.ema.",
        "stage.caption_drop_prob=",
    )
    training = (
        "trainer",
        "logger",
        "callbacks.",
        "validate_every_steps=",
        "checkpoint_every_steps=",
    )
    fitting = ("stage.optimizer.", "stage.lr_schedule.")
    return [a for a in arguments if not a.startswith((*training, *fitting, *networks))]


def run_program(name: str, arguments: list[str]) -> int:
    """Run a program in this process; returns its exit code."""
    original_argv = sys.argv
    sys.argv = [f"wuerstchen-{name}", *arguments]
    try:
        PROGRAMS[name].main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = original_argv
    return 0


def pytest_sessionstart() -> None:
    """Collect no garbage while tests are imported, which would take a third of that time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage less often, which takes a sixth of the time of the tests.

    What the imports and the collection of the tests have created is never garbage.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)
    gc.enable()


GROUP_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is in the test's own folder, not among files that a machine has or lacks."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    """No test inherits the process group that a trainer of an earlier one leaves behind.

    Nor do its processes inherit the variables, with a port that is in use.
    """
    import torch.distributed as dist

    before = {name: os.environ.get(name) for name in GROUP_VARIABLES}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}


@pytest.fixture(scope="session", autouse=True)
def configs_are_parsed_once() -> None:
    """Copy what was read before from the same YAML: parsing is a third of a composition."""
    from omegaconf import OmegaConf

    load, parsed = OmegaConf.load, dict[str, Any]()

    def load_or_copy(file: Any) -> Any:
        if not hasattr(file, "seek"):
            return load(file)
        if (text := file.read()) not in parsed:
            file.seek(0)
            parsed[text] = load(file)
        return copy.deepcopy(parsed[text])

    OmegaConf.load = staticmethod(load_or_copy)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> "list[torch.fx.GraphModule]":
    """What Dynamo traces of compiled modules, which is run as it is: inductor takes minutes."""
    import torch
    import torch._dynamo

    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        traced.append(graph)
        return graph.forward

    compiling = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    torch._dynamo.reset()
    return traced


@pytest.fixture
def program() -> Callable[..., int]:
    """Run a program: ``program("sample", "prompt=...")`` returns its exit code."""
    return lambda name, *arguments: run_program(name, list(arguments))


@pytest.fixture(scope="session")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``a``, ``b`` and ``c`` of a small cascade."""
    root = tmp_path_factory.mktemp("outputs")
    for stage in "abc":
        assert run_program("train", small(stage, root)) == 0
    return root / "default"


@pytest.fixture(scope="session")
def random_base(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose prior has random weights, as an untrained one predicts almost nothing."""
    import torch

    from wuerstchen_pl.formats import registry
    from wuerstchen_pl.formats.lazy_tensors import in_memory
    from wuerstchen_pl.formats.run import read_run

    model = read_run(cascade / "c")
    torch.manual_seed(0)
    for name, lazy in model.parts["prior"].tensors.items():
        std = 0.01 if name.startswith("head") else 0.1  # as the prior divides by one of its heads
        tensor = lazy.load()
        changed = tensor + std * torch.randn_like(tensor)
        model.parts["prior"].tensors[name] = in_memory(changed)
    folder = tmp_path_factory.mktemp("base") / "model"
    registry.write_model(model, folder, "native")
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small CLIP with random weights."""
    import open_clip
    import torch

    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    model = open_clip.CLIP(8, vision_cfg=vision, text_cfg=text)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(model.state_dict(), path)
    return path


def frozen_text(clip: Path, length: int = 77) -> list[str]:
    """The arguments that give Stage C a frozen text encoder with the weights of ``clip``."""
    return [
        "stage.train_text_encoder=false",
        f"+stage.text_encoder.weights={clip}",
        f"stage.text_encoder.context_length={length}",
        "stage.caption_drop_prob=0.5",
    ]
