import pytest
import torch

from fastxm.nn.spectral import Spectral, SpectralConv2d, normalised_once


@pytest.mark.parametrize("down", [False, True])
def test_autocast_rounds_a_kernel_once(down):
    layer = SpectralConv2d(5, 7, 3, down=down).eval()
    wide = layer.kernel()
    assert wide.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.kernel(), wide.bfloat16())
        with normalised_once(layer):
            assert torch.equal(layer.held, wide.bfloat16())
    assert layer.held is None


def test_no_kernel_is_held_after_an_error():
    network = torch.nn.Sequential(SpectralConv2d(3, 3, 1), SpectralConv2d(3, 3, 1))
    network[1].weight = None  # cannot be normalised
    with pytest.raises(AttributeError), normalised_once(network):
        pass
    assert [layer.held for layer in network if isinstance(layer, Spectral)] == [None, None]
