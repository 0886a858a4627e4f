"""LAFITE's and VDL's discriminators in training: what they see, and what of them learns."""

import copy
from dataclasses import replace

import pytest
import torch
from small_joint import LOOP, built, lafite, moved, state, vdl
from torch.nn import functional as F

from fastxm import losses
from fastxm.training.trainer import train

pytestmark = pytest.mark.usefixtures("cache")


def test_r1_is_the_squared_slope(data, clip):
    recipe, batch = built(lafite(data, clip))
    network = copy.deepcopy(recipe.model.discriminator).double()
    x = batch["image"].double().requires_grad_()
    text = F.normalize(torch.randn(4, 6), dim=1).double()
    found = losses.r1(network(x, text).logits, x)
    direction = torch.randn_like(x)
    step = 1e-6 * direction
    with torch.no_grad():
        rise = (network(x + step, text).logits - network(x - step, text).logits).sum() / 2e-6
    (slope,) = torch.autograd.grad(network(x, text).logits.sum(), x)
    torch.testing.assert_close((slope * direction).sum(), rise, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, slope.square().sum() / 8)


@pytest.mark.parametrize("share", [False, True])
def test_the_discriminator_may_judge_the_generator_s_own_pictures(data, clip, share):
    recipe, batch = built(lafite(data, clip, share_fakes=share))
    whole, drawn = recipe.synthesis, []
    recipe.synthesis = lambda *inputs: drawn.append(whole(*inputs)) or drawn[-1]
    recipe.step(batch)
    assert len(drawn) == 2 - share


def test_the_discriminator_sees_pictures_moved(data, clip):
    plain, batch = built(lafite(data, clip))
    assert torch.equal(plain.augmented(batch["image"]), batch["image"])
    recipe, batch = built(lafite(data, clip, augment="translation"))
    images = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16)  # as its columns are
    seen = recipe.augmented(images)
    steps = (seen[:, 0, 0] - images[:, 0, 0]).mean(1) / (2 / 15)
    assert (steps > -2.1).all()
    assert (steps < 2.1).all()
    assert steps.std() > 0.5
    whole, moved = recipe.augmented, []
    recipe.augmented = lambda images: moved.append(len(images)) or whole(images)
    recipe.step(batch)
    assert moved == [4, 4, 4, 4]  # in the generator's update, the discriminator's and R1


PROJECTED = {"discriminator": "projected", "head_width": 2, "picture_width": 2}


@pytest.mark.parametrize("make", [vdl, lafite])
def test_a_projected_discriminator_learns_without_r1(data, clip, make):
    recipe, batch = built(make(data, clip, PROJECTED, r1_every=0, lr_d=1e-3))
    assert recipe.players["discriminator"].optimizer.param_groups[0]["lr"] == 1e-3
    frozen = state(recipe.model.discriminator.image_encoder)
    before = {name: state(part) for name, part in recipe.model.named_children()}
    fixed = state(recipe.model.discriminator.heads.mixing)
    metrics = recipe.step(batch)
    assert "r1" not in metrics
    assert all(value.isfinite() for value in metrics.values())
    for name in ("generator", "discriminator"):
        assert moved(getattr(recipe.model, name), before[name])
    for name, p in recipe.model.discriminator.heads.named_parameters():
        assert not torch.equal(p, before["discriminator"][f"heads.{name}"]), name
    assert not moved(recipe.model.discriminator.image_encoder, frozen)
    assert not moved(recipe.model.discriminator.heads.mixing, fixed)


def test_the_hinge_is_what_players_minimise(data, clip):
    recipe, batch = built(lafite(data, clip, PROJECTED, r1_every=0, adversarial="hinge"))
    logits = []
    recipe.model.discriminator.register_forward_hook(lambda *a: logits.append(a[2].logits))
    metrics = recipe.step(batch)
    torch.testing.assert_close(metrics["g_gan"], -logits[0].detach().mean())
    fake, real = logits[1].detach(), logits[2].detach()
    expected = (1 + fake).clamp(min=0).mean() + (1 - real).clamp(min=0).mean()
    torch.testing.assert_close(metrics["d_gan"], expected)


def test_a_projected_run_resumes(data, clip, tmp_path):
    options = {"r1_every": 0, "path_every": 0, "adversarial": "hinge"}
    make = lambda: lafite(data, clip, PROJECTED, **options)  # noqa: E731
    loop = replace(LOOP, steps=4)
    whole = train(make(), tmp_path / "whole", loop)
    train(make(), tmp_path / "parts", replace(loop, steps=2))
    parts = train(make(), tmp_path / "parts", loop, resume=True)
    read = [(run.out / "metrics.jsonl").read_text() for run in (whole, parts)]
    assert read[0] == read[1]
