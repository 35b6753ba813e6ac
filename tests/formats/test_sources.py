"""Runs, checkpoints and models of every format, wherever a trained model is an input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import run_program, small
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import hub, registry, upstream
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import PARTS
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.programs.train import build_stage

ROOT = Path(__file__).parents[2]
KINDS = ("run", "checkpoint", "native", "diffusers")
FEW = [pytest.param(kind, marks=[] if kind == "diffusers" else pytest.mark.slow) for kind in KINDS]
"""For long tests: those of the other kinds, which are read with less conversion, are slow."""
Sources = Callable[[str, str], str]


@pytest.fixture(scope="module")
def runs(cascade: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade whose Stage B reads text, as every Stage B in the diffusers format does."""
    root = tmp_path_factory.mktemp("with_text")
    encoder = "_target_:wuerstchen_pl.models.text.TextEncoder,width:16,depth:1,num_heads:2"
    text = ["+stage.diffnext.text_dim=16", f"+stage.text_encoder={{{encoder},weights:{clip}}}"]
    shutil.copytree(cascade / "a", root / "default/a")
    assert run_program("train", [*small("b", root), *text]) == 0
    assert run_program("train", small("c", root)) == 0
    return root / "default"


@pytest.fixture(scope="module")
def sources(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Kind and stage -> a source with the trained weights of that stage of ``runs``."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("native", "diffusers"):
        command = [f"ckpt={runs / 'c'}", f"to={root / kind}", f"format={kind}"]
        assert run_program("export", command) == 0

    def source(kind: str, stage: str) -> str:
        run = runs / stage
        path = {"run": run, "checkpoint": load.find_checkpoint(run)}.get(kind, root / kind)
        return str(path)

    return source


def config_of(run: Path, **changed: Any) -> Any:
    """The config that ``build_stage`` reads, for a new stage with the networks of a run."""
    stage = load.read_checkpoint(load.find_checkpoint(run), tensors="none")["stage"]
    stage = {**stage, "ema": None, "lr_schedule": None, "optimizer": None}
    return OmegaConf.create({"stage": stage, "allow_mismatch": False, **changed})


def images_of(stage: Any) -> torch.Tensor:
    """What a frozen Stage A or B makes of an image."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if stage.name == "a":
        return stage.reconstruct(image)
    return stage.reconstruct(image, seeds=[0], num_steps=2)


@pytest.mark.parametrize("stage", "ab")
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_stage_is_the_same_from_every_source(
    kind: str, stage: str, runs: Path, sources: Sources
) -> None:
    expected = load_stage(source=runs / stage, stage=stage)
    frozen = load_stage(source=sources(kind, stage), stage=stage)
    assert torch.equal(images_of(frozen), images_of(expected))
    assert frozen.provenance.encoder == expected.provenance.encoder
    again = load_stage(source=sources(kind, stage), stage=stage)
    assert again.provenance.source == frozen.provenance.source
    with pytest.raises(ValueError, match="has changed to"):
        load_stage(source=sources(kind, stage), stage=stage, sha256="0" * 64)


@pytest.mark.parametrize("stage", "abc")
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_with_the_same_weights_from_every_source(
    kind: str, stage: str, runs: Path, sources: Sources
) -> None:
    torch.manual_seed(1)
    built = build_stage(config_of(runs / stage, init_from=sources(kind, stage)))
    expected = load_stage(source=runs / stage, stage=stage).state_dict()
    state = built.state_dict()
    networks = {"a": ("vqgan",), "b": ("diffnext", "compressor"), "c": ("prior", "text_encoder")}
    names = [name for name in state if name.split(".")[0] in networks[stage]]
    assert len(names) > 20
    assert all(torch.equal(state[name], expected[name]) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_every_source_is_evaluated_with_the_same_result(
    kind: str, runs: Path, sources: Sources, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("red apple\ngreen frog\nsun\nmoon\n")
    reports = []
    for model in (runs / "c", sources(kind, "c")):
        command = [
            f"model={model}", f"output_dir={tmp_path / 'out'}", "device=cpu", "metric=[kid]",
            "fid_features=random", "fid_features.widths=[2,2]", "sample.prior_steps=2",
            "sample.decoder_steps=1", f"prompts={tmp_path / 'prompts.txt'}", "height=64",
            "width=64", f"reference={ROOT / 'docs'}", "cache_dir=null",
        ]  # fmt: skip
        assert run_program("evaluate", command) == 0
        reports.append(json.loads((tmp_path / "out/metrics.json").read_text())["metrics"])
        shutil.rmtree(tmp_path / "out")
    assert reports[0] == reports[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_frozen_models_is_resumed_and_exported(
    kind: str, sources: Sources, tmp_path: Path
) -> None:
    stages = [f"paths.stage_{stage}={sources(kind, stage)}" for stage in "ab"]
    for steps in (1, 2):
        command = [*small("c", tmp_path, steps=steps), *stages, "ckpt=auto"]
        assert run_program("train", command) == 0
    run = tmp_path / "default/c"
    recorded = load.read_checkpoint(load.find_checkpoint(run))["frozen"]["stage_b"]
    assert len(recorded["sha256"]) == len(recorded["encoder"]) == 64
    model = read_run(run)
    assert model.parts.keys() == set(PARTS)
    assert run_program("export", [f"ckpt={run}", f"to={tmp_path / 'model'}"]) == 0
    assert "| Stage C |" in (tmp_path / "model/README.md").read_text()


@pytest.fixture(scope="module")
def other(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of ``runs`` as a model, but with another compressor."""
    model = read_run(runs / "c")
    for name, lazy in model.parts["compressor"].tensors.items():
        tensor = lazy.load()
        changed = tensor + 1 if tensor.is_floating_point() else tensor
        model.parts["compressor"].tensors[name] = in_memory(changed)
    path = tmp_path_factory.mktemp("other") / "model"
    registry.write_model(model, path, "native")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_a_prior_of_another_compressor_is_refused_with_both_hashes(
    kind: str, runs: Path, other: Path, sources: Sources
) -> None:
    stages = [load_stage(source=source, stage="b") for source in (sources(kind, "b"), other)]
    first, second = [str(stage.provenance.encoder)[:12] for stage in stages]
    message = rf"was trained on latents .* sha256 {first}, .* one of {second}; .*allow_mismatch"
    cfg = config_of(runs / "c", init_from=sources(kind, "c"))
    cfg.stage.stage_b.source = str(other)
    with pytest.raises(ValueError, match="init_from=.*" + message):
        build_stage(cfg)
    cfg.allow_mismatch = True
    expected = load_stage(source=runs / "c", stage="c").state_dict()
    state = build_stage(cfg).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="prior=.*" + message):
        registry.read_model(str(other), prior=sources(kind, "c"))
    mixed = registry.read_model(str(other), prior=sources(kind, "c"), allow_mismatch=True)
    assert mixed.parts.keys() == set(PARTS)


