"""The three stages: their losses against ones written out here, their schedules, their freedom from
pairs, and a whole training killed between."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastxm import losses
from fastxm.data import open_dataset
from fastxm.data.subsets import captions_alone
from fastxm.models.codes import kernel_of
from fastxm.models.selfsup import CodeMap
from fastxm.nn.mlp import mlp
from fastxm.nn.stackgan import JointDiscriminator
from fastxm.ops import mmd2
from fastxm.ops.mmd import DEFAULT
from fastxm.training import image_autoencoder, mappers, mapping, precision
from fastxm.training.draws import Draws


class Colours(nn.Module):
    """An image encoder without weights: 2 x 2 means of the three colours, 12 wide."""

    name, width = "colours", 12

    def embed(self, images):
        return F.adaptive_avg_pool2d(images, 2).flatten(1)


def image_recipe(folder, monkeypatch, **fields) -> image_autoencoder.ImageRecipe:
    monkeypatch.setattr(image_autoencoder, "image_encoder", lambda *_, **__: Colours())
    model = image_autoencoder.ImageAutoencoderConfig(
        image_size=fields.pop("image_size", 128), features=12, hidden=6, code=4, z_dim=3, gf=4
    )
    made = {"df": 2, "batch_size": 4, "precision": "fp32", **fields}
    config = image_autoencoder.ImageTraining(model=model, **made)
    recipe = image_autoencoder.ImageRecipe(config, str(folder), "cpu", 0, samples=4)
    recipe.build()
    return recipe


def bce(logits, real):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def test_a_discriminator_s_loss():
    torch.manual_seed(0)
    judge = JointDiscriminator(64, 2, 4)
    real, fake, mu = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64), torch.randn(3, 4)
    wrong = real[[2, 0, 1]]
    x, x2, y = judge(real), judge(wrong), judge(fake)
    expected = bce(judge.matched(x, mu), 1) + bce(judge.real(x), 1)
    expected += bce(judge.matched(x2, mu), 0) + bce(judge.real(x2), 1)
    expected += bce(judge.matched(y, mu), 0) + bce(judge.real(y), 0)
    ours = image_autoencoder.discriminator_loss(judge, real, fake, mu)
    torch.testing.assert_close(ours, expected)


def test_the_autoencoder_s_loss(folder, monkeypatch):
    ours = image_recipe(folder, monkeypatch, pixel_weight=25.0, kl_weight=2.0, colour_weight=50.0)
    rows, _ = next(iter(ours.batches))
    real = ours.pyramid(ours.dataset.batch(rows))
    assert [x.shape[-1] for x in real] == [64, 128]
    fake, mu, logvar = ours.model(ours.features[rows])
    total, parts = ours.loss(real, fake, mu, logvar)
    expected = -0.5 * (1 + logvar - mu**2 - logvar.exp()).mean() * 2.0
    for size, drawn in zip((64, 128), fake):
        judge = ours.judges[size]
        seen = judge(drawn)
        expected = expected + bce(judge.matched(seen, mu), 1) + bce(judge.real(seen), 1)
    for a, b in ((fake[0], real[0]), (fake[1], fake[0])):
        expected = expected + 50 * losses.colour_consistency(2 * a - 1, 2 * b - 1)
    for a, b in zip(fake, real):
        expected = expected + 25 * ((2 * a - 1) - (2 * b - 1)).square().mean()
    torch.testing.assert_close(total, expected)
    assert set(parts) == {"kl", "g_gan", "colour", "pixel"}


def test_an_image_step_updates_all_players_and_the_average(folder, monkeypatch):
    ours = image_recipe(folder, monkeypatch)
    assert set(ours.players) == {"autoencoder", "discriminator_64", "discriminator_128"}
    before = {name: copy.deepcopy(p.network.state_dict()) for name, p in ours.players.items()}
    metrics = ours.step(next(iter(ours.batches)))
    assert all(value.isfinite() for value in metrics.values())
    for name, player in ours.players.items():
        assert any(
            not torch.equal(value, before[name][key])
            for key, value in player.network.state_dict().items()
        ), name
    assert ours.ema.updates == 1
    shown = ours.sample()
    assert len(shown.images) == len(shown.captions) == 2 * len(ours.shown[2])
    assert torch.equal(shown.images[0], ours.shown[0][0])


def test_codes_are_drawn_in_float32(folder, monkeypatch):
    ours = image_recipe(folder, monkeypatch, precision="bf16")
    with precision.autocast("bf16", ours.device):
        _, mean, log_variance = ours.model(ours.features[:3])
    assert mean.dtype == log_variance.dtype == torch.float32


def test_the_mean_that_discriminators_are_given_does_not_learn_from_them(folder, monkeypatch):
    ours = image_recipe(folder, monkeypatch)
    rows, _ = next(iter(ours.batches))
    fake, mean, _ = ours.model(ours.features[rows])
    ours.update_judges(ours.pyramid(ours.dataset.batch(rows)), fake, mean)
    assert all(p.grad is None for p in ours.model.parameters())


def test_without_judgement_there_are_no_discriminators(folder, monkeypatch):
    options = {"adversarial_weight": 0.0, "colour_weight": 0.0, "kl_weight": 0.01, "clip": 1e3}
    ours = image_recipe(folder, monkeypatch, image_size=64, pixel_weight=25.0, lr=1e-2, **options)
    assert set(ours.players) == {"autoencoder"}
    errors = [ours.step(batch)["pixel"] for _, batch in zip(range(60), ours.batches)]
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])


@pytest.mark.parametrize("field", ["df", "batch_size", "lr", "clip", "kl_weight", "pixel_weight"])
def test_image_training_refuses(field):
    with pytest.raises(ValueError, match=field):
        image_autoencoder.ImageTraining(**{field: -1})


# ---- maps


def codes(count: int = 40) -> mapping.Codes:
    torch.manual_seed(5)
    weights = np.ones(count)
    return mapping.Codes(
        torch.randn(count, 6), torch.randn(count, 6) - 3, torch.randn(count, 4), weights, weights
    )


def rows(*shape):
    """A source of the same codes again and again."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(7)) + 0.3


