"""A projected discriminator's own part: what is fixed, what learns, what each head sees."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastxm.nn.projected import Head, Mixing, PictureHead, ProjectedHeads

CHANNELS, SIZES, WIDTH, TEXT = (3, 5, 7), (16, 8, 4), 6, 9
WIDTHS = (6, 12, 24)


PICTURES = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


def maps(count: int = 2) -> list[torch.Tensor]:
    return [torch.randn(count, c, size, size) for c, size in zip(CHANNELS, SIZES)]


def judges() -> ProjectedHeads:
    """In evaluation: twice the same is the same."""
    return ProjectedHeads(CHANNELS, SIZES, WIDTH, TEXT, picture=(32, WIDTH)).eval()


def test_shapes_and_no_parameters():
    mixing = Mixing(CHANNELS, WIDTHS)
    expected = [(2, width, size, size) for width, size in zip(WIDTHS, SIZES)]
    assert [tuple(x.shape) for x in mixing(maps())] == expected
    assert not list(mixing.parameters())
    assert len(mixing.state_dict()) == 8


def test_mixing_is_the_formula():
    mixing, given = Mixing(CHANNELS, WIDTHS).double(), [x.double() for x in maps()]
    state = mixing.state_dict()
    expected: list[torch.Tensor] = []
    for i in (2, 1, 0):
        x = torch.einsum("oc,bchw->bohw", state[f"channels{i}"][:, :, 0, 0], given[i])
        if expected:
            coarser = F.conv2d(expected[0], state[f"coarser{i}"])
            up = torch.nn.Upsample(scale_factor=2, mode="bilinear")(coarser)
            x = (x + up) / 2**0.5
        expected.insert(0, F.conv2d(x, state[f"mixed{i}"], padding=1))
    for found, wanted in zip(mixing(given), expected):
        torch.testing.assert_close(found, wanted)


def test_finer_maps_know_of_coarser_ones_and_not_the_other_way():
    heads, given = judges(), maps()
    before = heads(given, PICTURES)[0]
    given[1] = given[1] + 1
    changed = (heads(given, PICTURES)[0] != before).all(0)
    assert changed.tolist() == [True, True, False, False]


def test_the_last_head_sees_the_picture_and_no_map():
    heads, given = judges(), maps()
    before = heads(given, PICTURES)[0]
    changed = (heads(given, 1 - PICTURES)[0] != before).all(0)
    assert changed.tolist() == [False, False, False, True]
    assert heads.picture is not None
    without = ProjectedHeads(CHANNELS, SIZES, WIDTH, TEXT)
    assert without(given, PICTURES)[0].shape == (2, 3)


def test_mixing_keeps_the_size_of_numbers():
    torch.manual_seed(0)
    given = [torch.randn(8, c, size, size) for c, size in zip((64, 64, 64), SIZES)]
    for x in Mixing((64, 64, 64), (64, 64, 64))(given):
        # of interpolated and padded maps a little less than of independent ones
        assert 0.5 < x.square().mean().sqrt() < 1.1


def test_all_heads_learn_and_pictures_get_gradients():
    heads, images = judges().train(), PICTURES.clone().requires_grad_()
    given = [x.requires_grad_() for x in maps()]
    realness, semantic = heads(given, images)
    assert realness.shape == (2, 4)
    assert semantic.shape == (2, 4, TEXT)
    (realness.sum() + semantic.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in heads.parameters())
    assert all(x.grad is not None and x.grad.any() for x in (*given, images))


def test_a_head_judges_where_things_are_but_tells_texts_by_what_they_are():
    head, x = Head(4, WIDTH, TEXT).eval(), torch.randn(2, WIDTH, 4, 4)
    with torch.no_grad():  # so that its convolution treats all places alike
        head.conv.weight.zero_()
        head.conv.weight[:, :, 1, 1] = torch.randn(WIDTH, WIDTH)
        (real, semantic), (turned, same) = head(x), head(x.flip(2, 3))
    torch.testing.assert_close(semantic, same)
    assert not torch.allclose(real, turned, rtol=1e-3)


def test_a_head_is_flat():
    """Its convolutions are spectrally normalised: f_d grows no faster than their kernels allow."""
    head = Head(8, WIDTH, TEXT)
    for layer in (head.conv, head.hidden, head.realness):
        with torch.no_grad():
            layer.weight.mul_(100)
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1)).tolist()
        lost = values[1] / values[0] if values[1:] else 0.5  # of the second direction, a time
        for _ in range(math.ceil(math.log(1e-6) / math.log(lost))):
            kernel = layer.kernel()
        assert torch.linalg.svdvals(kernel.flatten(1))[0].item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("sizes", [(16, 8, 8), (8, 4, 2), (16, 4)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="each map is half as wide as the last"):
        ProjectedHeads(CHANNELS[: len(sizes)], sizes, WIDTH, TEXT)


def test_maps_that_are_missing():
    with pytest.raises(ValueError, match="zip"):
        ProjectedHeads(CHANNELS, SIZES, WIDTH, TEXT)(maps()[:2], PICTURES)


@pytest.mark.parametrize("size", [8, 32])
def test_the_picture_s_head_ends_at_4_by_4_too(size):
    realness, semantic = PictureHead(size, WIDTH, TEXT)(torch.rand(2, 3, size, size))
    assert realness.shape == (2,)
    assert semantic.shape == (2, TEXT)
