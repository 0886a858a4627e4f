"""Claim: augmentation moves, cuts and recolours as drawn, one picture at a time, differentiably."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastxm.data.transforms import (
    BRIGHTNESS,
    CONTRAST,
    CUT_X,
    CUT_Y,
    SATURATION,
    SHIFT_X,
    SHIFT_Y,
    augment,
    draw,
    random_flip,
    random_square,
)  # fmt: skip

STILL = 0.5  # the middle of a parameter: no change of colour, no shift


def parameters(batch_size=1, **chosen) -> torch.Tensor:
    columns = {"brightness": BRIGHTNESS, "saturation": SATURATION, "contrast": CONTRAST,
               "shift_y": SHIFT_Y, "shift_x": SHIFT_X, "cut_y": CUT_Y, "cut_x": CUT_X}  # fmt: skip
    table = torch.full((batch_size, 7), STILL)
    for name, value in chosen.items():
        table[:, columns[name]] = value
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["", "color", "translation", "cutout", "color, cutout"])
def test_shape_and_dtype(device, policy, dtype):
    images = torch.rand(3, 3, 17, 24, device=device, dtype=dtype)
    out = augment(images, policy)
    assert out.shape == images.shape
    assert out.dtype == dtype
    assert out.device == images.device
    assert out.isfinite().all()
    if policy == "":
        assert torch.equal(out, images)
    if policy in ("translation", "cutout"):
        assert 0 <= out.min() <= out.max() <= 1


def test_middle_parameters_change_nothing():
    images = torch.rand(2, 3, 16, 16)
    out = augment(images, "color,translation", parameters=parameters(2))
    torch.testing.assert_close(out, images)


def test_colour():
    images = torch.rand(1, 3, 8, 8)
    up = augment(images, "color", parameters=parameters(brightness=1.0))
    torch.testing.assert_close(up, images + 0.25)
    grey = augment(images, "color", parameters=parameters(saturation=0.0))
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images))
    flat = augment(images, "color", parameters=parameters(contrast=0.0))
    torch.testing.assert_close(flat - flat.mean(), (images - images.mean()) / 2)


@pytest.mark.parametrize(("u", "move"), [(0.0, 2), (STILL, 0), (1 - 1e-7, -2)])
def test_translation_is_of_whole_pixels(u, move):
    images = torch.rand(1, 3, 16, 16)
    out = augment(images, "translation", parameters=parameters(shift_x=u))
    came_from = (torch.arange(16) - move).clamp(0, 15)  # the border moves in
    assert torch.equal(out, images[..., came_from])
    turned = augment(images.mT, "translation", parameters=parameters(shift_y=u))
    assert torch.equal(turned, out.mT)


def test_cutout_is_half_a_side():
    images = torch.rand(1, 3, 16, 16)
    out = augment(images, "cutout", parameters=parameters())
    expected = images.clone()
    expected[..., 4:12, 4:12] = 0.5
    assert torch.equal(out, expected)
    corner = augment(images, "cutout", parameters=parameters(cut_y=0.0, cut_x=0.0))
    assert torch.equal(corner[..., :4, :4], torch.full_like(corner[..., :4, :4], 0.5))
    assert torch.equal(corner[..., 4:, :], images[..., 4:, :])


def test_each_picture_has_its_own():
    images = torch.rand(1, 3, 32, 32).expand(64, -1, -1, -1)
    for policy in ("color", "translation", "cutout"):
        out = augment(images, policy)
        assert len(torch.unique(out.flatten(1), dim=0)) > 32, policy


def test_parameters_are_shared_only_if_asked():
    real, fake = torch.rand(2, 4, 3, 16, 16)
    shared = draw(4)
    both = augment(torch.cat([real, fake]), parameters=torch.cat([shared, shared]))
    assert torch.equal(both[:4], augment(real, parameters=shared))
    assert torch.equal(both[4:], augment(fake, parameters=shared))
    assert not torch.equal(augment(real), augment(real))


def test_generator_reproduces():
    images = torch.rand(4, 3, 16, 16)
    one, two = (augment(images, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_derivatives():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    table = draw(2)
    assert gradcheck(lambda x: augment(x, parameters=table), (images,))
    assert gradgradcheck(lambda x: augment(x, parameters=table).square(), (images,))


def test_gradient_leaves_out_what_was_cut():
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    augment(images, "cutout", parameters=parameters()).sum().backward()
    expected = torch.ones(1, 3, 16, 16)
    expected[..., 4:12, 4:12] = 0
    assert torch.equal(images.grad, expected)


def test_one_graph():
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    images, table = torch.rand(4, 3, 16, 16, requires_grad=True), draw(4)
    out = compiled(images, parameters=table)
    assert torch.equal(out, augment(images, parameters=table))
    out.sum().backward()
    assert compiled(images).shape == images.shape  # drawn inside the graph


def test_random_flip():
    images = torch.rand(200, 3, 4, 4)
    assert torch.equal(random_flip(images, 0.0), images)
    assert torch.equal(random_flip(images, 1.0), images.flip(-1))
    out = random_flip(images, generator=torch.Generator().manual_seed(0))
    flipped = (out == images.flip(-1)).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 60 < flipped.sum() < 140


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 8, 8), {}), ((2, 1, 8, 8), {}), ((2, 3, 8, 8), {"policy": "colour"}),
     ((2, 3, 8, 8), {"parameters": torch.rand(1, 7)})],
)  # fmt: skip
def test_wrong_arguments(shape, options):
    with pytest.raises(ValueError):
        augment(torch.rand(shape), **options)


def test_random_square_is_of_every_size_and_place():
    images = torch.arange(100.0).view(1, 1, 10, 10).expand(2, 3, 10, 10)
    found = [random_square(images, 0.5) for _ in range(400)]
    sides = {square.shape[-1] for square in found}
    assert sides == set(range(5, 11))
    corners = {int(square[0, 0, 0, 0]) for square in found if square.shape[-1] == 5}
    assert {corner % 10 for corner in corners} == set(range(6))
    assert {corner // 10 for corner in corners} == set(range(6))
    assert all(square.shape == (2, 3, s, s) for square in found for s in [square.shape[-1]])
    with pytest.raises(ValueError, match="smallest"):
        random_square(images, 0.0)
