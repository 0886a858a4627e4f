"""The updates of the three stages against ones written out here with the released constants."""

import copy
from itertools import pairwise

import pytest
import torch
from test_selfsup_recipes import image_recipe
from torch import nn
from torch.nn import functional as F

from fastxm.data.vocabulary import END
from fastxm.models.text_autoencoder import TextAutoencoderConfig
from fastxm.nn.mlp import mlp
from fastxm.ops.mmd import RBF
from fastxm.training import image_autoencoder, mappers
from fastxm.training.text_autoencoder import TextRecipe, TextTraining


@pytest.fixture(autouse=True)
def _double():
    # the steps of Adam and RMSprop, nearly signs, do not hang on rounding where a gradient is 0
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(player, network, optimizer, *, atol: float = 1e-9) -> None:
    """Weights, statistics, and the gradients that the optimisers remember."""
    options = {"rtol": 1e-6, "atol": atol, "check_dtype": False}
    theirs = dict(network.state_dict())
    torch.testing.assert_close(dict(player.network.state_dict()), theirs, **options)
    ours, theirs = (o.state_dict()["state"] for o in (player.optimizer, optimizer))
    torch.testing.assert_close(ours, theirs, **options)


def descend(loss, optimizer, *networks, clip: float = 5.0) -> list[float]:
    """A step, the gradient of each network clipped by itself; the norms before that."""
    parameters = [p for network in networks for p in network.parameters()]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
        p.grad = gradient
    norms = []
    for network in networks:
        gradients = [p.grad for p in network.parameters()]
        norms.append(sum(g.square().sum() for g in gradients).sqrt().item())
        for g in gradients:
            g.mul_(min(1.0, clip / norms[-1]))
    optimizer.step()
    return norms


def test_the_released_constants_of_the_maps():
    assert (mappers.CLIP, mappers.CLAMP, mappers.GANToText.losing) == (5.0, 0.01, 1.5)


# ---- image autoencoder


def bce(logits, target):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def colours(a, b):
    """Squared differences of the means and, five times, of the covariances of colours."""
    mean, covariance = zip(
        *((x.mean(2), torch.stack([torch.cov(y, correction=0) for y in x])) for x in (a, b))
    )
    return F.mse_loss(*mean) + 5 * F.mse_loss(*covariance)


