import math

import pytest
import torch
import torch.nn.functional as F
from check import peak_bytes
from torch import nn

from fastxm import losses
from fastxm.losses import MMDLoss, mmd_gan_d, mmd_gan_g, mmd_loss
from fastxm.ops.mmd import RBF


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


def derivatives(f, *inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = f(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def pairs():
    image, text = F.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=2)
    return image, text, *torch.tensor([20.0, -3.0], dtype=torch.float64)  # scale, bias


def plain_clip(image, text, scale, bias):
    logits, target = scale * image @ text.T + bias, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_siglip(image, text, scale, bias):
    signs = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def plain_nt_xent(x, y):
    z = F.normalize(torch.cat([x, y]), dim=1)
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))


def test_clip_loss():
    given = pairs()
    truth = derivatives(plain_clip, *given)
    torch.testing.assert_close(derivatives(losses.ClipLoss(), *given), truth)
    torch.testing.assert_close(losses.clip_loss(*given[:3]), truth[0])


def test_siglip_loss():
    given = pairs()
    truth = derivatives(plain_siglip, *given)
    torch.testing.assert_close(derivatives(losses.SigLipLoss(), *given), truth)
    torch.testing.assert_close(losses.siglip_loss(*given), truth[0])


def test_nt_xent():
    views = torch.randn(2, 6, 5, dtype=torch.float64)
    truth = derivatives(plain_nt_xent, *views)
    torch.testing.assert_close(derivatives(losses.NTXentLoss(0.2), *views), truth)


def attngan_words(regions, words, lengths):
    """Scores [B, B] text by text, logits of the word loss (AttnGAN, eqs. 7 to 10)."""
    rows = []
    for text, length in zip(words, lengths):
        s = torch.einsum("brd,td->brt", regions, text[:length])
        attention = (4 * s.softmax(2)).softmax(1)
        context = torch.einsum("brt,brd->btd", attention, regions)
        similarity = F.cosine_similarity(context, text[:length].expand_as(context), dim=2)
        rows.append((5 * similarity).exp().sum(1).log())
    return 10 * torch.stack(rows)


def test_damsm_loss():
    random = [torch.randn(5, n, 6, dtype=torch.float64) for n in (7, 4)]
    image, sentence = torch.randn(2, 5, 3, dtype=torch.float64)
    lengths, classes = torch.tensor([4, 1, 3, 2, 4]), torch.tensor([0, 1, 0, 2, 0])
    target = torch.arange(5)
    for labels in (None, classes):
        same = torch.zeros(5, 5, dtype=torch.bool)
        if labels is not None:
            same = (labels == labels[:, None]) & ~torch.eye(5, dtype=torch.bool)

        def plain(regions, words, image, sentence, same=same):
            cosines = F.cosine_similarity(image[:, None], sentence, dim=2)
            pairs = (attngan_words(regions, words, lengths), 10 * cosines)
            logits = [s.masked_fill(same, -torch.inf) for s in pairs]
            return sum(F.cross_entropy(s, target) + F.cross_entropy(s.T, target) for s in logits)

        def ours(regions, words, image, sentence, labels=labels):
            given = regions, words, lengths, image, sentence
            return sum(losses.damsm_loss(*given, labels=labels))

        truth = derivatives(plain, *random, image, sentence)
        torch.testing.assert_close(derivatives(ours, *random, image, sentence), truth)


def test_drop_in_options():
    given = pairs()
    for module in (losses.ClipLoss, losses.SigLipLoss):
        result = module(cache_labels=True, rank=0, world_size=1)(*given, output_dict=True)
        assert list(result) == ["contrastive_loss"]
        assert result["contrastive_loss"] == module()(*given)
        with pytest.raises(ValueError, match="process group of 2 ranks"):
            module(world_size=2)(*given)
    with pytest.raises(ValueError, match="Horovod"):
        losses.ClipLoss(use_horovod=True)


def tower(width=6):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 5))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y):
        return losses.clip_loss(x, y, self.scale.exp())


def direct_step(encoders, batches, loss, chunk_size, backward=torch.Tensor.backward):
    """What cached_step is to give, with the activations of all chunks."""
    embeddings = [
        torch.cat([encoder(chunk) for chunk in batch.split(chunk_size)])
        for encoder, batch in zip(encoders, batches)
    ]
    value = loss(*embeddings)
    backward(value)
    return value.detach()


def outcome(step, encoders, batches, loss, *rest, **options):
    """Loss, gradients, and the random numbers that come next."""
    modules = nn.ModuleList([loss, *encoders])
    modules.zero_grad()
    torch.manual_seed(3)
    value = step(encoders, batches, loss, *rest, **options)
    return [value, torch.rand(3), *(p.grad.clone() for p in modules.parameters())]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk_size", [4, 11, 20])