def test_the_critic_s_objective_is_its_formula():
    torch.manual_seed(0)
    ours = mappers.MMDGANToImage(mlp((4, 5, 5, 6)), DEFAULT)
    x, y = torch.randn(3, 6), torch.randn(5, 6)
    f, g = ours.players["critic"].network.children()
    fx, fy = f(x), f(y)

    def mean_k(a, b):
        d2 = (a[:, None] - b[None]).double().square().sum(2)
        return sum((-d2 / (2 * s**2)).exp() for s in (1, 2, 4, 8, 16)).mean()

    m2 = mean_k(fx, fx) + mean_k(fy, fy) - 2 * mean_k(fx, fy)
    h = -F.relu(-(fx.mean(0) - fy.mean(0))).mean()
    errors = (g(fx) - x).square().mean() + (g(fy) - y).square().mean()
    expected = -(m2.sqrt() + 16 * h - 8.0 * errors)
    torch.testing.assert_close(ours.critic_loss(x, y).double(), expected, rtol=1e-5, atol=1e-5)
    assert mappers.MMDGANToText.autoencoder_weight == 2.0


def test_the_critic_s_schedule_and_clamp(monkeypatch):
    torch.manual_seed(0)
    ours = mappers.MMDGANToText(mlp((6, 5, 5, 4)), DEFAULT)
    done = []
    monkeypatch.setattr(ours, "update", lambda name, loss: done.append(name) or loss.detach())
    planned = []
    for ours.updates in (0, 24, 25, 499, 500, 501):
        planned.append(ours.critic_steps)
    assert planned == [100, 100, 5, 5, 100, 5]
    ours.mmd_gan = mappers.MMDGANConfig(steps=(20, 5))
    assert ours.critic_steps == 5
    ours.step(rows(8, 4), rows(8, 6))
    assert done == ["critic"] * 5 + ["mapper"]
    assert ours.updates == 502
    encoder, decoder = ours.players["critic"].network.children()
    assert max(p.abs().max() for p in encoder.parameters()) <= 0.01
    assert max(p.abs().max() for p in decoder.parameters()) > 0.01


def test_a_spectral_critic_is_flat_and_has_no_one_sided_term():
    torch.manual_seed(0)
    config = mappers.MMDGANConfig("spectral", width=7, steps=(9, 9), rank_weight=0.0, lr=1e-3)
    ours = mappers.MMDGANToImage(mlp((4, 5, 5, 6)), DEFAULT, 2.0, config)
    assert [p.optimizer.param_groups[0]["lr"] for p in ours.players.values()] == [2e-3, 2e-3]
    f, g = ours.players["critic"].network.children()
    for _ in range(3):
        ours.step(rows(8, 6), rows(8, 4))
    assert max(p.abs().max() for p in f.parameters()) > 0.01
    for _ in range(30):  # each call brings the singular vectors nearer
        f(torch.randn(8, 6))
    for layer in f:
        if isinstance(layer, nn.Linear):
            assert abs(torch.linalg.matrix_norm(layer.kernel(), 2) - 1) < 0.1
    f.eval()  # singular vectors stay
    x, y = torch.randn(3, 6), torch.randn(5, 6)
    fx, fy = f(x), f(y)
    errors = F.mse_loss(g(fx), x) + F.mse_loss(g(fy), y)
    expected = 8.0 * errors - losses.mmd_loss(fx, fy, DEFAULT, root=True)
    torch.testing.assert_close(ours.critic_loss(x, y), expected)


