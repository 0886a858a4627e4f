"""VDL's distributions against scipy and closed forms; what it shares with LAFITE to the bit."""

import json

import numpy as np
import pytest
import scipy.special
import torch
from golden import waves
from torch.nn import functional as F

from fastxm.encoders.dual import DualEncoder, DualEncoderConfig
from fastxm.models.lafite import LAFITE, LAFITEConfig
from fastxm.models.vdl import VDL, VDLConfig
from fastxm.nn import directions
from fastxm.nn.directions import Gaussian, Heads, Noise, VonMisesFisher, draw_noise

TINY = {"image_size": 8, "embedding": 6, "z_dim": 4, "w_dim": 4, "mapping_layers": 1,
        "channel_base": 16, "channel_max": 3, "hidden": 5}  # fmt: skip


class Letters(torch.nn.Module):
    """A joint encoder of captions alone: waves of their length."""

    width = TINY["embedding"]

    def embed_text(self, captions):
        rows = torch.stack([waves((self.width,), 0.1 + len(c), 0.3) for c in captions])
        return F.normalize(rows, dim=1)


def tiny(**fields) -> VDL:
    torch.manual_seed(0)
    model = VDL(VDLConfig(**{**TINY, "evidence_width": 7, **fields}))
    model.attach(Letters())
    return model


def unit(*shape) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=1)


def stirred(model: VDL) -> VDL:
    """The model with a posterior and a prior that have moved."""
    for head in (model.posterior_heads, model.prior_heads):
        for parameter in head.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_golden_perturbation():
    z = F.normalize(waves((4, 8), 0.7, 0.3), dim=1)
    noise = Noise(F.normalize(waves((4, 8), 1.3, 0.1), dim=1), torch.full((4,), 0.5))
    # the released form, 0.25 z + 0.75 noise, is a radius of 3
    t = Gaussian(z, 3.0).sample(noise)
    expected = [0.099805, 0.654170, 0.383653, -0.291613, -0.432519, 0.066812, 0.371207, -0.023278]
    torch.testing.assert_close(t[0], torch.tensor(expected), rtol=1e-5, atol=2e-6)
    cosines = torch.tensor([0.173754, 0.546565, 0.447185, 0.025917])
    torch.testing.assert_close((t * z).sum(1), cosines, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", directions.NOISES)
def test_the_fixed_perturbation_s_cosine(form):
    z = F.normalize(torch.randn(1, 512), dim=1).expand(4000, -1)
    t = Gaussian(z, 3.0).sample(draw_noise(4000, 512, form=form))
    cosines = (t * z).sum(1)
    assert abs(cosines.mean() - 0.3163) < 4 * 0.0388 / 4000**0.5
    assert abs(cosines.std() - 0.0388) < 0.002


def test_trained_perturbation_s_size():
    heads = Heads(512, 512, zero=False)
    assert sum(p.numel() for p in heads.parameters()) == 6_298_624


def test_golden_kl():
    k = torch.arange(8, dtype=torch.float64)
    q = Gaussian(0.2 * torch.sin(0.7 * k + 0.3)[None], 0.1 * 8**0.5)
    p = Gaussian(0.2 * torch.sin(1.3 * k + 0.1)[None], 0.1326 * 8**0.5)
    torch.testing.assert_close(q.kl(p), torch.tensor([10.969264]).double(), rtol=1e-6, atol=0)


def test_gaussian_kl_is_torch_s():
    mean, other = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    radius, wide = torch.rand(3, 5).double() + 0.5, 1.7
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, radius / 5**0.5), normal(other, wide / 5**0.5)
    ).sum(1)
    torch.testing.assert_close(Gaussian(mean, radius).kl(Gaussian(other, wide)), expected)