def test_cached_step(chunk_size, shared):
    first = tower().double()
    encoders = [first, first if shared else tower().double()]
    given = encoders, torch.randn(2, 11, 6, dtype=torch.float64), Scaled().double(), chunk_size
    direct, cached = (outcome(step, *given) for step in (direct_step, losses.cached_step))
    torch.testing.assert_close(cached, direct)
    scaled = outcome(losses.cached_step, *given, backward=lambda loss: (8 * loss).backward())
    torch.testing.assert_close(scaled[2:], [8 * gradient for gradient in direct[2:]])


def test_cached_step_under_autocast():
    given = [tower(), tower()], torch.randn(2, 11, 6), Scaled(), 11
    with torch.autocast("cpu", torch.bfloat16):
        direct, cached = (outcome(step, *given) for step in (direct_step, losses.cached_step))
    torch.testing.assert_close(cached, direct)


def test_cached_step_arguments():
    class Sum(nn.Linear):
        def forward(self, x, more):
            return super().forward(x + (torch.stack(more) if isinstance(more, list) else more))

    encoders, loss = [Sum(6, 5), Sum(6, 5)], Scaled()
    x, y, more = torch.randn(3, 11, 6)
    batches = [{"more": more, "x": x}, (y, list(more))]
    cached = outcome(losses.cached_step, encoders, batches, loss, 4)
    plain = [nn.Linear(6, 5), nn.Linear(6, 5)]
    for ours, theirs in zip(plain, encoders):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(cached, outcome(direct_step, plain, [x + more, y + more], loss, 4))
    with pytest.raises(ValueError, match="as many rows"):
        losses.cached_step(encoders, [(x, y[:3]), (x, y)], loss, 4)
    with pytest.raises(ValueError, match="an encoder for each batch"):
        losses.cached_step(encoders, batches[:1], loss, 4)
    with pytest.raises(TypeError, match="not of str"):
        losses.cached_step(encoders, [(x, "more"), (x, y)], loss, 4)


def test_cached_step_leaves_a_frozen_encoder_alone():
    frozen, given = tower().requires_grad_(False), torch.randn(2, 11, 6)
    learns = tower()
    direct, cached = (step([learns, frozen], given, losses.nce, 4)
                      for step in (direct_step, losses.cached_step))  # fmt: skip
    assert direct.isfinite()
    assert cached.isfinite()
    assert all(p.grad is not None for p in learns.parameters())
    assert all(p.grad is None for p in frozen.parameters())


def test_cached_step_holds_one_chunk():
    encoder = nn.Sequential(nn.Linear(8, 8192), nn.Tanh(), nn.Linear(8192, 4))
    given = [encoder, encoder], torch.randn(2, 512, 8), losses.nce, 32
    direct, cached = (peak_bytes(lambda step=step: step(*given))
                      for step in (direct_step, losses.cached_step))  # fmt: skip
    assert cached < direct / 8


def test_mmd_gan_objective():
    # written out as in Li et al. 2017: means of the kernel over all pairs, five bandwidths
    real, fake = torch.randn(9, 4).double(), torch.randn(7, 4).double() + 0.3

    def kernel(a, b):
        d2 = (a[:, None] - b).square().sum(-1)
        return sum(torch.exp(-d2 / (2 * s**2)) for s in (1, 2, 4, 8, 16)).mean()

    squared = kernel(real, real) + kernel(fake, fake) - 2 * kernel(real, fake)
    apart = real.mean(0) - fake.mean(0)
    objective = (squared.clamp(min=0) + 1e-8).sqrt() - 16 * (-apart).clamp(min=0).mean()
    torch.testing.assert_close(mmd_gan_g(real, fake), objective)
    x, decoded = torch.randn(2, 9, 6).double()
    y, again = torch.randn(2, 7, 6).double()
    lost = (decoded - x).square().mean() + (again - y).square().mean()
    found = mmd_gan_d(real, fake, ((decoded, x), (again, y)), reconstruction_weight=2.0)
    torch.testing.assert_close(found, 2 * lost - objective)
    # equal samples: the gradient of the root is finite
    same = real.clone().requires_grad_()
    mmd_gan_g(same, real).backward()
    assert same.grad.isfinite().all()


def test_mmd_loss_as_a_module():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    options = {"estimator": "unbiased", "root": True, "eps": 1e-6}
    assert torch.equal(MMDLoss(RBF(2.0), **options)(x, y), mmd_loss(x, y, RBF(2.0), **options))
