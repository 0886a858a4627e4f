"""Claim: every caption's features are there, encoded once, and an interruption leaves none."""

import pytest
import torch
from fixtures import CountingEncoder, write_folder

from fastxm.data import open_dataset, prepare, text_features
from fastxm.encoders import text_encoder


@pytest.fixture
def dataset(tmp_path):
    root = write_folder(tmp_path / "set", 8)
    return open_dataset(root, 8, cache_dir=tmp_path / "cache", progress=False)


def test_features_are_the_encoder_s(dataset):
    encoder = CountingEncoder()
    features = text_features(dataset, encoder, progress=False)
    for i, captions in enumerate(dataset.captions):
        for k, caption in enumerate(captions):
            batch = features.batch([features.row(i, k)])
            truth = encoder([caption])
            length = int(truth.lengths[0])
            assert batch["lengths"].tolist() == [length]
            assert batch["words"].shape == (1, 6, 4)
            assert batch["words"].dtype == batch["sentence"].dtype == torch.float32
            assert torch.equal(batch["words"][:, :length], truth.words[:, :length])
            assert (batch["words"][:, length:] == 0).all()
            assert torch.equal(batch["sentence"], truth.sentence)


def test_rows_of_many_at_once(dataset):
    features = text_features(dataset, CountingEncoder(), progress=False)
    images, numbers = torch.tensor([2, 0, 2]), torch.tensor([1, 0, 1])
    rows = features.row(images, numbers)
    assert rows.tolist() == [features.row(2, 1), features.row(0, 0), features.row(2, 1)]
    assert rows.tolist() == features.row(images.numpy(), numbers.numpy()).tolist()
    with pytest.raises(IndexError, match="caption number"):
        features.row(0, 2)


def test_encoded_once(dataset):
    for captions in dataset.captions:
        captions.append("a caption that all share")
    first, again = CountingEncoder(), CountingEncoder()
    features = text_features(dataset, first, progress=False)
    assert sorted(first.seen) == sorted({c for captions in dataset.captions for c in captions})
    assert len(features) == len(first.seen)
    assert features.row(0, 2) == features.row(1, 2)
    text_features(dataset, again, progress=False)
    assert again.seen == []


def test_an_interruption_leaves_none(dataset, monkeypatch):
    monkeypatch.setattr("fastxm.data.features.CHUNK", 3)
    with pytest.raises(KeyboardInterrupt):
        text_features(dataset, CountingEncoder(fail_after=6), progress=False)
    caches = dataset.cache_dir.parent
    assert list(caches.glob("*counting*/manifest.json")) == []
    encoder = CountingEncoder()
    text_features(dataset, encoder, progress=False)
    assert len(encoder.seen) == 2 * len(dataset)
    assert len(list(caches.glob("*counting*/manifest.json"))) == 1


def test_other_captions_or_encoder_are_other_features(dataset):
    text_features(dataset, CountingEncoder(), progress=False)
    longer = CountingEncoder()
    longer.name = "counting more"
    text_features(dataset, longer, progress=False)
    assert len(longer.seen) == 2 * len(dataset)
    dataset.captions[0][0] = "something else"
    changed = CountingEncoder()
    text_features(dataset, changed, progress=False)
    assert len(changed.seen) == 2 * len(dataset)


def test_prepare_mends_changed_features(tmp_path):
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    root = write_folder(tmp_path / "set", 30)
    splits = prepare(root, 8, CountingEncoder(), **options)
    count = sum(len(dataset) for dataset in splits.values())
    again = CountingEncoder()
    prepare(root, 8, again, **options)
    assert again.seen == []
    (words,) = (tmp_path / "cache").glob("*-train-counting-*/words.npy")
    words.write_bytes(words.read_bytes()[:-1] + b"\xff")
    prepare(root, 8, again, **options)
    assert len(again.seen) == 2 * len(splits["train"]) < 2 * count


def test_minilm(dataset):
    encoder = text_encoder("minilm", max_length=17)
    few = dataset.select([0, 1])
    few.captions[0] = ["a red apple", "word " * 10_000]
    features = text_features(few, encoder, progress=False)
    batch = features.batch([features.row(0, 0), features.row(0, 1)])
    assert batch["words"].shape == (2, 17, 384)
    assert batch["lengths"].tolist() == [5, 17]
    truth = encoder(["a red apple"])
    # stored in float16: half a unit of its last place, beside the encoder's own rounding
    torch.testing.assert_close(batch["words"][:1], truth.words, rtol=2**-11, atol=1e-5)
    torch.testing.assert_close(batch["sentence"][:1], truth.sentence, rtol=2**-11, atol=1e-5)
