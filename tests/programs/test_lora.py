"""``lora extract`` and ``lora resize`` on models and files."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.formats.conftest import CONFIGS, random_model, tensors
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.adapters.adapter import Adapter, Method
from wuerstchen_pl.checkpointing.allowed import instantiate_allowed
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.adapter_files import read_adapter, write_adapter
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.merged_model import adaptable_networks

Program = Callable[..., int]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    registry.write_model(random_model(), path, "native")
    return path


def random_lora(path: Path, method: Method = "lora", rank: int = 3) -> Path:
    torch.manual_seed(0)
    networks = nn.ModuleDict({part: instantiate_allowed(CONFIGS[part]) for part in ("prior",)})
    adapter = Adapter(method=method, rank=rank, targets=["*.attention.*", "*.project"])
    adapter.add_to(networks["prior"])
    for parameter in networks.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    write_adapter(path, adapter.weights(networks.state_dict()), networks)
    return path


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """The base model with random changes of some weights, a bias and a convolution."""
    model = registry.read_model(str(base))
    prior = model.parts["prior"].tensors
    rng = torch.Generator().manual_seed(3)
    for name in (
        "blocks.0.attn.attention.qkv.weight", "blocks.1.res.project.weight", "text_in.weight",
        "blocks.0.res.depthwise.weight", "stem.bias",
    ):  # fmt: skip
        tensor = prior[name].load()
        prior[name] = in_memory(tensor + torch.randn(tensor.shape, generator=rng) * 0.1)
    path = base.with_name("tuned")
    registry.write_model(model, path, "native")
    return path


def rows(folder: Path) -> dict[str, tuple[int, float, float]]:
    """Tensor -> rank, change and error of a report."""
    with (folder / "report.csv").open(encoding="utf-8") as file:
        return {
            row["tensor"]: (int(row["rank"]), float(row["change"]), float(row["error"]))
            for row in csv.DictReader(file)
        }


def changes(before: Path, after: Path) -> dict[str, Tensor]:
    a, b = (tensors(registry.read_model(str(path))) for path in (before, after))
    return {name: b[name] - a[name] for name in a}


def norm(differences: dict[str, Tensor]) -> float:
    return sum(float(d.double().square().sum()) for d in differences.values()) ** 0.5


def test_the_lora_of_a_merged_lora_has_its_change(
    base: Path, program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lora = random_lora(tmp_path / "lora.safetensors")
    assert program("convert", f"from={base}", f"lora=[{lora}]", f"to={tmp_path / 'tuned'}") == 0
    extracted = tmp_path / "extracted"
    keys = [f"base={base}", f"tuned={tmp_path / 'tuned'}", "rank=3"]
    assert program("lora", "extract", *keys, f"to={extracted}") == 0
    networks = adaptable_networks(registry.read_model(str(base)))
    expected, actual = (read_adapter(path, networks) for path in (lora, extracted))
    assert actual.keys() == expected.keys()
    for layer, weights in expected.items():
        change = weights.delta(torch.zeros(()))
        torch.testing.assert_close(
            actual[layer].delta(change), change, atol=1e-5 * float(change.norm()), rtol=0
        )
    printed = capsys.readouterr().out
    assert "100.00% is in the LoRA: 10 layers, rank 3\n   0.00% is beyond the rank\n" in printed
    assert "cannot have" not in printed


@pytest.mark.slow
def test_the_report_adds_up_to_the_change_of_the_model(
    base: Path, tuned: Path, program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The errors of the layers, and what cannot have an adapter, are what the merged LoRA lacks."""
    keys = [f"base={base}", f"tuned={tuned}", f"to={tmp_path / 'lora'}", "rank=4"]
    assert program("lora", "extract", *keys) == 0
    report = rows(tmp_path / "lora")
    without = ["prior.blocks.0.res.depthwise.weight", "prior.stem.bias"]
    layers = [f"prior.blocks.0.attn.attention.qkv.to_{which}" for which in "qkv"]
    layers += ["prior.blocks.1.res.project", "prior.text_in"]
    assert {name: row[0] for name, row in report.items()} == {
        **dict.fromkeys(without, 0), **dict.fromkeys(layers, 4),
    }  # fmt: skip
    assert sum(r[1] ** 2 for r in report.values()) ** 0.5 == pytest.approx(
        norm(changes(base, tuned)), rel=1e-5
    )
    merge = [f"from={base}", f"lora=[{tmp_path / 'lora'}]", f"to={tmp_path / 'merged'}"]
    assert program("convert", *merge) == 0
    lacking = norm(changes(tmp_path / "merged", tuned))
    assert sum(r[2] ** 2 for r in report.values()) ** 0.5 == pytest.approx(lacking, rel=1e-5)
    shares = re.findall(r"^ *([\d.]+)% is ", capsys.readouterr().out, re.MULTILINE)
    assert len(shares) == 3
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.02)
    total = norm(changes(base, tuned))
    assert float(shares[0]) == pytest.approx(100 - 100 * (lacking / total) ** 2, abs=0.01)