@pytest.mark.parametrize("width", [4, 64, 256, 512])
@pytest.mark.parametrize("k", [3.0, 136.5, 600.0])
def test_bessel_is_scipy_s(width, k):
    order = width / 2 - 1
    # I_v(k) = ive(v, k) exp(k), which underflows for large orders
    near = 0.05 / order**3  # the first term that the expansion leaves out
    value = torch.tensor(k).double()
    scaled = scipy.special.ive(order, k)
    if scaled > 0:
        expected = np.log(scaled) + k
        found = directions.log_bessel(order, value).item()
        assert abs(found - expected) < near * max(1, abs(expected))
        ratio = scipy.special.ive(order + 1, k) / scaled
        assert abs(directions.mean_cosine(value, width).item() - ratio) < near


@pytest.mark.parametrize("width", [4, 64, 512])
def test_the_mean_cosine_is_the_normaliser_s_slope(width):
    k = torch.tensor([2.0, 30.0, 900.0]).double().requires_grad_()
    (slope,) = torch.autograd.grad(directions.log_normaliser(k, width).sum(), k)
    torch.testing.assert_close(directions.mean_cosine(k, width), -slope)


@pytest.mark.parametrize(
    ("cosine", "k"),
    [(0.25, 136.50), (0.30, 168.74), (0.3162, 179.82), (0.35, 204.13), (0.5, 341.07)],
)
def test_golden_concentrations(cosine, k):
    found = directions.concentration(torch.tensor(cosine).double(), 512)
    assert abs(found.item() / k - 1) < 1e-3
    assert abs(directions.mean_cosine(torch.tensor(k).double(), 512).item() - cosine) < 1e-4


def test_vmf_kl_is_the_mean_log_ratio():
    m, other = unit(1, 16), unit(1, 16)
    q, p = VonMisesFisher(m, torch.tensor([20.0])), VonMisesFisher(other, torch.tensor([9.0]))
    noise = draw_noise(40_000, 16)
    many = VonMisesFisher(m.expand(40_000, -1), torch.full((40_000,), 20.0))
    t = many.sample(noise)
    ratio = q.log_density(t) - p.log_density(t)
    assert abs(ratio.mean() - q.kl(p)) < 4 * ratio.std() / 200 + 1e-3


def test_vmf_density_integrates_to_one():
    # over the cosine with m the density is C(k) exp(k w) times the area of the sphere at w
    width, k = 12, 7.0
    w = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    area = 2 * np.pi ** ((width - 1) / 2) / scipy.special.gamma((width - 1) / 2)
    normal = directions.log_normaliser(torch.tensor(k).double(), width).exp()
    density = normal * (k * w).exp() * (1 - w.square()).clamp(min=0) ** ((width - 3) / 2) * area
    assert abs(torch.trapezoid(density, w).item() - 1) < 1e-4


@pytest.mark.parametrize("width", [8, 256])
def test_vmf_samples_have_the_mean_cosine_and_its_slope(width):
    k = torch.tensor([0.4 * width, 0.8 * width])[:, None].expand(-1, 20_000).flatten()
    k = k.double().requires_grad_()
    cosines = directions.sample_cosine(k, torch.rand(len(k)).double(), width)
    (slope,) = torch.autograd.grad(cosines.sum(), k)
    for group, sloped, value in zip(cosines.chunk(2), slope.chunk(2), k.detach()[::20_000]):
        value = value.clone().requires_grad_()
        expected = directions.mean_cosine(value, width)
        (rise,) = torch.autograd.grad(expected, value)
        assert abs(group.mean() - expected) < 4 * group.std() / 20_000**0.5
        assert abs(sloped.mean() - rise) < 4 * sloped.std() / 20_000**0.5 + 1e-3 * rise


@pytest.mark.parametrize("family", ["gaussian", "vmf"])
@pytest.mark.parametrize("evidence", ["encoder", "none"])
def test_the_posterior_begins_as_the_prior(family, evidence):
    model = tiny(family=family, evidence=evidence)
    z, seen = unit(3, 6), torch.randn(3, 7)
    q, p = model.posterior(z, seen), model.prior(z)
    noise = draw_noise(3, 6)
    assert torch.equal(q.sample(noise), p.sample(noise))
    assert torch.equal(q.kl(p), torch.zeros(3))
    torch.testing.assert_close(q.sample(noise).norm(dim=1), torch.ones(3))
    moved = stirred(model).posterior(z, seen)
    assert (moved.kl(model.prior(z)) > 0).all()
    other = model.posterior(z, torch.randn(3, 7))
    assert torch.equal(other.sample(noise), moved.sample(noise)) == (evidence == "none")


