"""Loading checkpoints: search, integrity checks, and safety with untrusted files."""

import hashlib
import pickle
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from wuerstchen_pl.checkpointing import allowed, load
from wuerstchen_pl.checkpointing.allowed import ALLOWED_TARGETS, STAGE_TARGETS, stage_class
from wuerstchen_pl.checkpointing.load import find_checkpoint, read_checkpoint
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.io import atomic
from wuerstchen_pl.models.compressor import EfficientNet


@pytest.fixture
def moved(cascade: Path, tmp_path: Path) -> Path:
    """A copy of the cascade to modify, without hashes, as an attacker could forge them."""
    return Path(
        shutil.copytree(cascade, tmp_path / "moved", ignore=shutil.ignore_patterns("*.sha256"))
    )


def rewrite(run: Path, **changed: Any) -> Path:
    """Change entries of the newest checkpoint of a run."""
    path = find_checkpoint(run)
    content = {**torch.load(path, weights_only=True), **changed}
    path.unlink()  # not overwritten, as the weights of loaded stages are mapped to the file
    torch.save(content, path)
    return path


READERS: dict[str, Callable[[Path], Any]] = {
    "stage": lambda run: load_stage(source=run, stage=run.name),
    "model": read_run,
}
"""How the run of a stage is read: to sample in training, and by all other programs."""


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return READERS[request.param]


def config_of(run: Path) -> dict[str, Any]:
    return torch.load(find_checkpoint(run), weights_only=True)["stage"]


# Untrusted checkpoints


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_a_pickle_payload_is_refused_and_runs_no_code(
    moved: Path,
    tmp_path: Path,
    legacy: bool,
    read: Callable[[Path], Any],
) -> None:
    proof = tmp_path / "it ran"
    path = find_checkpoint(moved / "a")
    content = {**torch.load(path, weights_only=True), "payload": Payload(proof)}
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="was not loaded"):
        read(moved / "a")
    assert not proof.exists()
    if legacy:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert proof.exists(), "the payload would have worked"


@pytest.mark.parametrize(
    "target",
    ["os.system", "wuerstchen_pl.checkpointing.load.os.system", "wuerstchen_pl.stages.a", "", 3],
)
@pytest.mark.parametrize("inside", [dict, list, tuple, OrderedDict])
def test_a_target_outside_the_package_is_refused(
    moved: Path, target: Any, inside: type, read: Callable[[Path], Any]
) -> None:
    planted: Any = {"_target_": target, "command": "true"}
    planted = inside(planted if issubclass(inside, dict) else [planted])
    config = config_of(moved / "a")
    config["vqgan"] = {**config["vqgan"], "width": planted}
    rewrite(moved / "a", stage=config)
    with pytest.raises(ValueError, match="is not one of this package's"):
        read(moved / "a")