@pytest.mark.parametrize("kind", FEW)
def test_a_prior_of_other_latents_is_refused_with_both_scalings(
    kind: str, runs: Path, sources: Sources
) -> None:
    cfg = config_of(runs / "c", init_from=sources(kind, "c"))
    cfg.stage.semantic_scale = 42.0
    message = r"init_from=.* was trained with stage\.semantic_shift=0 and .*_scale=1, .* 0 and 42;"
    with pytest.raises(ValueError, match=message):
        build_stage(cfg)
    cfg.allow_mismatch = True
    assert build_stage(cfg).scaling.scale == 42


def test_a_model_that_states_no_scaling_is_accepted_with_any(runs: Path, tmp_path: Path) -> None:
    model = read_run(runs / "c")
    for name in ("semantic_shift", "semantic_scale"):
        del model.settings[name]
    registry.write_model(model, tmp_path / "model", "native")
    cfg = config_of(runs / "c", init_from=str(tmp_path / "model"))
    cfg.stage.semantic_scale = 42.0
    assert build_stage(cfg).scaling.scale == 42


def test_upstream_files_are_a_frozen_stage_a_and_initial_weights(
    runs: Path, tmp_path: Path
) -> None:
    registry.write_model(read_run(runs / "a"), tmp_path / "upstream", "upstream")
    file = tmp_path / "upstream" / upstream.STAGE_A
    expected = load_stage(source=runs / "a", stage="a")
    assert torch.equal(images_of(load_stage(source=file, stage="a")), images_of(expected))
    built = build_stage(config_of(runs / "a", init_from=str(file)))
    assert torch.equal(images_of(built.eval()), images_of(expected))


def test_a_hub_id_is_a_frozen_stage(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(sources("diffusers", "b"))
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder))
    from_hub = load_stage(source="someone/a-cascade", stage="b")
    assert from_hub.provenance.source == load_stage(source=folder, stage="b").provenance.source


@pytest.mark.parametrize(
    ("stage", "removed", "message"),
    [
        ("b", "compressor", "lacks compressor, which a frozen Stage B needs; add missing parts"),
        ("b", "text_encoder", "lacks text_encoder, which a frozen Stage B needs; add missing"),
        ("a", "vqgan", "lacks vqgan, which a frozen Stage A needs; add missing parts"),
        ("c", "prior", "lacks prior, which stage=c trains; add missing parts"),
        ("c", "prior_text_encoder", "lacks prior_text_encoder, which stage=c trains; add"),
    ],
)
def test_a_model_that_lacks_a_network_is_refused(
    stage: str, removed: str, message: str, runs: Path, tmp_path: Path
) -> None:
    model = read_run(runs / "c")
    del model.parts[removed]
    registry.write_model(model, tmp_path / "model", "native")

    def read() -> Any:
        if stage == "c":
            return build_stage(config_of(runs / "c", init_from=str(tmp_path / "model")))
        return load_stage(source=tmp_path / "model", stage=stage)

    with pytest.raises(ValueError, match=message):
        read()
