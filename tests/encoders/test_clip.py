"""CLIP from a directory: against transformers' own call, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import write
from torch.nn import functional as F
from transformers import CLIPModel

from fastxm.encoders import joint_encoder
from fastxm.encoders.clip import CLIP, MEAN, STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return CLIP(folder)


def test_embeddings_are_transformers(clip, folder):
    theirs = CLIPModel.from_pretrained(folder)
    images = torch.rand(3, 3, 16, 16)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    tokens = clip.tower.tokenizer(["red", "a blue cat"], padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = theirs(pixel_values=(images - mean) / std, **inputs)
        torch.testing.assert_close(clip.embed_images(images), out.image_embeds)
        torch.testing.assert_close(clip.embed_text(["red", "a blue cat"]), out.text_embeds)


def test_pictures_are_resized_and_differentiable_and_the_weights_frozen(clip):
    images = torch.rand(2, 3, 24, 24, requires_grad=True)
    small = F.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    embedded = clip.embed_images(images)
    torch.testing.assert_close(embedded, clip.embed_images(small))
    embedded.sum().backward()
    assert images.grad.any()
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


def test_features_are_taken_for_what_they_are_of(clip):
    images, captions = torch.rand(5, 3, 20, 20), ["red", "blue", "a very long caption of letters"]
    features = clip.image_encoder.embed(images, batch_size=2)
    assert features.shape == (5, clip.evidence_width)
    torch.testing.assert_close(clip.embed_images(features), clip.embed_images(images))
    sentence = clip.text_encoder(captions).sentence
    torch.testing.assert_close(clip.embed_text(sentence), clip.embed_text(captions))
    evidence = clip.evidence(features)
    torch.testing.assert_close(evidence.mean(1), torch.zeros(5), atol=1e-6, rtol=0)


def test_a_caption_too_long_is_the_mean_of_its_clauses(clip):
    captions = ["red", "a red cat, and. a b, ", "a, cat", ".,.,.,.,.,.,.,.,"]
    features = clip.text_features(captions)
    tower = clip.tower.text(["red", "a red cat", "and", "a b", "a, cat", captions[3]], "cpu")
    expected = torch.stack([tower[0], tower[1:4].mean(0), tower[4], tower[5]])
    torch.testing.assert_close(features, expected)


def test_by_name(folder, clip):
    assert joint_encoder(folder).name == clip.name


def test_directories_that_are_none(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="local directory"):
        CLIP(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no CLIP"):
        CLIP(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="has no weights"):
        CLIP(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no weights: no open_clip_model\.safetensors"):
        CLIP(tmp_path)


def test_models_that_are_none(tmp_path, folder):
    bert = shutil.copytree(folder, tmp_path / "bert")
    (bert / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a model of type 'bert', not a CLIP"):
        CLIP(bert)
    (bert / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object, but a list"):
        CLIP(bert)
    part = shutil.copytree(folder, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no whole CLIP: .* lack visual_projection\.weight"):
        CLIP(part)


def test_weights_that_are_damaged_or_do_not_fit_are_one_error(tmp_path, folder):
    cut = shutil.copytree(folder, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"the weights in .*cut are damaged"):
        CLIP(cut)
    wide = shutil.copytree(folder, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "projection_dim": 7}))
    with pytest.raises(ValueError, match=r"the weights in .*wide do not fit their config"):
        CLIP(wide)


def test_weights_of_half_precision_are_computed_with_in_float32(tmp_path, folder):
    half = shutil.copytree(folder, tmp_path / "half")
    CLIPModel.from_pretrained(folder).half().save_pretrained(half)
    images = torch.rand(2, 3, 16, 16)
    embedded = CLIP(half).embed_images(images)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded, CLIP(folder).embed_images(images), atol=1e-2, rtol=0)


def test_pixels_have_the_mean_and_the_std_that_the_directory_names(tmp_path, folder, clip):
    own = shutil.copytree(folder, tmp_path / folder.name)
    kept = own / "preprocessor_config.json"
    kept.write_text(json.dumps({"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.25]}))
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.5, 0.25, 0.5], [0.5, 0.5, 0.25]))
    found = CLIP(own)
    theirs = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(pixel_values=(images - mean) / std, input_ids=torch.tensor([[1, 2]]))
        torch.testing.assert_close(found.embed_images(images), expected.image_embeds)
    assert found.name == f"{clip.name}-0.5-0.25-0.5-0.5-0.5-0.25"  # features are cached by it
    kept.write_text(json.dumps({"image_mean": list(MEAN), "image_std": None}))
    assert CLIP(own).name == clip.name
    for field, value in (("image_mean", [0.5]), ("image_mean", 0.5), ("image_std", ["a", 1, 1])):
        kept.write_text(json.dumps({field: value}))
        with pytest.raises(ValueError, match=rf"_config\.json: {field} is three numbers, not"):
            CLIP(own)
    kept.write_text(json.dumps({"image_std": [0, 1, 1]}))
    with pytest.raises(ValueError, match="image_std is above 0"):
        CLIP(own)


def test_pictures_must_be_floats(clip):
    with pytest.raises(ValueError, match="images are floats"):
        clip.features(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_a_model_of_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    config = {"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}
    theirs = open_clip.CLIP(**config).eval()
    weights = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    clip = CLIP(tmp_path)
    images, captions = torch.rand(2, 3, 16, 16), ["a red cat", "b"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        expected = theirs.encode_image((images - mean) / std, normalize=True)
        torch.testing.assert_close(clip.embed_images(images), expected)
        pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}
        changed = json.dumps({"model_cfg": config, "preprocess_cfg": pixels})
        (tmp_path / "open_clip_config.json").write_text(changed)
        mean, std = (torch.tensor(values)[:, None, None] for values in pixels.values())
        expected = theirs.encode_image((images - mean) / std, normalize=True)
        torch.testing.assert_close(CLIP(tmp_path).embed_images(images), expected)
        tokens = open_clip.SimpleTokenizer(context_length=12)(captions)
        expected = theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(clip.embed_text(captions), expected)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no model_cfg"):
        CLIP(tmp_path)
    wide = json.dumps({"model_cfg": {**config, "embed_dim": 7}})
    (tmp_path / "open_clip_config.json").write_text(wide)
    with pytest.raises(ValueError, match="do not fit their config"):
        CLIP(tmp_path)
