"""CrossModalAutoencoder: the maps' counts, both directions, no side effects, saving, bad input."""

import pytest
import torch
from PIL import Image

from fastxm import CrossModalAutoencoder
from fastxm.models.image_autoencoder import ImageAutoencoderConfig
from fastxm.models.selfsup import CrossModalConfig
from fastxm.models.text_autoencoder import TextAutoencoderConfig

WORDS = ("a", "red", "green", "apple", "frog")


def small(family: str = "mmd_gan", size: int = 64) -> CrossModalAutoencoder:
    torch.manual_seed(0)
    image = ImageAutoencoderConfig(size, features=5, hidden=6, code=4, z_dim=3, gf=4)
    text = TextAutoencoderConfig(WORDS, words=5, word_width=6, code=8)
    config = CrossModalConfig(image=image, text=text, family=family, hidden=16)
    return CrossModalAutoencoder(config).eval()


@pytest.mark.parametrize(
    ("family", "to_text", "to_image"),
    [("gan", 380_004, 1_168_000), ("mmd_gan", 380_004, 380_032), ("mmd", 380_004, 380_032)],
)
def test_parameter_counts_of_the_released_maps(family, to_text, to_image):
    text = TextAutoencoderConfig(vocabulary=WORDS)
    with torch.device("meta"):
        model = CrossModalAutoencoder(CrossModalConfig(text=text, family=family))
    counts = [sum(p.numel() for p in m.parameters())
              for m in (model.image_to_text, model.text_to_image)]  # fmt: skip
    assert counts == [to_text, to_image]


@pytest.mark.parametrize("size", [64, 128])
def test_generate_draws_the_mapped_code(size):
    model = small(size=size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = model.generate(["a red apple", "frog"], num_images=2, seed=3)
    assert images.shape == (4, 3, size, size)
    assert images.dtype == torch.float32
    noise = model.noise(1, 2, 3)
    code = model.text_to_image(model.text.embed(["frog"])).expand(2, -1)
    with torch.no_grad():
        expected = model.image.decoder(noise, code)[-1]
    torch.testing.assert_close(images[2:], expected)
    again = model.generate(["a red apple", "frog"], num_images=2, seed=3)
    assert torch.equal(again, images)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_generate_leaves_training_mode_and_statistics_alone():
    model = small().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.generate(["frog"], seed=0)
    assert model.training
    assert model.image.decoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_pil_images():
    (image,) = small().generate(["frog"], seed=0, output="pil")
    assert isinstance(image, Image.Image)
    assert image.size == (64, 64)


def test_caption_says_the_mapped_code():
    model, features = small(), torch.randn(3, 5)
    codes = model.image_to_text(model.image.embed(features))
    assert model.caption(features) == model.text.say(codes)
    assert model.caption(features, batch_size=1) == model.caption(features)


def test_the_autoencoders_alone():
    model, features = small(), torch.randn(3, 5)
    drawn = model.redraw(features, seed=1)
    z = model.noise(1, 1, 1).expand(3, -1)
    with torch.no_grad():
        expected = model.image.decoder(z, model.image.embed(features))[-1]
    torch.testing.assert_close(drawn, expected)
    captions = ["a red apple", "frog"]
    assert model.reword(captions) == model.text.say(model.text.embed(captions))


def test_it_is_read_as_it_was_saved(tmp_path):
    model = small("gan")
    model.save_pretrained(tmp_path)
    again = CrossModalAutoencoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again.generate(["frog"], seed=0), model.generate(["frog"], seed=0))
    assert again.caption(torch.ones(1, 5)) == model.caption(torch.ones(1, 5))


def test_bad_input_is_refused(tmp_path):
    model = small()
    with pytest.raises(TypeError, match="captions are a list of strings"):
        model.generate("frog")
    with pytest.raises(TypeError, match="captions are a list of strings"):
        model.generate(None)
    with pytest.raises(ValueError, match="at least one caption"):
        model.generate([])
    with pytest.raises(ValueError, match="num_images"):
        model.generate(["frog"], num_images=0)
    with pytest.raises(ValueError, match="output is one of"):
        model.generate(["frog"], output="png")
    with pytest.raises(TypeError, match="images are a tensor"):
        model.caption(["picture.png"])
    with pytest.raises(ValueError, match="at least one picture"):
        model.caption(torch.zeros(0, 3, 64, 64))
    with pytest.raises(ValueError, match=r"floats \[N, 3, H, W\]"):
        model.caption(torch.zeros(64, 64, 3))
    with pytest.raises(ValueError, match="batch_size"):
        model.caption(torch.zeros(1, 5), batch_size=0)
    with pytest.raises(ValueError, match="family is one of"):
        CrossModalConfig(family="vae")
    with pytest.raises(FileNotFoundError, match="no saved selfsup"):
        CrossModalAutoencoder.from_pretrained(tmp_path)
