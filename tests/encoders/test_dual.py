"""The dual encoder: one space, saved heads, a training that separates concepts."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastxm.encoders.dual import DualEncoder, DualEncoderConfig
from fastxm.training.dual_encoder import (
    DualEncoderTraining,
    cached_dual_encoder,
    train_dual_encoder,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
SMALL = DualEncoderConfig(hidden=16, width=8)


def noisy(colour, seed):
    noise = np.random.default_rng(seed).integers(-20, 20, (8, 8, 3))
    return (np.array(colour) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of one colour each, some of them held out."""
    root = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        for i in range(8):
            Image.fromarray(noisy(colour, i)).save(root / f"{name}-{i}.png")
            (root / f"{name}-{i}.txt").write_text(f"a {name} square\n{name}\n")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


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
    with pytest.raises(ValueError, match="epochs"):
        DualEncoderTraining(epochs=0)


def test_training_separates_concepts_and_repeats(folder, cache, monkeypatch):
    monkeypatch.setenv("FASTXM_DATA", str(cache))
    config = DualEncoderTraining(SMALL, str(folder), image_size=8, epochs=20, batch_size=6)
    state = torch.random.get_rng_state()
    model, _ = train_dual_encoder(config, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    unseen = np.stack([noisy(colour, 99) for colour in COLOURS.values()])
    images = torch.from_numpy(unseen).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        texts = model.embed_text([f"a {name} square" for name in COLOURS])
        scores = texts @ model.embed_images(images).T
    assert scores.argmax(1).tolist() == [0, 1, 2]
    # the cached one is the same model, and is trained once
    cached = cached_dual_encoder(config, progress=False)
    for key, value in model.state_dict().items():
        assert torch.equal(cached.state_dict()[key], value), key
    monkeypatch.setattr("fastxm.training.dual_encoder.fit", None)
    cached_dual_encoder(config, progress=False)
