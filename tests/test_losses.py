import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse, peak_bytes
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


def pairs(device):
    wide = {"dtype": torch.float64, "device": device}
    image, text = F.normalize(torch.randn(2, 7, 5, **wide), dim=2)
    return image, text, *torch.tensor([20.0, -3.0], **wide)  # scale, bias


def plain_clip(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_siglip(image, text, scale, bias):
    signs = 2 * torch.eye(len(image), device=image.device) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def plain_nt_xent(x, y):
    z = F.normalize(torch.cat([x, y]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(x)))


def test_clip_loss(device):
    given = pairs(device)
    truth = derivatives(plain_clip, *given)
    torch.testing.assert_close(derivatives(losses.ClipLoss(), *given), truth)
    torch.testing.assert_close(losses.clip_loss(*given[:3]), truth[0])


def two_products(image, text, scale, bias):
    """open_clip's ClipLoss on one rank, rewritten: a product for each direction."""
    target = torch.arange(len(image), device=image.device)
    of_images = scale * image @ text.T + bias
    of_texts = scale * text @ image.T + bias
    return (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2


@pytest.fixture(scope="module")
def open_clip():
    """The package's loss module, which needs torch alone; the package also needs torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    path = Path(package.origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def learned(loss):
    """A loss of features before their normalisation and of the scale's logarithm, as trained."""

    def f(image, text, log_scale):
        return loss(F.normalize(image, dim=1), F.normalize(text, dim=1), log_scale.exp())

    return f


CLIP_SHAPES = [(1, 3), (7, 5), (65, 33), (200, 64)]  # B, D


def features(batch, width, device="cpu"):
    wide = {"dtype": torch.float64, "device": device}
    return *torch.randn(2, batch, width, **wide), torch.tensor(math.log(1 / 0.07), **wide)


@pytest.mark.parametrize("shape", CLIP_SHAPES, ids=str)
def test_clip_loss_is_open_clips_mathematics(shape, device):
    given = features(*shape, device)
    plain = learned(lambda image, text, scale: two_products(image, text, scale, 0.0))
    truth = derivatives(plain, *given)
    torch.testing.assert_close(derivatives(learned(losses.ClipLoss()), *given), truth)
    single = [t.float() for t in given]
    no_worse(gradient(learned(losses.ClipLoss())), gradient(plain), *single)


@pytest.mark.parametrize("shape", CLIP_SHAPES, ids=str)
def test_clip_loss_is_open_clips(shape, open_clip):
    given = features(*shape)
    truth = derivatives(learned(open_clip.ClipLoss()), *given)
    torch.testing.assert_close(derivatives(learned(losses.ClipLoss()), *given), truth)
    theirs = open_clip.ClipLoss()(*given[:2], 2.0, output_dict=True)
    ours = losses.ClipLoss()(*given[:2], 2.0, output_dict=True)
    torch.testing.assert_close(ours, theirs)


def test_siglip_loss(device):
    given = pairs(device)
    truth = derivatives(plain_siglip, *given)
    torch.testing.assert_close(derivatives(losses.SigLipLoss(), *given), truth)
    torch.testing.assert_close(losses.siglip_loss(*given), truth[0])


def test_nt_xent(device):
    views = torch.randn(2, 6, 5, dtype=torch.float64, device=device)
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
    given = pairs("cpu")
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


def test_logistic_losses_are_binary_cross_entropy():
    logits = torch.randn(7, dtype=torch.float64) * 5
    p = logits.sigmoid()
    close = partial(torch.testing.assert_close, check_dtype=False)
    close(losses.bce(logits, True), -p.log().mean(), rtol=1e-5, atol=0)
    close(losses.bce(logits, False), -(1 - p).log().mean(), rtol=1e-5, atol=0)
    assert losses.bce(torch.tensor([200.0]), False) == 200


def test_kl_of_gaussians_is_that_of_their_densities():
    mean, log_variance = torch.randn(2, 3), torch.randn(2, 3)
    made = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(made, torch.distributions.Normal(0, 1)).mean()
    torch.testing.assert_close(losses.kl_normal(mean, log_variance), expected)


def test_colour_consistency_is_of_means_and_covariances():
    a, b = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 2, 2)
    expected = torch.zeros(())
    for x, y in zip(a, b):
        mx, my = x.flatten(1).mean(1), y.flatten(1).mean(1)
        cx, cy = (torch.cov(t.flatten(1), correction=0) for t in (x, y))
        expected = expected + ((mx - my) ** 2).mean() / 2 + 5 * ((cx - cy) ** 2).mean() / 2
    torch.testing.assert_close(losses.colour_consistency(a, b), expected)
    order = torch.randperm(20)
    shuffled = a.flatten(2)[:, :, order].view_as(a)
    torch.testing.assert_close(losses.colour_consistency(shuffled, b), expected)


def mmd_gan_by_hand(fx, fy, sigmas=(1, 2, 4, 8, 16), weight=16.0, eps=1e-8):
    """The objective from its definition in float64, pair by pair."""

    def k(a, b):
        return sum(math.exp(-((a - b) ** 2).sum().item() / (2 * s * s)) for s in sigmas)

    fx, fy = fx.double(), fy.double()
    mmd = sum(k(a, b) for a in fx for b in fx) / len(fx) ** 2
    mmd += sum(k(a, b) for a in fy for b in fy) / len(fy) ** 2
    mmd -= 2 * sum(k(a, b) for a in fx for b in fy) / (len(fx) * len(fy))
    gaps = [(fx[:, j].mean() - fy[:, j].mean()).item() for j in range(fx.shape[1])]
    h = -sum(max(0.0, -gap) for gap in gaps) / len(gaps)
    return math.sqrt(max(mmd, 0.0) + eps) + weight * h


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.7])
def test_the_mmd_gan_objective_is_its_formula(shift):
    fx, fy = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64) + shift
    expected = mmd_gan_by_hand(fx, fy)
    assert losses.mmd_gan_g(fx, fy).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert losses.mmd_gan_g(fx.float(), fy.float()).item() == pytest.approx(expected, rel=1e-5)