def test_a_share_of_each_layer_is_kept(
    base: Path, tuned: Path, program: Program, tmp_path: Path
) -> None:
    keys = [f"base={base}", f"tuned={tuned}", f"to={tmp_path / 'lora'}", "rank=null", "share=0.8"]
    assert program("lora", "extract", *keys) == 0
    kept = [(1 - (e / c) ** 2) ** 0.5 for r, c, e in rows(tmp_path / "lora").values() if r]
    assert all(0.8 <= share < 0.85 for share in kept)
    assert len({rank for rank, _, _ in rows(tmp_path / "lora").values()}) > 2
    pipe = WuerstchenPipeline.from_pretrained(base)
    pipe.load_lora(tmp_path / "lora")  # whose layers have different ranks
    merged = pipe.components["prior"].state_dict()["text_in.weight"]
    expected = tensors(registry.read_model(str(tuned)))["prior.text_in.weight"]
    _, change, error = rows(tmp_path / "lora")["prior.text_in"]
    assert float((merged - expected).norm()) == pytest.approx(error, rel=1e-4)
    assert error < change


def test_a_resized_lora_keeps_most_of_its_change(
    base: Path, program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lora = random_lora(tmp_path / "lora.safetensors", rank=6)
    keys = [f"lora={lora}", f"base={base}", f"to={tmp_path / 'small'}", "rank=2"]
    assert program("lora", "resize", *keys) == 0
    networks = adaptable_networks(registry.read_model(str(base)))
    before, after = (read_adapter(path, networks) for path in (lora, tmp_path / "small"))
    report = rows(tmp_path / "small")
    assert report.keys() == before.keys() == after.keys()
    for layer, weights in before.items():
        change = weights.delta(torch.zeros(()))
        singular = torch.linalg.svdvals(change)
        rank, norm_of_change, error = report[layer]
        assert rank == after[layer].rank == 2
        assert norm_of_change == pytest.approx(float(singular.norm()), rel=1e-5)
        assert error == pytest.approx(float(singular[2:].norm()), rel=1e-4)
        assert float((after[layer].delta(change) - change).norm()) == pytest.approx(error, rel=1e-4)
    assert "is beyond the rank" in capsys.readouterr().out


WRONG = {
    "equal models": (
        ["extract", "base=BASE", "tuned=BASE"], "tuned=BASE has no layer with another weight",
    ),
    "no limit": (
        ["extract", "base=BASE", "tuned=TUNED", "rank=null"], "rank and share are null; set one",
    ),
    "other sizes": (
        ["extract", "base=BASE", "tuned=WIDE"], "prior of tuned does not match the expected",
    ),
    "dora": (["resize", "lora=DORA", "base=BASE"], "lora=DORA has another adapter than LoRA"),
    "loha": (["resize", "lora=LOHA", "base=BASE"], "merge it with python -m wuerstchen_pl.convert"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(
    case: str, base: Path, tuned: Path, program: Program, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    wide = random_model()
    prior = wide.parts["prior"]
    prior.config["text_dim"] = 24
    prior.tensors["text_in.weight"] = in_memory(torch.zeros(128, 24))
    registry.write_model(wide, tmp_path / "wide", "native")
    paths = {
        "BASE": base, "TUNED": tuned, "WIDE": tmp_path / "wide",
        "DORA": random_lora(tmp_path / "dora.safetensors", "dora"),
        "LOHA": random_lora(tmp_path / "loha.safetensors", "loha"),
    }  # fmt: skip
    arguments, message = WRONG[case]
    for name, path in paths.items():
        arguments = [a.replace(name, str(path)) for a in arguments]
        message = message.replace(name, str(path))
    assert program("lora", *arguments, f"to={tmp_path / 'out'}") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