def test_the_wgan_clips_and_takes_four_steps_to_one():
    torch.manual_seed(0)
    ours = mappers.GANToImage(mlp((4, 5, 5, 6)), DEFAULT)
    drawn = []
    metrics = ours.step(
        lambda: drawn.append("x") or torch.randn(8, 6),
        lambda: drawn.append("y") or torch.randn(8, 4),
    )
    assert drawn.count("x") == 4
    assert drawn.count("y") == 5
    assert max(p.abs().max() for p in ours.players["critic"].network.parameters()) <= 0.01
    assert all(value.isfinite() for value in metrics.values())


def test_the_gan_trains_its_map_more_while_it_loses(monkeypatch):
    torch.manual_seed(0)
    ours = mappers.GANToText(mlp((6, 5, 5, 4)), DEFAULT)
    monkeypatch.setattr(ours, "losing", -1.0)
    ours.step(rows(8, 4), rows(8, 6))
    assert ours.updates == 3
    monkeypatch.setattr(ours, "losing", 1e9)
    ours.step(rows(8, 4), rows(8, 6))
    assert ours.updates == 4


def test_critics_have_the_released_counts():
    def critic(made):
        return sum(p.numel() for p in made.players["critic"].network.parameters())

    to_text, to_image = mlp((128, 512, 100)), mlp((100, 512, 128))
    assert critic(mappers.GANToText(to_text, DEFAULT)) == 201_201
    assert critic(mappers.GANToImage(to_image, DEFAULT)) == 263_425
    assert critic(mappers.MMDGANToText(to_text, DEFAULT)) == 380_032 + 380_004


@pytest.mark.parametrize("family", list(mappers.MAPPERS))
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_an_update_of_one_player_leaves_the_other_alone(family, direction):
    torch.manual_seed(0)
    a, d = (6, 4) if direction == "image_to_text" else (4, 6)
    ours = mappers.MAPPERS[family][direction](mlp((a, 5, 5, d)), DEFAULT)
    for name in ours.players:
        before = {n: copy.deepcopy(p.network.state_dict()) for n, p in ours.players.items()}
        loss = torch.zeros(())
        for p in ours.players.values():
            for q in p.network.parameters():
                loss = loss + 0.1 * q.square().sum()
        ours.update(name, loss)
        for other, player in ours.players.items():
            changed = any(
                not torch.equal(v, before[other][k]) for k, v in player.network.state_dict().items()
            )
            assert changed == (other == name)