def test_the_mmd_gan_objective_s_gradient():
    fx, fy = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    assert torch.autograd.gradcheck(losses.mmd_gan_g, (fx, fy))
    same = fx.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.mmd_gan_g(same, fx.detach()), same)
    assert gradient.isfinite().all()  # where the bare root's is not


# of the released LAFITE, which adds log(temperature): C = log(temperature) - loss
@pytest.mark.parametrize(
    ("sharpened", "text_share", "expected"),
    [
        (True, 0.0, -1.9366862),
        (True, 1.0, -2.0302968),
        (False, 0.0, -1.9265106),
        (False, 1.0, -2.0351261),
        (False, 0.25, -0.75 * 1.9265106 - 0.25 * 2.0351261),
    ],
)
def test_golden_pseudo_text_loss(sharpened, text_share, expected):
    i = torch.arange(32, dtype=torch.float64)
    images = torch.sin(0.7 * i + 0.3).float().view(4, 8)
    text = torch.sin(1.3 * i + 0.1).float().view(4, 8)
    options = {"temperature": 0.5, "text_share": text_share, "sharpened": sharpened}
    found = math.log(0.5) - losses.pseudo_text_loss(images, text, **options)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_pseudo_text_loss_refuses_a_share_beyond_one():
    with pytest.raises(ValueError, match="text_share"):
        losses.pseudo_text_loss(torch.randn(2, 3), torch.randn(2, 3), text_share=1.5)


def test_logistic_losses():
    real, fake = torch.randn(7).double(), torch.randn(5).double()
    expected = -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()
    torch.testing.assert_close(losses.logistic_d(real, fake), expected.float())
    torch.testing.assert_close(losses.logistic_g(fake), -fake.sigmoid().log().mean().float())


def test_r1_of_a_linear_judge():
    weight, images = torch.randn(3, 4, 4), torch.randn(5, 3, 4, 4, requires_grad=True)
    logits = (images * weight).sum((1, 2, 3))
    torch.testing.assert_close(losses.r1(logits, images), weight.square().sum() / 2)


def test_path_lengths_of_a_linear_generator():
    matrix = torch.randn(6, 3 * 4 * 4)
    ws, noise = torch.randn(2, 2, 6, requires_grad=True), torch.randn(2, 3, 4, 4)
    images = (ws.sum(1) @ matrix).view(2, 3, 4, 4)
    # every row of w moves the picture by the matrix
    expected = (noise.flatten(1) @ matrix.T / 4).norm(dim=1)
    torch.testing.assert_close(losses.path_lengths(images, ws, noise), expected)


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
