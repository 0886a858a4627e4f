"""ResNet-50 from a local file: torchvision's names and counts, its blocks, bad files."""

import pytest
import torch
from torch.nn import functional as F

from fastxm.encoders import image_encoder
from fastxm.encoders.resnet import STAGES, Bottleneck, ResNet50


def shapes() -> dict[str, torch.Size]:
    """Names and shapes of torchvision's state dict, written out."""
    found = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    inputs = 64
    for i, (width, count) in enumerate(STAGES):
        for j in range(count):
            name = f"layer{i + 1}.{j}"
            convs = {"1": (width, inputs, 1), "2": (width, width, 3), "3": (4 * width, width, 1)}
            for k, (c_out, c_in, side) in convs.items():
                found[f"{name}.conv{k}.weight"] = (c_out, c_in, side, side)
                found |= norm(f"{name}.bn{k}", c_out)
            if j == 0:
                found[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                found |= norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    return {**found, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


def norm(name, width):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{p}": (width,) for p in parts}, f"{name}.num_batches_tracked": ()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif len(shape) == 4:
            fan = shape[1] * shape[2] * shape[3]
            state[name] = torch.randn(shape) / fan**0.5
        else:
            state[name] = (
                torch.ones(shape) if name.endswith(("var", "weight")) else torch.zeros(shape)
            )
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(state, path)
    return path


def test_it_reads_torchvision_s_file(file):
    net = image_encoder(file, image_size=64)
    assert isinstance(net, ResNet50)
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    images = torch.rand(2, 3, 40, 40)
    assert [tuple(x.shape[1:]) for x in net.features(images)] == [
        (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)
    ]  # fmt: skip
    features = net.embed(images)
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.train().training
    assert net.name.startswith("resnet50-64-")


def test_the_first_layers_by_hand(file):
    net, images = image_encoder(file, image_size=None), torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images - mean[:, None, None]) / std[:, None, None]
    scale = (1 + 1e-5) ** -0.5  # of a batch norm with variance 1
    x = F.max_pool2d(F.relu(F.conv2d(x, net.conv1.weight, stride=2, padding=3) * scale), 3, 2, 1)
    block = net.layer1[0]
    y = F.relu(F.conv2d(x, block.conv1.weight) * scale)
    y = F.relu(F.conv2d(y, block.conv2.weight, padding=1) * scale)
    y = F.conv2d(y, block.conv3.weight) * scale
    expected = F.relu(y + F.conv2d(x, block.downsample[0].weight) * scale)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.layer1[1:](block(x)), net.features(images)[0])


def test_a_stride_is_in_the_second_convolution():
    block = Bottleneck(8, 4, 2)
    assert [conv.stride[0] for conv in (block.conv1, block.conv2, block.conv3)] == [1, 2, 1]
    assert block(torch.randn(1, 8, 6, 6)).shape == (1, 16, 3, 3)


def test_other_weights_are_refused(tmp_path):
    torch.save({"layer4.2.conv3.weight": torch.zeros(1)}, tmp_path / "some.pth")
    with pytest.raises(ValueError, match="not weights of a ResNet-50"):
        image_encoder(tmp_path / "some.pth")
    with pytest.raises(FileNotFoundError):
        image_encoder(tmp_path / "none.pth")
