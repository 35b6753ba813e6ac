"""The exponential moving average, against a computation by hand."""

import pytest
import torch
from torch import nn

from wuerstchen_pl.stages.ema import EMA


def follow(ema: EMA, values: list[float]) -> nn.Module:
    """A module whose one weight takes ``values`` in turn, an update after each."""
    module = nn.Linear(1, 1, bias=False)
    for value in values:
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update(module)
    return module


def test_ema_equals_a_hand_computation_with_warm_up() -> None:
    ema = EMA(decay=0.5)
    follow(ema, [1.0, 2.0, 4.0])
    first = 1.0
    second = first + (1 - 2 / 11) * (2.0 - first)  # decay (1 + 1) / (10 + 1)
    third = second + (1 - 3 / 12) * (4.0 - second)
    assert float(ema.shadow["weight"]) == pytest.approx(third)


def test_the_warm_up_ends_at_the_decay() -> None:
    ema = EMA(decay=0.2)
    follow(ema, [0.0] * 5 + [1.0])
    assert float(ema.shadow["weight"]) == pytest.approx(0.8)


def test_the_published_codes_ema_every_hundred_steps() -> None:
    ema = EMA(decay=0.0, every_steps=2, start_step=3)
    follow(ema, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert ema.num_updates == 2
    assert float(ema.shadow["weight"]) == pytest.approx(6.0)


def test_the_published_codes_decay_has_no_warm_up() -> None:
    ema = EMA(decay=0.9, every_steps=2, start_step=2, warmup=False)
    follow(ema, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert float(ema.shadow["weight"]) == pytest.approx(4 + 0.1 * (6 - 4))


def test_a_shadow_kept_by_the_host_is_the_same_and_away_from_the_weights() -> None:
    module = nn.Linear(3, 2, device="meta")  # a device whose tensors hold no values to average
    ema = EMA(decay=0.9, device="cpu")
    with pytest.raises(NotImplementedError):
        ema.update(module)  # it is copied to the host, which a meta tensor cannot be
    kept, other = EMA(decay=0.9, device="cpu"), EMA(decay=0.9)
    values = [1.0, 3.0, 2.0]
    follow(kept, values)
    module = follow(other, values)
    assert torch.equal(kept.shadow["weight"], other.shadow["weight"])
    with kept.applied(module):
        assert torch.equal(module.weight, other.shadow["weight"])
    assert module.weight.item() == 2.0


def test_weights_and_averages_survive_a_failure_while_they_are_exchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, ema = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), EMA(decay=0.9)
    ema.update(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    weights = [p.detach().clone() for p in module.parameters()]
    averages = {name: t.clone() for name, t in ema.shadow.items()}
    copies = []
    copy_ = torch.Tensor.copy_

    def failing(tensor: torch.Tensor, *args: object) -> torch.Tensor:
        copies.append(tensor)
        if len(copies) == 3:
            raise KeyboardInterrupt
        return copy_(tensor, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(KeyboardInterrupt), ema.applied(module):
        raise AssertionError("not reached")
    monkeypatch.undo()
    assert len(copies) > 3
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    assert all(torch.equal(t, averages[name]) for name, t in ema.shadow.items())


def test_an_averaged_model_has_the_present_buffers() -> None:
    module, ema = nn.BatchNorm1d(2), EMA(decay=0.9)
    ema.update(module)
    module(torch.randn(8, 2))
    with ema.applied(module):
        assert int(module.num_batches_tracked) == 1
    assert sorted(ema.shadow) == ["bias", "weight"]


def test_raw_weights_come_back_whatever_raises() -> None:
    ema = EMA(decay=0.5)
    module = follow(ema, [1.0, 3.0])
    averaged = float(ema.shadow["weight"])
    seen = []

    def interrupted() -> None:
        with ema.applied(module):
            seen.append(module.weight.item())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert seen == [averaged] != [3.0]
    assert module.weight.item() == 3.0
    assert float(ema.shadow["weight"]) == averaged


def test_frozen_parameters_and_buffers_are_left_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    ema = EMA(decay=0.9)
    ema.update(module)
    assert sorted(ema.shadow) == ["0.bias", "1.bias", "1.weight"]


def test_state_goes_on_exactly() -> None:
    whole, first = EMA(decay=0.9), EMA(decay=0.9)
    follow(whole, [1.0, 2.0, 3.0, 4.0])
    follow(first, [1.0, 2.0])
    second = EMA(decay=0.9)
    second.load_state_dict(first.state_dict())
    follow(second, [3.0, 4.0])
    assert torch.equal(second.shadow["weight"], whole.shadow["weight"])


def test_overwritten_rows_take_the_present_weights() -> None:
    module = nn.Embedding(3, 2)
    ema = EMA(decay=0.9)
    ema.update(module)
    with torch.no_grad():
        module.weight += 1
    before = ema.shadow["weight"].clone()
    ema.overwrite_rows("weight", torch.tensor([1]), module.weight[[1]].detach())
    assert torch.equal(ema.shadow["weight"][1], module.weight[1].detach())
    assert torch.equal(ema.shadow["weight"][[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": 0.9, "every_steps": 0}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="out of range"):
        EMA(**wrong)
