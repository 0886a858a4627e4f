"""The image autoencoder: the released networks' counts, shapes, the code, saving, bad input."""

import pytest
import torch

from fastxm.models.image_autoencoder import ImageAutoencoder, ImageAutoencoderConfig

SMALL = {"features": 5, "hidden": 6, "code": 4, "z_dim": 3, "gf": 4}


def small(**fields) -> ImageAutoencoder:
    torch.manual_seed(0)
    return ImageAutoencoder(ImageAutoencoderConfig(**{**SMALL, **fields})).eval()


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_of_the_released_networks():
    with torch.device("meta"):
        model = ImageAutoencoder(ImageAutoencoderConfig(features=2048))
    assert count(model.decoder) == 20_714_896
    assert count(model.decoder.first) == 20_074_240
    assert [count(stage) for stage in model.decoder.stages] == [480_384, 157_248]
    assert [count(rgb) for rgb in model.decoder.to_rgb] == [1_728, 864, 432]
    assert count(model.encoder.augment) == 524_800
    assert count(model.decoder) + count(model.encoder.augment) == 21_239_696
    assert count(model.encoder.linear) == 2048 * 1024 + 1024


@pytest.mark.parametrize(("size", "sizes"), [(64, [64]), (128, [64, 128]), (256, [64, 128, 256])])
def test_a_picture_of_each_size(size, sizes):
    model = small(image_size=size).train()
    images, mean, log_variance = model(torch.randn(2, 5))
    assert [tuple(x.shape) for x in images] == [(2, 3, s, s) for s in sizes]
    assert all(x.min() >= 0 and x.max() <= 1 for x in images)
    assert mean.shape == log_variance.shape == (2, 4)
    sum(x.sum() for x in images).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_code_s_mean_is_a_gated_map_of_a_hyperbolic_tangent():
    model, features = small(image_size=64), torch.randn(3, 5)
    model.encoder.standardise.fit(features)
    scaled = (features - features.mean(0)) / features.std(0, correction=0)
    hidden = torch.tanh(model.encoder.linear(scaled))
    a, b = model.encoder.augment.linear(hidden).chunk(2, 1)
    torch.testing.assert_close(model.embed(features), (a * b.sigmoid())[:, :4])


def test_a_constant_channel_stays_finite():
    model = small(image_size=64)
    model.encoder.standardise.fit(torch.ones(3, 5))
    assert model.embed(torch.ones(1, 5)).isfinite().all()


def test_it_is_read_as_it_was_saved(tmp_path):
    model, features = small(), torch.randn(2, 5)
    model.encoder.standardise.fit(torch.randn(4, 5))
    model.save_pretrained(tmp_path)
    weights, config = (tmp_path / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode  # whoever reads one reads both
    again = ImageAutoencoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.embed(features), model.embed(features))


def test_bad_input_is_refused():
    model = small()
    for images in (torch.zeros(2, 4), torch.zeros(2, 1, 8, 8), torch.zeros(2, 5, dtype=torch.int)):
        with pytest.raises(ValueError, match=r"floats \[N, 3, H, W\].* or features \[N, 5\]"):
            model.embed(images)
    for fields in ({"image_size": 32}, {"code": 0}, {"gf": 2}, {"residuals": -1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ImageAutoencoderConfig(**fields)
