"""Text encoders: what a caption becomes, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from fastxm.encoders import text_encoder

CAPTIONS = ["a red apple", "an apple which is red", "a green car", "", "word " * 10000]


@pytest.fixture(scope="module")
def minilm():
    return text_encoder("minilm", max_length=17)


def test_lengths_count_both_ends_and_are_cut(minilm):
    batch = minilm(CAPTIONS)
    assert batch.lengths.tolist() == [5, 7, 5, 2, 17]
    assert batch.lengths.dtype == torch.int64
    assert batch.words.shape == (5, 17, minilm.width)
    assert batch.sentence.shape == (5, minilm.width)
    assert batch.words.dtype == batch.sentence.dtype == torch.float32


def test_sentence_is_the_mean_of_the_words_there(minilm):
    batch = minilm(CAPTIONS)
    for words, sentence, length in zip(*batch):
        torch.testing.assert_close(words[:length].mean(0), sentence)
        assert not words[length:].any()


def test_reference_sentence_sums_padding(minilm):
    reference = text_encoder("minilm", max_length=17, sentence="reference")
    batch, clean = reference(CAPTIONS), minilm(CAPTIONS)
    assert batch.words[0, 5:].any()
    torch.testing.assert_close(batch.words.sum(1) / batch.lengths[:, None], batch.sentence)
    # a caption that fills every slot has the same sentence both ways
    torch.testing.assert_close(batch.sentence[4], clean.sentence[4])
    assert not torch.allclose(batch.sentence[0], clean.sentence[0])
    assert reference.name != minilm.name


def test_meaning_is_kept(minilm):
    red, also_red, green = F.normalize(minilm(CAPTIONS[:3]).sentence)
    assert red @ also_red > 0.9
    assert red @ green < 0.4


def test_a_caption_does_not_depend_on_its_batch(minilm):
    alone, together = minilm(CAPTIONS[:1]), minilm(CAPTIONS)
    assert F.cosine_similarity(alone.sentence, together.sentence[:1]).item() > 0.99999


def test_is_frozen(minilm):
    minilm.train()
    assert not any(module.training for module in minilm.modules())
    assert not minilm(["a cat"]).sentence.requires_grad


def test_bad_input_is_one_clear_error(minilm, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="list of captions"):
        minilm("a red apple")
    with pytest.raises(ValueError, match="max_length"):
        text_encoder("minilm", max_length=2)
    with pytest.raises(ValueError, match="masked_mean, reference"):
        text_encoder("minilm", sentence="first")
    with pytest.raises(FileNotFoundError, match="holds no text encoder"):
        text_encoder(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="give its local directory"):
        text_encoder("nobody/nothing")


def test_no_captions(minilm):
    assert minilm([]).words.shape == (0, 17, minilm.width)


def test_any_bert_from_a_directory(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=20,
    )
    BertModel(config).save_pretrained(tmp_path)
    encoder = text_encoder(tmp_path, max_length=6)
    batch = encoder(["a red apple", "a blue red red apple"])
    assert encoder.width == 32
    assert batch.lengths.tolist() == [5, 6]
    with pytest.raises(ValueError, match="3 to 20"):
        text_encoder(tmp_path, max_length=21)
    config.hidden_size = 64
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit their config"):
        text_encoder(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="are damaged"):
        text_encoder(tmp_path)