@pytest.mark.parametrize("family", list(mappers.MAPPERS))
def test_training_brings_the_distributions_together(family, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(mappers.MMDGANMapper, "critic_steps", 5)
    ours = mappers.MAPPERS[family]["image_to_text"](mlp((6, 64, 64, 4)), DEFAULT, 10.0)
    source = torch.Generator().manual_seed(1)

    def draw_x():
        return 0.2 * torch.randn(64, 4, generator=source) + torch.tensor([1.0, -0.5, 0.0, 0.3])

    def draw_y():
        return torch.randn(64, 6, generator=source)

    def distance():
        with torch.no_grad():
            x = torch.cat([draw_x() for _ in range(8)])
            y = ours.network(torch.cat([draw_y() for _ in range(8)]))
        return losses.mmd_loss(x, y, estimator="unbiased")

    before = distance()
    for _ in range({"mmd": 60, "gan": 150, "mmd_gan": 40}[family]):
        ours.step(draw_x, draw_y)
    assert distance() < before / 3


def test_the_gan_s_critic_can_be_spectral():
    torch.manual_seed(0)
    ours = mappers.GANToText(mlp((6, 5, 5, 4)), DEFAULT, 5.0, gan_critic="spectral")
    for _ in range(3):
        ours.step(rows(8, 4), rows(8, 6))
    layers = [m for m in ours.players["critic"].network if isinstance(m, nn.Linear)]
    assert len(layers) == 5
    for layer in layers:
        for _ in range(50):  # of power iteration
            layer.kernel()
        assert abs(torch.linalg.matrix_norm(layer.kernel(), 2) - 1) < 0.1


def test_draws_are_seen_in_standard_form():
    table = codes()
    to_image = CodeMap(4, [5], 6)
    to_image.fit(table.text, table.mean)
    raw = mapping.CodeDraws(table, 400, stochastic=False, seed=3)
    seen = mapping.CodeDraws(table, 400, stochastic=False, seed=3, see_text=to_image.see)
    text, given = raw.text(), seen.text()
    torch.testing.assert_close(given, (text - table.text.mean(0)) / table.text.std(0, False))
    expected = to_image.network(given) * table.mean.std(0, False) + table.mean.mean(0)
    torch.testing.assert_close(to_image(text), expected)
    assert torch.equal(raw.image(), seen.image())


def stepped(table: mapping.Codes, count: int = 3) -> dict[str, torch.Tensor]:
    """The weights of every family's maps after some steps on these codes."""
    found = {}
    for family, directions in mappers.MAPPERS.items():
        torch.manual_seed(0)
        draws = mapping.CodeDraws(table, 8, seed=3)
        to_text = directions["image_to_text"](mlp((6, 5, 5, 4)), DEFAULT)
        to_image = directions["text_to_image"](mlp((4, 5, 5, 6)), DEFAULT)
        for _ in range(count):
            to_text.step(draws.text, draws.image)
            to_image.step(draws.image, draws.text)
        for name, made in {"to_text": to_text, "to_image": to_image}.items():
            weights = made.network.state_dict()
            found.update({f"{family} {name} {k}": v for k, v in weights.items()})
    return found


def test_captions_alone_do_not_know_their_pictures(folder):
    dataset = open_dataset(folder, 64, "train")
    order = np.random.default_rng(0).permutation(len(dataset))
    shuffled = replace(dataset, captions=[dataset.captions[i] for i in order])
    (texts, weights), (others, theirs) = captions_alone(dataset), captions_alone(shuffled)
    assert texts == others
    assert np.array_equal(weights, theirs)
    assert weights.sum() == pytest.approx(dataset.weights.sum())


def test_draws_follow_weights_and_resume():
    draws = Draws(np.array([0.0, 1.0, 3.0, 0.0]), 1000, seed=1)
    first = next(draws)
    assert set(first.tolist()) == {1, 2}
    assert abs((first == 2).float().mean() - 0.75) < 0.07
    state = copy.deepcopy(draws.state_dict())
    second = next(draws)
    again = Draws(np.array([0.0, 1.0, 3.0, 0.0]), 1000)
    again.load_state_dict(state)
    assert torch.equal(next(again), second)
    for weights in ([0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(ValueError, match="one above 0"):
            Draws(np.array(weights), 4)


def test_anchors_are_their_losses():
    source, target, network = torch.randn(6, 4), torch.randn(6, 3), mlp((4, 5, 3))
    ours = mapping.Anchor("l2", source, target, 2.0, 6)
    torch.testing.assert_close(ours(network), 2 * F.mse_loss(network(source), target))
    a, b = F.normalize(network(source), dim=1), F.normalize(target, dim=1)
    scores, right = 10 * a @ b.T, torch.arange(6)
    expected = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
    torch.testing.assert_close(
        mapping.Anchor("info_nce", source, target, 1.0, 6)(network), expected
    )
    assert len({mapping.Anchor("l2", source, target, 1.0, 2)(network).item() for _ in range(9)}) > 1


@pytest.mark.parametrize(
    "fields",
    [{"critic": "flat"}, {"width": 0}, {"steps": (0, 5)}, {"rank_weight": -1.0}, {"lr": 0.0}],
)
def test_mmd_gan_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        mappers.MMDGANConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"families": ("vae",)}, {"families": ()}, {"families": ("mmd", "mmd")}, {"batch_size": 1},
     {"lr_scale": 0}, {"ema_decay": 1.0}, {"gan_critic": "flat"}, {"hidden": 0},
     {"bandwidths": (0.0,)}, {"anchor": "mse"},
     {"anchor_pairs": 1}, {"anchor_weight": -1}],
)  # fmt: skip
def test_mapping_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        mapping.MappingTraining(**fields)


def test_codes_are_measured_at_their_own_scale():
    x, y = torch.randn(50, 6), torch.randn(40, 6) + 1
    plain = mmd2(x, y, kernel_of(x))
    torch.testing.assert_close(mmd2(100 * x, 100 * y, kernel_of(100 * x)), plain)
    corners = torch.tensor([[0.0], [0.0], [0.0], [4.0], [4.0], [4.0]])  # most distances are 4
    assert kernel_of(corners).bandwidths == [1.0, 2.0, 4.0, 8.0, 16.0]
