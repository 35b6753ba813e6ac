"""The model card of an exported cascade: data, hyperparameters and training time per stage."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.utils import get_object
from omegaconf import OmegaConf

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.allowed import DATA_TARGETS, stage_class, stage_name
from wuerstchen_pl.formats.model import STUDENT
from wuerstchen_pl.formats.run import is_run
from wuerstchen_pl.io import atomic
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.signatures import check_entries, check_value

UNKNOWN = "not recorded"
NUM_COLUMNS = 9
CARD = """\
---
license: {license}
library_name: wuerstchen_pl
pipeline_tag: text-to-image
---
# A Wuerstchen cascade

A text-to-image cascade ([arXiv 2306.00637](https://arxiv.org/abs/2306.00637)), trained with
wuerstchen_pl. License of the weights: {stated}.

| stage | steps | batch | lr | px | data | weights | hours x devices | hardware | sha256 |
|---|---|---|---|---|---|---|---|---|---|
{rows}

```python
from wuerstchen_pl import WuerstchenPipeline

{load}
pipe("a red heart", height={side}, width={side}, seed=0{options}).images[0].save("heart.png")
```
"""
LOAD = {
    "model": 'pipe = WuerstchenPipeline.from_pretrained("this folder")',
    "adapter": 'pipe = WuerstchenPipeline.from_pretrained("the base model")\n'
    'pipe.load_lora("this folder")',
    "words": 'pipe = WuerstchenPipeline.from_pretrained("the base model")\n'
    'pipe.load_words("this folder")',
    "controlnet": 'pipe = WuerstchenPipeline.from_pretrained("the base model")\n'
    'pipe.load_controlnet("this folder")  # and pipe(..., control_image="image.png")',
}
"""How an export is used."""


def checkpoint_chain(path: Path) -> list[Source]:
    """A checkpoint, and the checkpoints or the model of the frozen stages below it."""
    chain = [Source(path=str(path), sha256=atomic.sha256(path))]
    content = load.read_checkpoint(path, tensors="none")
    for name, recorded in content["frozen"].items():
        if name in stage_class(content["stage"]).TRAINING_ONLY:  # a teacher, whose file may be gone
            continue
        frozen = load.find_frozen(path, name, recorded)
        is_checkpoint = is_run(frozen)
        model = Source(path=str(frozen), sha256=recorded["sha256"])
        chain += checkpoint_chain(frozen) if is_checkpoint else [model]
    return list({source["path"]: source for source in chain}.values())


def render_card(
    sources: Sequence[Source],
    *,
    license: str | None,
    ema: bool,
    usage: Literal["model", "adapter", "words", "controlnet"] = "model",
) -> str:
    """The card in Markdown, with the front matter that hubs read.

    Args:
        sources: checkpoints of the stages, the last stage first; see ``checkpoint_chain``.
        license: license of the weights, as hubs spell it (``mit``).
        ema: whether the first checkpoint's EMA weights were exported.
        usage: what was exported: the model, or only what a run added to it.
    """
    rows = [_row(source, with_ema=ema or i > 0) for i, source in enumerate(sources)]
    options = ""
    if is_run(Path(sources[0]["path"])):
        stage = load.read_checkpoint(Path(sources[0]["path"]), tensors="none")["stage"]
        if STUDENT in stage:
            options = f", prior_num_inference_steps={stage[STUDENT]}, prior_guidance_scale=0"
    return CARD.format(
        options=options,
        license=license or "other",
        stated=license or "not stated",
        rows="\n".join(rows),
        load=LOAD[usage],
        side=_config(Path(sources[0]["path"])).get("image_size", 1024),
    )


def _row(source: Source, *, with_ema: bool) -> str:
    path = Path(source["path"])
    if not is_run(path):
        unknown = f"{UNKNOWN} | " * (NUM_COLUMNS - 2)
        return f"| the stages below, from {path.name} | {unknown}{source['sha256'][:12]} |"
    content = load.read_checkpoint(path, tensors="none")
    stage, trained = content["stage"], _config(path)
    data, record = trained.get("data", {}), _record(path)
    cells = [
        f"Stage {stage_name(stage).upper()}",
        f"{content['global_step']:,}" if "global_step" in content else UNKNOWN,
        data.get("batch_size", UNKNOWN),
        stage.get("optimizer", {}).get("lr", UNKNOWN),
        trained.get("image_size", UNKNOWN),
        _source(data),
        "EMA" if with_ema and content["ema"]["shadow"] else "raw",
        f"{record['hours']} x {record['devices']}" if record else UNKNOWN,
        record.get("hardware", UNKNOWN),
        source["sha256"][:12],
    ]
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _source(data: dict[str, Any]) -> str:
    """The function that built the data module, and its arguments without local paths."""
    if (target := data.get("_target_")) is None:
        return UNKNOWN
    name = get_object(target).__name__ if target in DATA_TARGETS else target
    arguments = [
        f"{k}={data[k]}" for k in ("urls", "name", "groups", "limit") if data.get(k) is not None
    ]
    return f"{name} ({', '.join(arguments)})" if arguments else name


def _config(path: Path) -> dict[str, Any]:
    """The full config of a checkpoint's run; empty if its config.yaml is missing."""
    file = path.parent.parent / "config.yaml"
    with contents_of(file, "remove it"):
        content: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
        check_value("data", content.get("data", {}), dict)
    return content


def _record(path: Path) -> dict[str, Any]:
    """The run metadata that a completed run writes; empty if run.json is missing."""
    file = path.parent.parent / "run.json"
    if not file.is_file():
        return {}
    with contents_of(file, "remove it"):
        content = json.loads(file.read_text("utf-8"))
        check_entries(content, {"hours": float | str, "devices": int})
    return content