@pytest.mark.parametrize(
    "target", ["planted_module.StageA", "os.system", "wuerstchen_pl.data.factories.folder", None]
)
def test_a_stage_outside_the_package_is_refused_and_not_imported(
    moved: Path,
    target: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path], Any],
) -> None:
    (tmp_path / "planted_module.py").write_text("class StageA:\n    name = 'a'\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(moved / "a", stage={"_target_": target})
    with pytest.raises(ValueError, match=r"is not a stage of this package"):
        read(moved / "a")
    assert "planted_module" not in sys.modules
    assert hydra.utils.get_class("planted_module.StageA").name == "a"
    del sys.modules["planted_module"]


@pytest.mark.parametrize("target", sorted(STAGE_TARGETS))
def test_the_class_of_a_stage_has_its_name(target: str) -> None:
    stage = stage_class({"_target_": target})
    assert f"{stage.__module__}.{stage.__qualname__}" == target
    module = stage.__module__.rpartition(".")[2]
    assert stage.name == {"b_tokens": "b", "controlnet": "c", "distillation": "c"}.get(
        module, module
    )


@pytest.mark.parametrize("kind", ["value", "list", "tuple"])
def test_an_interpolation_is_refused(moved: Path, kind: str, read: Callable[[Path], Any]) -> None:
    text = "${oc.env:HOME}"
    planted: Any = {"value": text, "list": ["a", text], "tuple": ("a", (text,))}[kind]
    config = config_of(moved / "a")
    config["vqgan"] = {**config["vqgan"], "levels": planted}
    rewrite(moved / "a", stage=config)
    with pytest.raises(ValueError, match="is an interpolation"):
        read(moved / "a")


def test_allowed_targets_exist() -> None:
    for target in sorted(ALLOWED_TARGETS):
        assert callable(hydra.utils.get_object(target))


# Damage


@pytest.mark.parametrize("share", [0.0, 0.01, 0.02, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(
    moved: Path, share: float, read: Callable[[Path], Any]
) -> None:
    path = find_checkpoint(moved / "a")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        read(moved / "a")


@pytest.mark.parametrize("content", [3, {"stage": {}}, {"state_dict": {}}, {"stage": "a"}])
def test_another_torch_file_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt is not a checkpoint of a wuerstchen_pl run"):
        load_stage(source=tmp_path / "x.ckpt", stage="a")


def test_weights_of_other_networks_are_refused(moved: Path) -> None:
    path = rewrite(moved / "a", state_dict={"vqgan.x": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"{path.name} does not contain the weights"):
        load_stage(source=moved / "a", stage="a")


# Search


@pytest.mark.parametrize(("stage", "needed"), [("a", "b"), ("a", "c"), ("b", "c")])
def test_another_stage_is_refused(cascade: Path, stage: str, needed: str) -> None:
    message = f"contains stage={stage}, but stage={needed} is needed"
    with pytest.raises(ValueError, match=message):
        load_stage(source=cascade / stage, stage=needed)


@pytest.mark.parametrize(("stage", "needed"), [("b", "a"), ("c", "a"), ("c", "b")])
def test_a_run_has_the_stages_that_it_was_trained_with(
    cascade: Path, stage: str, needed: str
) -> None:
    expected, actual = (load_stage(source=cascade / s, stage=needed) for s in (needed, stage))
    assert actual.provenance == expected.provenance
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor)


def test_the_error_for_a_missing_run_tells_how_to_train_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist; .*stage=b.*paths\.stage_b="):
        load_stage(source=tmp_path / "b", stage="b")
    with pytest.raises(FileNotFoundError, match="contains no checkpoint"):
        load_stage(source=tmp_path, stage="c")


def test_the_newest_checkpoint_has_the_highest_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (9_999_999, 10_000_000, 500):
        (tmp_path / f"checkpoints/step{step:07d}.ckpt").touch()
    (tmp_path / "checkpoints/step20000000.partial").touch()
    assert find_checkpoint(tmp_path).name == "step10000000.ckpt"
    assert find_checkpoint(tmp_path / "checkpoints/step0000500.ckpt").name == "step0000500.ckpt"


# Cascades


def test_a_moved_cascade_loads_without_the_old_folder(cascade: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second/deeper"
    shutil.copytree(cascade, first)
    second.parent.mkdir()
    first.rename(second)
    stage = load_stage(source=second / "c", stage="c")
    stage_a = stage.frozen["stage_b"].frozen["stage_a"]
    assert Path(stage_a.provenance.source["path"]).parent.parent == second / "a"


def test_a_stage_a_that_changed_since_stage_b_was_trained_is_refused(
    moved: Path, read: Callable[[Path], Any]
) -> None:
    weights = torch.load(find_checkpoint(moved / "a"), weights_only=True)["state_dict"]
    rewrite(moved / "a", state_dict={key: value + 1 for key, value in weights.items()})
    for stage in "bc":
        with pytest.raises(ValueError, match=r"had sha256 .* in training, which has changed to"):
            read(moved / stage)


def test_a_run_that_was_moved_alone_finds_stage_a_by_its_absolute_path(moved: Path) -> None:
    shutil.rmtree(moved / "a")
    stage = load_stage(source=moved / "b", stage="b")
    assert "moved" not in stage.frozen["stage_a"].provenance.source["path"]


def test_the_error_for_a_missing_stage_a_names_its_path(
    moved: Path, read: Callable[[Path], Any]
) -> None:
    shutil.rmtree(moved / "a")
    path = find_checkpoint(moved / "b")
    content = torch.load(path, weights_only=True)
    content["frozen"]["stage_a"]["absolute_path"] = str(moved / "gone")
    path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
    torch.save(content, path)
    with pytest.raises(FileNotFoundError, match=r"needs its stage_a at .*/moved/a/"):
        read(moved / "b")


def test_a_moved_folder_is_read_from_any_working_directory(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of frozen stages are relative to the run's folder, not to the working directory."""
    monkeypatch.chdir(moved)
    stage = load_stage(source="b", stage="b")
    assert Path(stage.frozen["stage_a"].provenance.source["path"]).is_relative_to(moved / "a")


def test_a_checkpoint_is_hashed_once_and_its_optimizer_state_is_not_read(
    cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic._file_sha256.cache_clear()
    hashed: list[str] = []
    original = hashlib.file_digest

    def recording_hash(file: Any, name: str) -> Any:
        hashed.append(file.name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", recording_hash)
    read_run(cascade / "c")
    assert len(hashed) == len(set(hashed)) == 3
    content = read_checkpoint(find_checkpoint(cascade / "c"))
    assert content["optimizer_states"]
    mapped = Path("/proc/self/maps").read_text()
    assert str(find_checkpoint(cascade / "c")) in mapped  # tensors are read only when used


@pytest.mark.parametrize("stage", "abc")
def test_frozen_networks_are_not_in_checkpoints(cascade: Path, stage: str) -> None:
    content = torch.load(find_checkpoint(cascade / stage), weights_only=True)
    module = load_stage(source=cascade / stage, stage=stage)
    trained = {name: p.numel() for name, p in module.named_parameters()}
    assert not [key for key in content["state_dict"] if key.startswith(tuple(module.frozen))]
    assert content["ema"]["shadow"].keys() == trained.keys()
    state_sizes = [
        state["exp_avg"].numel()
        for optimizer in content["optimizer_states"]
        for state in optimizer["state"].values()
    ]
    assert sum(state_sizes) == sum(trained.values())


@pytest.mark.parametrize("ema", [False, True])
def test_ema_or_raw_weights_are_loaded_as_requested(cascade: Path, ema: bool) -> None:
    content = torch.load(find_checkpoint(cascade / "c"), weights_only=True)
    module = load_stage(source=cascade / "c", stage="c", ema=ema)
    expected = content["ema"]["shadow"] if ema else content["state_dict"]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected[name])
    shadow, raw = content["ema"]["shadow"], content["state_dict"]
    assert any(not torch.equal(shadow[name], raw[name]) for name in shadow)


def test_pretrained_weights_are_needed_only_for_networks_that_the_checkpoint_lacks() -> None:
    backbone = {"_target_": "wuerstchen_pl.models.compressor.EfficientNet", "weights": "imagenet"}
    config = {
        "compressor": {"_target_": "x", "backbone": backbone},
        "text_encoder": {"_target_": "y", "weights": "clip.pt"},
    }
    state_dict = {"compressor.backbone.features.0": torch.ones(1)}
    content = {"stage": config, "state_dict": state_dict, "frozen": {}}
    compressor, text_encoder = (
        load.argument_config(Path("x.ckpt"), content, name) for name in config
    )
    assert compressor["backbone"]["weights"] is None
    assert text_encoder["weights"] == "clip.pt"
    assert config["compressor"]["backbone"]["weights"] == "imagenet", "the input is not modified"


def test_a_trained_text_encoder_needs_no_clip_file(moved: Path) -> None:
    config = config_of(moved / "c")
    before = load_stage(source=moved / "c", stage="c").state_dict()
    config["text_encoder"] = {**config["text_encoder"], "weights": "/no/such/clip.pt"}
    rewrite(moved / "c", stage=config)
    after = load_stage(source=moved / "c", stage="c").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_imagenet_backbone_is_not_downloaded_for_sampling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requested = []
    monkeypatch.setattr(
        EfficientNet, "__init__", lambda self, *, weights=None: requested.append(weights)
    )
    backbone = {"_target_": "wuerstchen_pl.models.compressor.EfficientNet", "weights": "imagenet"}
    allowed.instantiate_allowed(load.drop_weight_paths(backbone))
    assert requested == [None]
