"""StackGAN's blocks: the counts of the released networks, shapes, what the heads see."""

import pytest
import torch
from torch.nn import functional as F

from fastxm.nn.mlp import Standardise
from fastxm.nn.stackgan import (
    ConditioningAugmentation,
    FirstStage,
    GatedResidual,
    JointDiscriminator,
    draw,
    gated,
    gated_up,
    orthogonal_,
)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: JointDiscriminator(64, 64, 128), 5_723_906),
        (lambda: JointDiscriminator(128, 64, 128), 18_834_178),
        (lambda: JointDiscriminator(256, 64, 128), 71_269_122),
        (lambda: JointDiscriminator(256, 64, 256), 71_858_946),
        (lambda: FirstStage(128 + 100, 64), 20_074_240),
        (lambda: FirstStage(100 + 100, 32), 6_444_928),
        (lambda: ConditioningAugmentation(1024, 128), 524_800),
        (lambda: torch.nn.Sequential(GatedResidual(64), GatedResidual(64)), 221_952),
        (lambda: gated_up(64, 32), 36_992),
    ],
)
def test_parameter_counts_of_the_released_networks(make, expected):
    with torch.device("meta"):
        assert count(make()) == expected


@pytest.mark.parametrize("size", [64, 128, 256])
def test_discriminators_end_at_4_by_4(size):
    judge = JointDiscriminator(size, 2, 5)
    features = judge(torch.rand(3, 3, size, size))
    assert features.shape == (3, 16, 4, 4)
    assert judge.real(features).shape == (3,)
    assert judge.matched(features, torch.randn(3, 5)).shape == (3,)


def test_only_one_head_sees_the_condition():
    judge = JointDiscriminator(64, 2, 5).eval()
    features, conditions = judge(torch.rand(1, 3, 64, 64)).expand(2, -1, -1, -1), torch.randn(2, 5)
    a, b = judge.matched(features, conditions)
    assert a != b
    a, b = judge.real(features)
    assert a == b


def test_the_first_stage_doubles_up_to_64():
    assert FirstStage(7, 3)(torch.randn(2, 7)).shape == (2, 3, 64, 64)


def test_a_gate_is_half_times_the_sigmoid_of_the_other_half():
    block, x = gated(3, 4), torch.randn(2, 3, 5, 5)
    both = F.batch_norm(F.conv2d(x, block[0].weight, padding=1), None, None, training=True)
    torch.testing.assert_close(block(x), both[:, :4] * both[:, 4:].sigmoid())


def test_doubling_convolves_what_nearest_neighbours_make():
    block, x = gated_up(3, 4), torch.randn(2, 3, 8, 8)
    doubled = F.conv2d(F.interpolate(x, scale_factor=2.0), block[0].weight, padding=1)
    both = F.batch_norm(doubled, None, None, training=True)
    torch.testing.assert_close(block(x), both[:, :4] * both[:, 4:].sigmoid())


def test_augmentation_draws_the_gaussian_that_it_names():
    mean, log_variance = torch.randn(1, 6), torch.randn(1, 6)
    drawn = draw(mean.expand(200_000, 6), log_variance.expand(200_000, 6))
    error = (drawn.mean(0) - mean[0]) / (0.5 * log_variance[0]).exp()  # of a mean: 1 / sqrt(N)
    assert error.abs().max() < 5 / 200_000**0.5
    torch.testing.assert_close(drawn.var(0).log(), log_variance[0], rtol=0, atol=0.03)


def test_augmentation_is_a_gated_linear_map():
    augment, x = ConditioningAugmentation(5, 3), torch.randn(4, 5)
    a, b = augment.linear(x).chunk(2, 1)
    torch.testing.assert_close(torch.cat(augment(x), 1), a * b.sigmoid())


def test_initialisation_is_orthogonal():
    network = gated_up(8, 2)
    orthogonal_(network)
    rows = network[0].weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4))
    norm = gated_up(8, 500)[1]
    orthogonal_(norm)
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.003)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not norm.bias.any()


def test_discriminators_leak_a_fifth():
    judge = JointDiscriminator(128, 2, 5)
    slopes = {m.negative_slope for m in judge.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.2}


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="image_size is 64, 128 or 256, not 32"):
        JointDiscriminator(32, 2, 5)


def test_standardise_is_nothing_until_it_is_fitted():
    layer, x = Standardise(3), torch.randn(6, 3) * 4 + 2
    assert torch.equal(layer(x), x)
    layer.fit(x)
    torch.testing.assert_close(layer(x).mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3))
    layer.fit(torch.ones(6, 3))
    assert layer(torch.ones(1, 3)).abs().max() == 0
