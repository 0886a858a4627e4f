"""The moving average: its closed form, its ramp, buffers as they are."""

import pytest
import torch
from torch import nn

from fastxm.training.ema import EMA


def moved(ema: EMA, network: nn.Linear, values: list[float]) -> float:
    for value in values:
        network.weight.data.fill_(value)
        ema.update(network)
    return ema.network.weight.item()


def test_decay_follows_the_recurrence():
    network = nn.Linear(1, 1)
    network.weight.data.fill_(2.0)
    average = moved(EMA(network, 0.9), network, [1.0, 3.0])
    assert average == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 1) + 0.1 * 3)


def test_ramp_starts_near_the_network_and_ends_at_decay():
    network = nn.Linear(1, 1)
    network.weight.data.fill_(2.0)
    ema = EMA(network, 0.5, ramp=True)
    assert moved(ema, network, [1.0]) == pytest.approx(0.1 * 2 + 0.9 * 1)
    ema.updates = 1000
    assert moved(ema, network, [5.0]) == pytest.approx(0.5 * 1.1 + 0.5 * 5)


def test_buffers_are_those_of_the_live_network():
    network = nn.BatchNorm1d(3)
    ema = EMA(network, 0.999)
    network(torch.randn(8, 3) + 4)
    ema.update(network)
    assert torch.equal(ema.network.running_mean, network.running_mean)
    assert ema.network.num_batches_tracked == 1
    assert not any(p.requires_grad for p in ema.network.parameters())


def test_state_round_trip():
    network = nn.Linear(2, 2)
    ema, other = EMA(network, 0.9, ramp=True), EMA(nn.Linear(2, 2), 0.9, ramp=True)
    ema.update(network)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    assert torch.equal(other.network.weight, ema.network.weight)


def test_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match="not 1"):
        EMA(nn.Linear(1, 1), 1.0)
