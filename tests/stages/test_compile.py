"""``compile=true`` compiles the blocks of whole training steps; nothing silently runs eagerly."""

import lightning as L
import pytest
import torch
import torch._dynamo

from tests.stages.conftest import STAGES
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.step_profile import first_rows, profile_step
from wuerstchen_pl.models.wrapping import compile_blocks
from wuerstchen_pl.stages.stage import Stage


def in_training(stage: Stage) -> Stage:
    stage._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return stage.train()


def run_compiled(stage: Stage, batches: list[Batch]) -> None:
    """Steps of these batches with compiled blocks, after a profile of the first one.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: if some of the code would run eagerly.
    """
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compile_blocks(in_training(stage))
        profile_step(stage, batches[0])
        for batch in batches:
            stage.training_step(batch, 0).backward()


@pytest.mark.parametrize("name", [pytest.param("b", marks=pytest.mark.slow), "c"])
def test_a_profiled_stage_is_still_compiled(
    name: str, batch: Batch, graphs: list[torch.fx.GraphModule]
) -> None:
    run_compiled(STAGES[name](), [batch])
    assert graphs


@pytest.mark.slow
def test_batches_of_many_sizes_stay_compiled(
    batch: Batch, graphs: list[torch.fx.GraphModule]
) -> None:
    batches = [first_rows(batch, rows) for rows in (4, 3, 2, 1)]
    run_compiled(STAGES["b"](), batches[:1])
    of_one_size = len(graphs)
    torch._dynamo.reset()
    run_compiled(STAGES["b"](), batches)
    assert len(graphs) - of_one_size > of_one_size > 0


@pytest.mark.parametrize(
    "name",
    ["c", *(pytest.param(name, marks=pytest.mark.slow) for name in ("b", "b_tokens", "ldm"))],
)
def test_a_compiled_step_has_the_same_gradients(
    name: str, batch: Batch, graphs: list[torch.fx.GraphModule]
) -> None:
    plain, compiled = in_training(STAGES[name]()), in_training(STAGES[name]())
    with torch.no_grad():  # many weights are zero at first, and then so are gradients of others
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled)
    for stage in (plain, compiled):
        torch.manual_seed(0)
        stage.training_step(batch, 0).backward()
    assert graphs
    actual, expected = (
        {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        for stage in (compiled, plain)
    )
    assert all(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(actual, expected)


def test_ddp_does_not_split_the_graphs_of_blocks() -> None:
    with torch._dynamo.config.patch(optimize_ddp=True):
        compile_blocks(STAGES["c"]())
        assert torch._dynamo.config.optimize_ddp is False