def test_two_updates_of_the_image_autoencoder(folder, monkeypatch):
    read = image_autoencoder.pictures
    monkeypatch.setattr(image_autoencoder, "pictures", lambda *given: read(*given).double())
    # all gradients are longer than this clip
    ours = image_recipe(folder, monkeypatch, clip=0.02, pixel_weight=25.0)
    model, judges = copy.deepcopy(ours.model), copy.deepcopy(ours.judges)
    average = copy.deepcopy(dict(ours.model.named_parameters()))
    adams = {
        network: torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999))
        for network in (model, *judges.values())
    }
    for step, (rows, numbers) in zip(range(2), ours.batches):
        state, norms = torch.get_rng_state(), []
        ours.step((rows, numbers))
        torch.set_rng_state(state)
        whole = ours.dataset.batch(rows)
        real = [2 * F.avg_pool2d(whole, side).double() - 1 for side in (2, 1)]
        fake, mu, logvar = model(ours.features[rows].double())
        fake = [2 * x - 1 for x in fake]
        for judge, x, y in zip(judges.values(), real, fake):
            of_real, of_fake = (judge((images + 1) / 2) for images in (x, y.detach()))
            loss = torch.zeros(())
            for seen, matches, true in (
                (of_real, 1.0, 1.0),
                (of_real.roll(1, 0), 0.0, 1.0),  # wrong pictures, real all the same
                (of_fake, 0.0, 0.0),
            ):
                loss = loss + bce(judge.matched(seen, mu.detach()), matches)
                loss = loss + bce(judge.real(seen), true)
            norms += descend(loss, adams[judge], judge, clip=0.02)
        loss = 2.0 * -0.5 * (1 + logvar - mu**2 - logvar.exp()).mean()
        for judge, y in zip(judges.values(), fake):
            seen = judge((y + 1) / 2)
            loss = loss + bce(judge.matched(seen, mu), 1.0) + bce(judge.real(seen), 1.0)
        pixels = [x.flatten(2) for x in (real[0], fake[0], fake[1])]
        loss = loss + 50 * colours(pixels[1], pixels[0])
        loss = loss + 50 * colours(pixels[2], pixels[1].detach())
        loss = loss + 25 * sum(F.mse_loss(y, x) for y, x in zip(fake, real))
        norms += descend(loss, adams[model], model.encoder, model.decoder, clip=0.02)
        assert min(norms) > 0.02
        made = {"autoencoder": model}
        made |= {f"discriminator_{side}": judge for side, judge in judges.items()}
        for name, network in made.items():
            same(ours.players[name], network, adams[network], atol=1e-7)
        share = min(0.999, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            average[name] = share * average[name] + (1 - share) * p.detach()
    torch.testing.assert_close(dict(ours.ema.network.named_parameters()), average)


# ---- text autoencoder


def surprise(model, tokens, forced):
    """Of the words and the end of one caption, summed; the decoder reads truth where told to."""
    words, _ = model.encoder(model.words(tokens)[None])
    h = words[0].amax(0, keepdim=True)
    c, word, total = torch.zeros_like(h), model.start[None], torch.zeros(())
    for token, truth in zip(tokens, forced):
        h, c = model.decoder(word, (h, c))
        logits = model.output(h)
        total = total + F.cross_entropy(logits, token[None])
        word = model.words(token[None] if truth else logits.argmax(1))
    return total


@pytest.mark.parametrize("forced", [0.0, 0.5, 1.0])
def test_two_updates_of_the_text_autoencoder(folder, forced):
    model = TextAutoencoderConfig(words=6, word_width=5, code=6)
    config = TextTraining(model=model, batch_size=8, forced=forced, clip=0.1)
    ours = TextRecipe(config, str(folder), "cpu", 0, image_size=64)
    ours.build()
    ours.model.output.weight.data.mul_(9)  # so that what is said, and read, varies
    plain = copy.deepcopy(ours.model)
    adam = torch.optim.Adam(plain.parameters(), 1e-3, (0.9, 0.999))
    for rows in (next(ours.batches), next(ours.batches)):
        state = torch.get_rng_state()
        ours.step(rows)
        torch.set_rng_state(state)
        lengths = ours.lengths[rows]
        drawn = torch.rand(int(lengths.max())) if forced else torch.ones(int(lengths.max()))
        told = (drawn < forced).tolist()
        losses = [surprise(plain, ours.tokens[row, :n], told) for row, n in zip(rows, lengths)]
        assert all(ours.tokens[row, n - 1] == END for row, n in zip(rows, lengths))
        (norm,) = descend(sum(losses) / lengths.sum(), adam, plain, clip=0.1)
        assert norm > 0.1
        same(ours.players["autoencoder"], plain, adam)


# ---- maps


def leaky(*widths):
    layers = [(nn.Linear(a, b), nn.LeakyReLU(0.2)) for a, b in pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def mapper(family, direction, widths, **options):
    """One of ours, and a map written out here with its weights."""
    torch.manual_seed(0)
    ours = mappers.MAPPERS[family][direction](mlp(widths), RBF((1, 2, 4, 8, 16)), **options)
    plain = leaky(*widths)
    plain.load_state_dict(ours.network.state_dict())
    return ours, plain


def critic(ours, *widths):
    """A network written out here with the weights of the critic of ours."""
    plain = leaky(*widths)
    plain.load_state_dict(ours.players["critic"].network.state_dict())
    return plain


def source(width, seed, scale):
    """Batches of codes of this size."""
    made = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(8, width, generator=made) * scale


@pytest.fixture
def clip(monkeypatch):
    """A bound that the gradients of these small networks are longer than."""
    monkeypatch.setattr(mappers, "CLIP", 0.01)
    return 0.01


@pytest.mark.parametrize("losing", [True, False])
def test_updates_of_the_gan_to_text(clip, losing):
    ours, plain = mapper("gan", "image_to_text", (6, 5, 5, 4))
    if losing:  # the map's losses are about 3, else about 0.7
        ours.players["critic"].network[-1].bias.data.fill_(-3.0)
    judge = critic(ours, 4, 400, 200, 200, 200, 1)
    adams = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in (plain, judge)]
    sources = [(source(4, 1, 1.0), source(6, 2, 1.0)) for _ in range(2)]
    real, codes = sources[1]
    norms, updates = ([], []), 0
    for count in range(1, 13):
        if count % 3:
            x, y = real(), plain(codes())
            loss = bce(judge(x), 1.0) + bce(judge(y.detach()), 0.0)
            norms[1].extend(descend(loss, adams[1], judge, clip=clip))
        else:
            y = plain(codes())
        loss = bce(judge(y), 1.0)
        if count % 3 == 0 or loss > 1.5:
            norms[0].extend(descend(loss, adams[0], plain, clip=clip))
            updates += 1
    for _ in range(4):
        ours.step(*sources[0])
    assert ours.updates == updates == (12 if losing else 4)
    assert min(norms[0] + norms[1]) > clip
    same(ours.players["mapper"], plain, adams[0], atol=1e-7)
    same(ours.players["critic"], judge, adams[1], atol=1e-7)


def test_updates_of_the_wgan_to_images(clip):
    ours, plain = mapper("gan", "text_to_image", (4, 5, 5, 6))
    judge = critic(ours, 6, 512, 256, 256, 1)
    props = [torch.optim.RMSprop(n.parameters(), 5e-5) for n in (plain, judge)]
    sources = [(source(6, 1, 30.0), source(4, 2, 1e5)) for _ in range(2)]
    real, codes = sources[1]
    norms = [], []
    for count in range(1, 11):
        if count % 5:
            x, y = real(), plain(codes()).detach()
            norms[1].extend(descend(judge(y).mean() - judge(x).mean(), props[1], judge, clip=clip))
            for p in judge.parameters():
                p.data.clamp_(-0.01, 0.01)
        else:
            norms[0].extend(descend(-judge(plain(codes())).mean(), props[0], plain, clip=clip))
    for _ in range(2):
        ours.step(*sources[0])
    assert min(norms[0] + norms[1]) > clip
    same(ours.players["mapper"], plain, props[0])
    same(ours.players["critic"], judge, props[1])


def mmd(x, y):
    """The root of the biased squared MMD of the five Gaussians."""

    def mean_k(a, b):
        d2 = (a[:, None] - b[None]).square().sum(2)
        return sum((-d2 / (2 * s**2)).exp() for s in (1, 2, 4, 8, 16)).mean()

    squared = mean_k(x, x) + mean_k(y, y) - 2 * mean_k(x, y)
    return (F.relu(squared) + 1e-8).sqrt()


def objective(x, y):
    return mmd(x, y) - 16 * F.relu(y.mean(0) - x.mean(0)).mean()


@pytest.mark.parametrize(
    ("direction", "widths", "lr", "weight"),
    [("image_to_text", (6, 5, 5, 4), 2e-4, 2.0), ("text_to_image", (4, 5, 5, 6), 2e-5, 8.0)],
)
def test_updates_of_mmd_gan(clip, direction, widths, lr, weight):
    few = mappers.MMDGANConfig(width=7, steps=(3, 2))
    ours, plain = mapper("mmd_gan", direction, widths, mmd_gan=few)
    given, target = widths[0], widths[-1]
    both = nn.ModuleDict(
        {"encoder": leaky(target, 7, 7, given), "decoder": leaky(given, 7, 7, target)}
    )
    both.load_state_dict(ours.players["critic"].network.state_dict())
    f, g = both["encoder"], both["decoder"]
    adams = [torch.optim.Adam(n.parameters(), lr, (0.5, 0.999)) for n in (plain, both)]
    sources = [(source(target, 1, 1e3), source(given, 2, 3e5)) for _ in range(2)]
    real, codes = sources[1]
    norms = [], []
    ours.updates = 23
    for steps in (3, 3, 2):  # the 24th and 25th updates, and the 26th
        for _ in range(steps):
            for p in f.parameters():
                p.data.clamp_(-0.01, 0.01)
            x, y = real(), plain(codes()).detach()
            lost = F.mse_loss(g(f(x)), x) + F.mse_loss(g(f(y)), y)
            loss = weight * lost - objective(f(x), f(y))
            norms[1].extend(descend(loss, adams[1], both, clip=clip))
        loss = objective(f(real()), f(plain(codes())))
        norms[0].extend(descend(loss, adams[0], plain, clip=clip))
    for _ in range(3):
        ours.step(*sources[0])
    assert min(norms[0] + norms[1]) > clip
    same(ours.players["mapper"], plain, adams[0], atol=1e-7)
    same(ours.players["critic"], both, adams[1], atol=1e-7)


def test_updates_of_plain_mmd(clip):
    ours, plain = mapper("mmd", "image_to_text", (6, 5, 5, 4))
    adam = torch.optim.Adam(plain.parameters(), 2e-4, (0.5, 0.999))
    sources = [(source(4, 1, 1.0), source(6, 2, 3.0)) for _ in range(2)]
    real, codes = sources[1]
    norms = []
    for _ in range(3):
        norms += descend(mmd(real(), plain(codes())), adam, plain, clip=clip)
        ours.step(*sources[0])
    same(ours.players["mapper"], plain, adam, atol=1e-7)


def test_maps_begin_as_released():
    wide = (300, 200, 300)
    for family, direction in (("gan", "image_to_text"), ("gan", "text_to_image")):
        ours, _ = mapper(family, direction, wide)
        for player in ours.players.values():
            for layer in player.network[::2]:
                product = layer.weight @ layer.weight.T
                if len(product) > layer.in_features:
                    product = layer.weight.T @ layer.weight
                torch.testing.assert_close(product, torch.eye(len(product)))
                assert not layer.bias.any()
    for family in ("mmd", "mmd_gan"):
        ours, _ = mapper(family, "image_to_text", wide)
        for player in ours.players.values():
            for layer in player.network.modules():
                if isinstance(layer, nn.Linear):
                    assert layer.weight.std().item() == pytest.approx(0.1, rel=0.02)
                    assert not layer.bias.any()
