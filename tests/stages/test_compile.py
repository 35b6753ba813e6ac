"""``compile=true`` compiles the blocks of whole training steps; nothing silently runs eagerly."""

from functools import partialmethod

import lightning as L
import pytest
import torch
import torch._dynamo

from tests.stages.conftest import STAGES
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.step_profile import first_rows, profile_step
from wuerstchen_pl.models.wrapping import compile_blocks
from wuerstchen_pl.stages.stage import Stage


def num_graphs(stage: Stage, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> int:
    """Graphs that Dynamo compiles in steps of these batches, after a profile of the first one.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: if some of the code would run eagerly.
    """
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend)
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compile_blocks(stage)
        stage._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        stage.train()
        profile_step(stage, batches[0])
        for batch in batches:
            stage.training_step(batch, 0).backward()
    return len(graphs)


@pytest.mark.parametrize("name", [pytest.param("b", marks=pytest.mark.slow), "c"])
def test_a_profiled_stage_is_still_compiled(
    name: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert num_graphs(STAGES[name](), [batch], monkeypatch) > 0


@pytest.mark.slow
def test_batches_of_many_sizes_stay_compiled(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [first_rows(batch, rows) for rows in (4, 3, 2, 1)]
    one_size = num_graphs(STAGES["b"](), batches[:1], monkeypatch)
    assert num_graphs(STAGES["b"](), batches, monkeypatch) > one_size > 0


def test_ddp_does_not_split_the_graphs_of_blocks() -> None:
    with torch._dynamo.config.patch(optimize_ddp=True):
        compile_blocks(STAGES["c"]())
        assert torch._dynamo.config.optimize_ddp is False