def test_zero_initialised_is_lafite_to_the_bit():
    model = tiny()
    lafite = LAFITE(LAFITEConfig(**TINY))
    lafite.load_state_dict({k: v for k, v in model.state_dict().items() if "heads" not in k})
    z, seen, noise = unit(3, 6), torch.randn(3, 7), draw_noise(3, 6)
    text = lafite.prior(z).sample(noise)
    assert torch.equal(model.posterior(z, seen).sample(noise), text)
    eta = torch.randn(3, 4)
    drawn = [m.generator(eta, m.condition(text), noise="none") for m in (model, lafite)]
    assert torch.equal(*drawn)
    judged = [m.discriminator(drawn[0], m.condition(text)).logits for m in (model, lafite)]
    assert torch.equal(*judged)


@pytest.mark.parametrize("family", ["gaussian", "vmf"])
def test_gradients_reach_the_posterior(family):
    model = stirred(tiny(family=family))
    z, seen = unit(4, 6), torch.randn(4, 7)
    q, target = model.posterior(z, seen), unit(4, 6)
    for loss in (
        (q.sample(draw_noise(4, 6)) * target).sum(),
        q.kl(model.prior(z)).sum(),
        q.log_density(target).sum(),
    ):
        heads = list(model.posterior_heads.parameters())
        found = torch.autograd.grad(loss, heads, retain_graph=True, allow_unused=True)
        assert all(g is not None and g.isfinite().all() and g.any() for g in found)


@pytest.mark.parametrize("family", ["gaussian", "vmf"])
def test_the_density_of_a_known_text_grows_as_the_mean_turns_to_it(family):
    model = tiny(family=family)
    z = unit(1, 6)
    densities = [model.prior(F.normalize(z + a * unit(1, 6), dim=1)).log_density(z) for a in (0, 3)]
    assert densities[0] > densities[1]


@pytest.mark.parametrize("conditioning", ["text", "pair"])
def test_generate_from_text_alone_and_a_folder(conditioning, tmp_path):
    model = tiny(conditioning=conditioning)
    state = torch.get_rng_state()
    images = model.generate(["a", "bcd"], num_images=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (4, 3, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1
    assert not torch.equal(images[0], images[2])
    torch.testing.assert_close(model.generate(["bcd"], seed=3)[0], images[2])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vdl"
    again = VDL.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no joint encoder"):
        again.generate(["a"])
    again.attach(Letters())
    assert torch.equal(again.generate(["a", "bcd"], num_images=2, seed=3), images)


def test_a_dual_encoder_is_saved_with_the_model(tmp_path):
    model = tiny()
    dual = DualEncoder(DualEncoderConfig(hidden=4, width=6)).eval()
    model.attach(dual)
    model.save_pretrained(tmp_path)
    again = VDL.from_pretrained(tmp_path)
    sentence = torch.randn(2, 384)
    assert torch.equal(again.text_encoder.embed_text(sentence), dual.embed_text(sentence))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "cauchy"}, "family is one of"),
        ({"evidence": "pixels"}, "evidence is one of"),
        ({"conditioning": "image"}, "conditioning is one of"),
        ({"noise": "uniform"}, "noise is one of"),
        ({"perturbation": "trained"}, "perturbation is one of"),
        ({"xi": 0.0}, "xi is above 0"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_widths_that_do_not_match():
    model = tiny()
    with pytest.raises(ValueError, match="width 6, the encoder gives 4"):
        model.attach(DualEncoder(DualEncoderConfig(hidden=4, width=4)))
    with pytest.raises(ValueError, match=r"embeddings are \[B, 6\]"):
        model.posterior(unit(2, 5), torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"evidence is \[2, 7\]"):
        model.posterior(unit(2, 6), torch.randn(2, 8))
