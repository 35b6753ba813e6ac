"""The exponential moving average, compared with values computed by hand."""

import pytest
import torch
from torch import nn

from wuerstchen_pl.stages.ema import EMA


def values_after(ema: EMA, values: list[float]) -> nn.Module:
    """A module whose only weight is set to each of ``values``, followed by an EMA update."""
    module = nn.Linear(1, 1, bias=False)
    for value in values:
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update(module)
    return module


def test_ema_equals_a_hand_computation_with_warm_up() -> None:
    ema = EMA(decay=0.5)
    values_after(ema, [1.0, 2.0, 4.0])
    first = 1.0
    second = first + (1 - 2 / 11) * (2.0 - first)  # decay (1 + 1) / (10 + 1)
    third = second + (1 - 3 / 12) * (4.0 - second)
    assert float(ema.shadow["weight"]) == pytest.approx(third)


def test_the_warm_up_ends_at_the_decay() -> None:
    ema = EMA(decay=0.2)
    values_after(ema, [0.0] * 5 + [1.0])
    assert float(ema.shadow["weight"]) == pytest.approx(0.8)


def test_the_ema_is_updated_every_few_steps_from_a_start_step() -> None:
    ema = EMA(decay=0.0, every_steps=2, start_step=3)
    values_after(ema, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert ema.num_updates == 2
    assert float(ema.shadow["weight"]) == pytest.approx(6.0)


def test_the_decay_without_warm_up() -> None:
    ema = EMA(decay=0.9, every_steps=2, start_step=2, warmup=False)
    values_after(ema, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert float(ema.shadow["weight"]) == pytest.approx(4 + 0.1 * (6 - 4))


def test_a_shadow_in_host_memory_equals_one_on_the_device() -> None:
    module = nn.Linear(3, 2, device="meta")
    ema = EMA(decay=0.9, device="cpu")
    with pytest.raises(NotImplementedError):
        ema.update(module)  # it copies to host memory, which a meta tensor does not support
    on_host, on_device = EMA(decay=0.9, device="cpu"), EMA(decay=0.9)
    values = [1.0, 3.0, 2.0]
    values_after(on_host, values)
    module = values_after(on_device, values)
    assert torch.equal(on_host.shadow["weight"], on_device.shadow["weight"])
    with on_host.applied(module):
        assert torch.equal(module.weight, on_device.shadow["weight"])
    assert module.weight.item() == 2.0


def test_raw_and_ema_weights_survive_a_failure_while_they_are_swapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, ema = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), EMA(decay=0.9)
    ema.update(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    weights = [p.detach().clone() for p in module.parameters()]
    shadow = {name: t.clone() for name, t in ema.shadow.items()}
    copies = []
    copy_ = torch.Tensor.copy_

    def failing_copy(tensor: torch.Tensor, *args: object) -> torch.Tensor:
        copies.append(tensor)
        if len(copies) == 3:
            raise KeyboardInterrupt
        return copy_(tensor, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "copy_", failing_copy)
    with pytest.raises(KeyboardInterrupt), ema.applied(module):
        raise AssertionError("not reached")
    monkeypatch.undo()
    assert len(copies) > 3
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))
    assert all(torch.equal(t, shadow[name]) for name, t in ema.shadow.items())


def test_a_model_with_ema_weights_has_its_current_buffers() -> None:
    module, ema = nn.BatchNorm1d(2), EMA(decay=0.9)
    ema.update(module)
    module(torch.randn(8, 2))
    with ema.applied(module):
        assert int(module.num_batches_tracked) == 1
    assert sorted(ema.shadow) == ["bias", "weight"]


def test_raw_weights_are_restored_after_an_exception() -> None:
    ema = EMA(decay=0.5)
    module = values_after(ema, [1.0, 3.0])
    ema_weight = float(ema.shadow["weight"])
    applied_weights = []

    def interrupted() -> None:
        with ema.applied(module):
            applied_weights.append(module.weight.item())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert applied_weights == [ema_weight] != [3.0]
    assert module.weight.item() == 3.0
    assert float(ema.shadow["weight"]) == ema_weight


def test_frozen_parameters_and_buffers_have_no_shadow() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    ema = EMA(decay=0.9)
    ema.update(module)
    assert sorted(ema.shadow) == ["0.bias", "1.bias", "1.weight"]


def test_resuming_from_the_state_dict_is_exact() -> None:
    whole, first = EMA(decay=0.9), EMA(decay=0.9)
    values_after(whole, [1.0, 2.0, 3.0, 4.0])
    values_after(first, [1.0, 2.0])
    resumed = EMA(decay=0.9)
    resumed.load_state_dict(first.state_dict())
    values_after(resumed, [3.0, 4.0])
    assert torch.equal(resumed.shadow["weight"], whole.shadow["weight"])


def test_a_loaded_shadow_is_averaged_by_name_and_not_by_order() -> None:
    module, ema = nn.Linear(1, 1), EMA(decay=0.0)
    state = {"weight": torch.tensor([[5.0]]), "bias": torch.tensor([7.0])}
    reordered = {"bias": state["bias"], "weight": state["weight"]}
    ema.load_state_dict({"num_steps": 1, "num_updates": 1, "shadow": reordered})
    ema.update(module)
    for name, p in module.named_parameters():
        assert torch.equal(ema.shadow[name], p)


def test_before_the_first_update_the_raw_weights_are_used() -> None:
    ema = EMA(decay=0.9, start_step=2)
    module = values_after(ema, [1.0, 2.0])
    ema.overwrite_rows("weight", torch.tensor([0]), torch.tensor([[9.0]]))
    assert not ema.shadow
    with ema.applied(module):
        assert module.weight.item() == 2.0
    ema.update(module)
    assert float(ema.shadow["weight"]) == 2.0


def test_the_default_is_an_update_at_every_step() -> None:
    by_default, explicit = EMA(decay=0.7), EMA(decay=0.7, every_steps=1, start_step=0, warmup=True)
    for values in ([1.0], [4.0, 9.0], [float(i) for i in range(20)]):
        values_after(by_default, values)
        values_after(explicit, values)
        assert torch.equal(by_default.shadow["weight"], explicit.shadow["weight"])
    assert by_default.num_updates == by_default.num_steps == 23


def test_only_the_given_rows_of_a_shadow_are_overwritten() -> None:
    module = nn.Embedding(3, 2)
    ema = EMA(decay=0.9)
    ema.update(module)
    with torch.no_grad():
        module.weight += 1
    before = ema.shadow["weight"].clone()
    ema.overwrite_rows("weight", torch.tensor([1]), module.weight[[1]].detach())
    assert torch.equal(ema.shadow["weight"][1], module.weight[1].detach())
    assert torch.equal(ema.shadow["weight"][[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(
    "wrong", [{"decay": 1.0}, {"decay": -0.001}, {"decay": 0.9, "every_steps": 0}]
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="out of range"):
        EMA(**wrong)
