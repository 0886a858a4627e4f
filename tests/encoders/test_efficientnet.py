"""EfficientNet-Lite0: the published network's values, its scales, its derivative."""

import pytest
import torch
import torch.nn.functional as F

from fastxm.encoders import image_encoder
from fastxm.encoders.efficientnet import NORM_EPS, package_weights, read


@pytest.fixture(scope="module")
def net():
    return image_encoder("efficientnet-lite0")


def waves(size):
    i = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(0.037 * i + 0.5)).float().view(2, 3, size, size)


def test_values_of_the_published_network(net):
    # made with efficientnet-lite-pytorch 0.1.0, which folds nothing, from the same weights
    pooled, logits = net(waves(224)), net.logits(waves(224))
    close = {"atol": 2e-4, "rtol": 1e-3}
    expected = torch.tensor([[0.2182, 2.7801, 0.0], [0.2026, 2.9338, 0.0]])
    torch.testing.assert_close(pooled[:, [0, 100, 1279]], expected, **close)
    torch.testing.assert_close(pooled.mean(), torch.tensor(0.1307), **close)
    expected = torch.tensor([[-0.6789, -0.3874, 1.5952], [-0.7711, -0.3764, 1.6052]])
    torch.testing.assert_close(logits[:, [0, 500, 999]], expected, **close)
    assert logits.argmax(1).tolist() == [905, 905]


def test_norm_is_folded_and_padding_is_below_and_right(net):
    weights, x = read(package_weights()), waves(32)
    norm = [weights[f"_bn0.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    padded = F.pad(x, (0, 1, 0, 1))
    plain = F.conv2d(padded, weights["_conv_stem.weight"], stride=2)
    plain = F.batch_norm(plain, *norm, eps=NORM_EPS)
    torch.testing.assert_close(net.stem(x), plain, atol=1e-4, rtol=1e-4)


def test_maps_at_five_scales(net):
    maps = net.features(waves(64))
    assert [m.shape[1] for m in maps] == list(net.channels)
    assert [m.shape[2] for m in maps] == [112, 56, 28, 14, 7]
    torch.testing.assert_close(net.pool(maps), net(waves(64)))


def test_resizing_is_antialiased_or_left_out(net):
    small = F.interpolate(waves(256), (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(net(waves(256)), net(small))
    as_is = image_encoder("efficientnet-lite0", image_size=None)
    assert [m.shape[2] for m in as_is.features(waves(64))] == [32, 16, 8, 4, 2]
    assert as_is.features(waves(65))[0].shape[2] == 33
    assert as_is.name != net.name


def test_derivative_reaches_the_picture():
    net = image_encoder("efficientnet-lite0").double()
    x = waves(32).double().requires_grad_()
    (dx,) = torch.autograd.grad(net(x).square().sum(), x)
    # so small a step that no ReLU6 changes sides
    step = 1e-8 * F.normalize(torch.randn_like(x).flatten(), dim=0).view_as(x)
    rise = net(x + step).square().sum() - net(x - step).square().sum()
    torch.testing.assert_close((dx * step).sum(), rise / 2, rtol=1e-4, atol=0)
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_bad_input_is_one_clear_error(net, tmp_path):
    with pytest.raises(ValueError, match="B, 3, H, W"):
        net(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="uint8"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not weights of EfficientNet-Lite0"):
        image_encoder(tmp_path / "other.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds no state dict"):
        image_encoder(tmp_path / "list.pth")
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights: "):
            image_encoder(tmp_path / name)


def test_features_for_the_cache_are_not_of_tf32(net, monkeypatch):
    seen, conv = [], torch.backends.cudnn.conv
    monkeypatch.setattr(net, "pool", lambda maps: seen.append(conv.fp32_precision) or maps[0])
    before = conv.fp32_precision
    net.embed(waves(32))
    assert seen == ["ieee"]
    assert conv.fp32_precision == before


def test_layout_features_say_where(net):
    layout, x = image_encoder("efficientnet-lite0-layout"), waves(224)
    features = layout.embed(x)
    assert features.shape == (2, layout.width) == (2, 2304)
    torch.testing.assert_close(features[:, :1280], net(x))
    where = F.avg_pool2d(net.features(x)[0], 14).flatten(1)
    torch.testing.assert_close(features[:, 1280:], where)
    torch.testing.assert_close(layout.logits(x), net.logits(x))
    assert layout.name != net.name


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_finest_maps_alone(net, count):
    x, seen = waves(224), []
    hooks = [block.register_forward_hook(lambda *_: seen.append(1)) for block in net.blocks]
    found = net.features(x, count)
    for hook in hooks:
        hook.remove()
    assert len(found) == count
    assert all(torch.equal(a, b) for a, b in zip(found, net.features(x)[:count], strict=True))
    assert len(seen) == {1: 1, 4: 11, 5: 16}[count]  # blocks that only coarser maps need do not run
