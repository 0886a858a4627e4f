"""Inception-v3: the published count, the maps, and weights of another network."""

import pytest
import torch

from fastxm.encoders import InceptionV3, image_encoder


class Blank(InceptionV3):
    def __init__(self):
        torch.nn.Module.__init__(self)
        self.make()


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    blank = Blank()
    assert sum(p.numel() for p in blank.parameters()) == 23_834_568
    return blank.state_dict()


def test_from_a_file(state, tmp_path):
    path = tmp_path / "inception.pth"
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(1000, 768)}, path)
    encoder = image_encoder(path, image_size=96)
    images = torch.rand(1, 3, 64, 64)
    regions, last = encoder.features(images)
    assert (regions.shape, last.shape) == ((1, 768, 4, 4), (1, 2048, 1, 1))
    assert encoder(images).shape == (1, encoder.width)
    assert encoder.logits(images).shape == (1, 1000)
    assert encoder.name.startswith("inception-v3-96-")
    assert not any(p.requires_grad for p in encoder.parameters())


def test_another_network_is_refused(state, tmp_path):
    broken = {k: v for k, v in state.items() if "Mixed_7c" not in k}
    with pytest.raises(ValueError, match="not weights of Inception-v3"):
        InceptionV3(broken)
    with pytest.raises(FileNotFoundError, match="efficientnet-lite0 or a file"):
        image_encoder(tmp_path / "absent.pth")
