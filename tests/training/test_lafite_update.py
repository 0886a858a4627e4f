"""LAFITE's update, and that of VDL's posterior, against ones written out here, in float64."""

import copy

import pytest
import torch
from small_joint import built, lafite, prepare, vdl
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("cache", "double")


@pytest.fixture
def double(monkeypatch):
    prepare(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def contrast(images, text):
    """C: the surprise at a text's picture, among all of the batch."""
    cosines = F.normalize(images, dim=1) @ F.normalize(text, dim=1).T
    return -(cosines / 0.5).log_softmax(0).diagonal().mean()


def noise(count):
    """Directions [count, 6]."""
    return F.normalize(torch.randn(count, 7)[:, :6], dim=1)


def ws(generator, count):
    """Rows of w, with probability 0.9 of two noises."""
    rows, mixed = generator.num_ws, torch.rand(()) < 0.9
    cut = int(torch.randint(1, rows, ())) if mixed else rows
    several = [generator.mapping(torch.randn(count, 4)) for _ in range(2 if mixed else 1)]
    return torch.stack([several[i >= cut] for i in range(rows)], 1)


def see(recipe, images):
    """The encoder on a square of side from 8 to 16 of the pictures."""
    side, top, left = torch.rand(3).tolist()
    side = round(8 + 8 * side)
    top, left = (int(u * (17 - side)) for u in (top, left))
    square = images[..., top : top + side, left : left + side]
    return recipe.encoder.embed_images((square + 1) / 2)


def same(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()))


def test_lafite_s_update(data, clip):
    weights = {"picture_weight": 3.0, "feature_weight": 2.0}
    every = {"batch_size": 8, "label_fraction": 0.5, "r1_every": 16, "path_every": 4}
    recipe, batch = built(lafite(data, clip, **every, **weights))
    assert 0 < batch["labelled"].sum() < 8
    expected, average = copy.deepcopy(recipe.model), copy.deepcopy(recipe.ema.network)
    g, d, z, real = expected.generator, expected.discriminator, batch["embedding"], batch["image"]
    adam = torch.optim.Adam
    adam_g = adam(g.parameters(), 0.0025 * 4 / 5, (0.0, 0.99 ** (4 / 5)), 1e-8)
    adam_d = adam(d.parameters(), 0.0025 * 16 / 17, (0.0, 0.99 ** (16 / 17)), 1e-8)

    state = torch.get_rng_state()
    metrics = recipe.step(batch)
    torch.set_rng_state(state)

    def text(n=8):
        e = noise(n)
        caption, pseudo = 0.9 * batch["text"][:n] + 0.1 * e, z[:n] + 3 * e
        return F.normalize(torch.where(batch["labelled"][:n, None], caption, pseudo), dim=1)

    def update(adam, loss):
        adam.zero_grad()
        loss.backward(inputs=adam.param_groups[0]["params"])
        adam.step()

    h = text()
    fake = g.synthesis(ws(g, 8), h)
    judged, seen = d(fake, h), see(recipe, fake)
    loss = F.softplus(-judged.logits).mean() + 10 * contrast(seen, h) + 3 * contrast(seen, z)
    loss = loss + 10 * contrast(judged.semantic, h)
    loss = loss + 2 * contrast(d(real, h).semantic.detach(), judged.semantic)
    torch.testing.assert_close(metrics["loss_g"], loss.detach())
    update(adam_g, loss)

    h = text(4)
    w = ws(g, 4)
    images = g.synthesis(w, h)
    along = (images * torch.randn_like(images)).sum() / 16
    (slope,) = torch.autograd.grad(along, w, create_graph=True)
    lengths = slope.square().sum(2).mean(1).sqrt()
    mean = 0.01 * lengths.mean().detach()
    torch.testing.assert_close(recipe.path_mean, mean)
    update(adam_g, 2 * 4 * (lengths - mean).square().mean())

    h = text()
    fake = g.synthesis(ws(g, 8), h).detach()
    of_fake, of_real = d(fake, h), d(real, h)
    loss = F.softplus(of_fake.logits).mean() + F.softplus(-of_real.logits).mean()
    update(adam_d, loss + 10 * contrast(of_real.semantic, h))

    h, x = text(), real.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d(x, h).logits.sum(), x, create_graph=True)
    update(adam_d, 10 / 2 * 16 * slope.square().sum((1, 2, 3)).mean())

    same(recipe.model.generator, g)
    same(recipe.model.discriminator, d)
    decay = 0.5 ** (8 / (0.05 * 8))  # a twentieth of what was seen
    for mine, old, new in zip(
        recipe.ema.network.parameters(), average.parameters(), g.parameters()
    ):
        torch.testing.assert_close(mine, decay * old + (1 - decay) * new)


def test_the_posterior_s_updates(data, clip):
    steps = {"adversarial_steps": 0, "posterior_steps": 10}
    recipe, batch = built(vdl(data, clip, **steps))
    heads = recipe.model.posterior_heads
    for last in (heads.shift[-1], heads.log_scale[-1]):  # away from p, whose KL has no slope
        torch.nn.init.normal_(last.weight, std=0.5)
    expected, z = copy.deepcopy(heads), batch["embedding"]
    adam, g = torch.optim.Adam(expected.parameters()), recipe.model.generator
    for done in range(4):
        state = torch.get_rng_state()
        metrics = recipe.step(batch)
        torch.set_rng_state(state)

        shift, log_scale = expected(torch.cat([z, batch["evidence"]], 1))
        scale = log_scale.exp()
        t = F.normalize(z + shift + 3 * scale * noise(4), dim=1)
        fake = g.synthesis(ws(g, 4), t)
        seen = see(recipe, fake)
        variance = 9 / 6  # of p, of each number
        kl = (scale.square() - 1 + shift.square() / variance - 2 * log_scale).sum(1) / 2
        beta = 0.1 * min(1, done / 10 / 0.2)
        loss = (1 - (seen * z).sum(1)).mean() + contrast(seen, t) + beta * kl.mean() / 6
        torch.testing.assert_close(metrics["loss_q"], loss.detach())
        adam.param_groups[0]["lr"] = 1e-3 * 0.1 ** (done / 10)
        adam.zero_grad()
        loss.backward(inputs=list(expected.parameters()))
        adam.step()
        same(heads, expected)
