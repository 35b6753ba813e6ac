"""Checkpointed blocks compute the same gradients, recompute little, and are counted exactly."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from tests.models.test_wrapping import gradients, prior
from wuerstchen_pl.models.activations import (
    ATTENTION,
    PRODUCTS,
    SavedActivations,
    _policy,
    checkpoint_activations,
)

DEPTH, WIDTH, HEADS = 6, 16, 2  # of ``prior``


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_have_the_same_gradients(dropout: float) -> None:
    plain, checkpointed = prior(dropout), prior(dropout)
    checkpoint_activations(checkpointed)
    pairs = list(zip(gradients(plain), gradients(checkpointed), strict=True))
    assert len(pairs) == len(list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()


class Operations(TorchDispatchMode):
    """Counts attentions, and the products of each number of rows to each number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in PRODUCTS:
            self.counts[tuple(args[-1].shape)] += 1
        if func in ATTENTION:
            self.counts["attention"] += 1
        return func(*args, **kwargs or {})


def operations(*, checkpoint: bool) -> Counter[Any]:
    net = prior(0.0)
    if checkpoint:
        checkpoint_activations(net)
    with Operations() as operations:
        gradients(net)
    return operations.counts


def test_a_checkpointed_block_recomputes_neither_attention_nor_the_output_of_its_mlp() -> None:
    plain, checkpointed = operations(checkpoint=False), operations(checkpoint=True)
    assert plain["attention"] == checkpointed["attention"] == DEPTH
    out, hidden = (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
    assert plain[out] == checkpointed[out]
    assert checkpointed[hidden] == plain[hidden] + DEPTH  # recomputed, so that the test can fail


def test_what_a_checkpointed_block_keeps_is_counted_once() -> None:
    """Its input, the outputs of its MLP and of attention with a sum for each query.

    And the modulation, as this width is so small that its product halves the time's 64 channels.
    """
    rows, side = 8, 8
    per_block = rows * (side**2 * (3 * WIDTH + HEADS) + 2 * WIDTH) * 4

    def nbytes(blocks: int) -> int:
        net = prior(0.0)
        net.blocks = net.blocks[:blocks]
        checkpoint_activations(net)
        saved = SavedActivations()
        with saved.collect():
            out = net(torch.randn(rows, 16, side, side), torch.rand(rows), torch.randn(rows, 3, 8))
        assert out.requires_grad
        return saved.nbytes(net.parameters())

    assert nbytes(4) - nbytes(2) == 2 * per_block


@pytest.mark.parametrize("first", ["gradients", "no gradients"])
def test_a_second_forward_pass_under_autocast_has_the_same_gradients(first: str) -> None:
    """A student of distillation, for example, predicts twice; autocast caches weights it casts."""
    plain, checkpointed = prior(0.0), prior(0.0)
    checkpoint_activations(checkpointed)
    x, text, t = torch.randn(2, 16, 4, 4), torch.randn(2, 3, 8), torch.tensor([0.2, 0.7])
    for net in (plain, checkpointed):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(first == "gradients"):
                loss = net(2 * x, t, text).square().mean()
            (loss + net(x, t, text).square().mean()).backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        # without checkpointing, the gradients of both passes are added in bfloat16
        assert float((a.grad - b.grad).norm()) <= 0.01 * float(a.grad.norm())


def test_a_frozen_block_keeps_nothing() -> None:
    net = prior(0.0).requires_grad_(False)
    checkpoint_activations(net)
    saved = SavedActivations()
    with saved.collect():
        net(torch.randn(2, 16, 4, 4), torch.rand(2), torch.randn(2, 3, 8))
    assert saved.nbytes(net.parameters()) == 0


@pytest.mark.parametrize("op", sorted(ATTENTION, key=str), ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_with_dropout_is_recomputed_for_its_random_numbers(
    op: Any, dropout: float
) -> None:
    names = [argument.name for argument in op._schema.arguments]
    arguments = [None] * names.index("dropout_p") + [dropout]
    kept = CheckpointPolicy.MUST_SAVE
    assert (_policy(None, op, *arguments) == kept) == (dropout == 0)
    assert (_policy(None, op, dropout_p=dropout) == kept) == (dropout == 0)
    assert _policy(None, op) == kept
