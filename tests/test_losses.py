import math

import pytest
import torch
import torch.nn.functional as F

from fastxm import losses


def sines(shape, a, c):
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + c).view(shape)


def test_region_word_golden():
    regions, words = sines((3, 4, 6), 0.7, 0.3), sines((3, 5, 6), 1.3, 0.1)
    loss = losses.region_word_loss(regions, words, torch.tensor([3, 5, 2]))
    assert loss.item() == pytest.approx(4.3198884, abs=1e-5)


def test_nce_golden():
    loss = losses.nce(sines((4, 8), 0.7, 0.3), sines((4, 8), 1.3, 0.1), temperature=0.1)
    assert loss.item() == pytest.approx(3.5871803, abs=1e-6)


def test_hinge_golden():
    real, fake = torch.tensor([0.5, 1.5, -0.2]), torch.tensor([-1.2, 0.3, 0.1])
    assert losses.hinge_d(real, fake).item() == pytest.approx(1.3666667)
    assert losses.hinge_g(fake).item() == pytest.approx(0.2666667)
    assert losses.hinge_d(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_clip_loss():
    image, text = F.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=2)
    logits, target = 20 * image @ text.T, torch.arange(7)
    truth = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(losses.clip_loss(image, text, torch.tensor(20.0)), truth)


def test_nt_xent():
    x, y = torch.randn(2, 6, 5, dtype=torch.float64)
    z = F.normalize(torch.cat([x, y]), dim=1)
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    truth = F.cross_entropy(logits, torch.arange(12).roll(6))
    torch.testing.assert_close(losses.nt_xent(x, y, temperature=0.2), truth)
