"""``dry_run=true``: the figures of a real run, without its weights, and what makes it fit."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_DATA, run_program
from wuerstchen_pl.adapters.adapter import Method
from wuerstchen_pl.callbacks import memory_estimate
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.cli.jobs import composed
from wuerstchen_pl.formats import lazy_tensors, registry
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.programs.dry_run import settings_of, variants
from wuerstchen_pl.programs.memory_table import CARDS, USABLE, Setting, advice, memory_table

USUAL = (
    "data=openmoji", *SMALL_DATA, "image_size=64", "bucket_multiple=16", "data.num_workers=0",
    "data.buckets=area", "data.ratios=[1.0]", "trainer.max_steps=1", "trainer.accelerator=cpu",
    "callbacks.sample_grids=null", "callbacks.loss_by_timestep=null", "logger=csv",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    registry.write_model(read_run(cascade / "c"), folder, "native")
    return folder


def command(root: Path, source: Path, *keys: str, experiment: str = "lora") -> list[str]:
    choice = ["stage=c", f"experiment={experiment}", f"init_from={source}", f"paths.root={root}"]
    return [*choice, *USUAL, *keys]


def settings(*keys: str) -> dict[str, list[Setting]]:
    """The settings of each variant, by its label."""
    with composed("train", [*keys, "dry_run=true"]) as cfg:
        return {variant.label: list(settings_of(variant)) for variant in variants(cfg)}


CASES = {
    "finetune": ("finetune", ["cache=false"]),
    "dora": ("lora", ["cache=false", "stage.adapter.method=dora", "trainer.precision=bf16-mixed"]),
    "cached": ("lora", ["activation_checkpointing=true", "stage.ema.device=cpu"]),
    "dreambooth": ("dreambooth", ["stage.preservation.captions=[a]"]),
    "controlnet": ("controlnet", ["control_images=mask"]),
    "word": ("token", ["stage.words.text='<rex>'", "data.captions.trigger='<rex>'"]),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c == "finetune" else pytest.mark.slow) for c in CASES],
)
def test_the_row_of_the_run_is_what_the_run_reports(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, keys = CASES[case]
    arguments = command(tmp_path, model, *keys, experiment=experiment)
    reported: dict[str, int] = {}
    estimate_bytes = memory_estimate.estimate_bytes

    def recording(*args: Any) -> dict[str, int]:
        reported.update(estimate_bytes(*args))
        return dict(reported)

    monkeypatch.setattr(memory_estimate, "estimate_bytes", recording)
    assert run_program("train", arguments) == 0
    row, *_ = settings(*arguments)["this run"]
    for name in ("weights", "gradients", "optimizer", "ema"):
        assert row.state[name] == reported[name], name
    activations = row.activations + 4 * row.per_sample
    assert activations == pytest.approx(reported["activations"], rel=0.1)  # by flash attention


@pytest.mark.parametrize("kind", ["model", pytest.param("run", marks=pytest.mark.slow)])
def test_neither_is_a_weight_read_nor_a_file_written(
    kind: str, model: Path, cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """For a GPU that this machine need not have."""
    pytest.importorskip("bitsandbytes", reason="a setting is its optimizer")
    for function in ((lazy_tensors, "check_finite"), (load, "check_finite")):
        monkeypatch.setattr(*function, pytest.fail)
    source = model if kind == "model" else cascade / "c"
    keys = [a for a in command(tmp_path, source) if not a.startswith("trainer.accelerator")]
    more = ["trainer=gpu", "stage.adapter.rank=1", "dry_run=true"]
    assert run_program("train", [*keys, *more]) == 0
    assert not list(tmp_path.iterdir())
    title, header, *rows, sentence = capsys.readouterr().out.splitlines()
    assert "trainer.precision=bf16-mixed" in title
    assert header.split()[-2 * len(CARDS) :: 2] == [str(card) for card in CARDS]
    assert [row.split("  ")[0] for row in rows] == [
        "experiment=finetune", "+ activation_checkpointing=true", "+ stage.ema.device=cpu",
        "+ optimizer@stage.optimizer=adamw_8bit",
        "this run", "+ activation_checkpointing=true", "+ stage.adapter.base_dtype=bfloat16",
    ]  # fmt: skip
    assert sentence == "On 8, 12, 16, 24 and 80 GB, this run fits as it is."


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow) for m in ("dora", "lora", "loha", "lokr")]
)
def test_settings_need_less_and_less(method: Method, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="a setting is its optimizer")
    adapter_keys = [f"stage.adapter.method={method}", "stage.adapter.rank=2"]
    keys = command(tmp_path, model, *adapter_keys, "cache=false")
    tuned, adapted = settings(*keys).values()
    plain, checkpointed, on_host, eight_bit = tuned
    assert checkpointed.per_sample < 0.7 * plain.per_sample
    assert checkpointed.state == plain.state
    assert on_host.state == {**plain.state, "ema": 0}
    assert eight_bit.state["optimizer"] < 0.3 * plain.state["optimizer"]
    weights = plain.state["weights"]
    assert plain.state["gradients"] == plain.state["ema"] == weights
    adapter = adapted[0].state["gradients"]
    assert 0 < adapter < weights / 4
    assert adapted[0].state["weights"] == weights + adapter
    assert adapted[1].per_sample < 0.7 * adapted[0].per_sample
    assert adapted[2].state["weights"] == weights / 2 + adapter
    assert adapted[2].overrides == (
        "stage.adapter.base_dtype=bfloat16 trainer.precision=bf16-mixed"
    )


@pytest.mark.slow
def test_an_adapter_of_stage_b_has_its_settings_too(model: Path, tmp_path: Path) -> None:
    keys = [a for a in command(tmp_path, model) if a != "stage=c"]
    tuned, adapted = settings("stage=b", *keys, "stage.adapter.rank=1").values()
    assert tuned[0].state["weights"] > adapted[0].state["weights"]  # with the compressor
    assert adapted[0].state["gradients"] < tuned[0].state["gradients"] / 10


def setting(label: str, overrides: str, gb: float, *, advised: bool = True) -> Setting:
    """Of ``gb`` GB and 1 GB per image."""
    state = {"weights": round((gb - 1) * 1e9)}
    return Setting(
        label=label, overrides=overrides, state=state, activations=1e9, per_sample=1e9,
        advised=advised,
    )  # fmt: skip


def test_the_largest_batch_leaves_a_tenth_of_the_memory() -> None:
    for card in CARDS:
        batch = setting("", "", 5).largest_batch(card)
        assert 5 + batch <= USABLE * card < 5 + batch + 1
    assert setting("", "", 30).largest_batch(24) == 0
    row = memory_table([setting("mine", "", 5)]).splitlines()[1]
    assert row.split() == ["mine", "4.00", "1.00", "+", "1.00", "n", "2", "5", "9", "16", "67"]


def test_the_advice_is_the_first_setting_that_fits_then_a_smaller_batch() -> None:
    rows = [
        setting("other", "x", 0.5, advised=False),
        setting("own", "", 17), setting("+", "ckpt", 10), setting("lora", "lora", 7),
    ]  # fmt: skip
    assert advice(rows, rows=4, rows_per_step=12) == (
        "On 8 GB, no setting fits; on 12 GB, set lora data.batch_size=3 global_batch=12; "
        "on 16 GB, set ckpt; on 24 and 80 GB, this run fits as it is."
    )
