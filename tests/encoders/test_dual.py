"""The dual encoder: one space, derivatives, saved heads."""

import pytest
import torch

from fastxm.encoders.dual import DualEncoder, DualEncoderConfig

SMALL = DualEncoderConfig(hidden=16, width=8)


def test_embeddings_have_length_one_and_take_features_too():
    model = DualEncoder(SMALL).eval()
    images = torch.rand(2, 3, 16, 16)
    pictures, texts = model.embed_images(images), model.embed_text(["a cat", "a red dog"])
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.embed_images(model.image_encoder(images)), pictures)
    sentence = model.text_encoder(["a cat", "a red dog"]).sentence
    torch.testing.assert_close(model.embed_text(sentence), texts)


def test_derivative_reaches_the_picture():
    model = DualEncoder(SMALL).eval()
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    (model.embed_images(images) * model.embed_text(["a cat"])).sum().backward()
    assert images.grad.abs().sum() > 0


def test_only_the_heads_are_saved(tmp_path):
    model = DualEncoder(SMALL).eval()
    model.standardise(torch.randn(5, 1280))
    images = torch.rand(2, 3, 16, 16)
    model.embed_images(images)  # with its encoder loaded
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 400_000
    again = DualEncoder.from_pretrained(tmp_path)
    assert again.config == SMALL
    assert torch.equal(again.embed_images(images), model.embed_images(images))


def test_channels_that_never_fire_do_not_blow_up():
    model = DualEncoder(SMALL)
    model.standardise(torch.zeros(4, 1280))
    assert model.embed_images(torch.ones(1, 1280)).isfinite().all()


def test_wrong_shapes_are_one_clear_error():
    model = DualEncoder(SMALL)
    with pytest.raises(ValueError, match=r"features \[B, 1280\]"):
        model.embed_images(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"sentences \[B, 384\]"):
        model.embed_text(torch.zeros(2, 7))
