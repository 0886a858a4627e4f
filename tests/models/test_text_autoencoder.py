"""The text autoencoder: the released networks' counts, masking, its loss, saving, bad input."""

import json

import pytest
import torch
from torch.nn import functional as F

from fastxm.data.vocabulary import END, Vocabulary
from fastxm.data.word_vectors import word_vectors
from fastxm.models.text_autoencoder import TextAutoencoder, TextAutoencoderConfig, text_loss

WORDS = ("a", "red", "green", "apple", "frog", "on", "the", "moon")
CAPTIONS = ["a red apple", "frog", "the green frog on the moon", "a frog on the moon"]


def small(**fields) -> TextAutoencoder:
    torch.manual_seed(0)
    made = {"vocabulary": WORDS, "words": 7, "word_width": 6, "code": 8, **fields}
    return TextAutoencoder(TextAutoencoderConfig(**made)).eval()


def test_parameter_counts_of_the_released_networks():
    words = tuple(f"w{i}" for i in range(50))
    with torch.device("meta"):
        model = TextAutoencoder(TextAutoencoderConfig(vocabulary=words))
    counts = [
        sum(p.numel() for p in part.parameters())
        for part in (model.encoder, model.decoder, model.output)
    ]
    assert counts == [60_800, 80_800, 101 * 52]


def test_a_code_does_not_depend_on_the_batch():
    model = small()
    alone = torch.cat([model.embed([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(model.embed(CAPTIONS), alone)
    assert alone.min() < 0
    assert alone.abs().max() < 1


def test_the_released_code_s_padding_has_zeros_in_the_maximum():
    masked, reference = small(), small(padding="reference")
    longest = [len(c.split()) == 6 for c in CAPTIONS]
    expected = masked.embed(CAPTIONS).clamp(min=0)
    expected[longest] = masked.embed(CAPTIONS)[longest]
    torch.testing.assert_close(reference.embed(CAPTIONS), expected)


def test_the_code_is_the_maximum_over_words_and_end_of_both_directions():
    model = small()
    tokens, _ = model.vocabulary.encode(["a red apple"], 3)
    words = model.words(F.pad(tokens, (0, 1), value=END))
    out, _ = model.encoder(words)
    torch.testing.assert_close(model.embed(["a red apple"]), out.amax(1))


def by_hand(model: TextAutoencoder, caption: str, truth: bool) -> torch.Tensor:
    """Sum of the surprises of one caption's words and end; the decoder reads truth or itself."""
    tokens, _ = model.tokens([caption])
    h = model.embed([caption])
    c, word, total = torch.zeros_like(h), model.start[None], torch.zeros(())
    for token in tokens[0]:
        h, c = model.decoder(word, (h, c))
        p = model.output(h).softmax(1)[0]
        total = total - p[token].log()
        word = model.words(token if truth else p.argmax())[None]
    return total


@pytest.mark.parametrize(("forced", "truth"), [(0.0, False), (1.0, True)])
def test_the_loss_is_the_mean_surprise_of_words_and_ends(forced, truth):
    model = small()
    logits, said = model(*model.tokens(CAPTIONS), forced)
    loss, accuracy = text_loss(logits, said)
    count = sum(len(c.split()) + 1 for c in CAPTIONS)
    assert len(said) == count
    expected = sum(by_hand(model, caption, truth) for caption in CAPTIONS) / count
    torch.testing.assert_close(loss, expected)
    assert accuracy == (logits.argmax(1) == said).sum() / count


def test_it_learns_to_say_captions_again():
    model = small(code=24).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(150):
        loss, _ = text_loss(*model(*model.tokens(CAPTIONS), 0.5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.say(model.embed(CAPTIONS)) == CAPTIONS


def test_every_parameter_takes_part():
    model = small()
    text_loss(*model(*model.tokens(CAPTIONS)))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_it_is_read_as_it_was_saved(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocabulary"] == list(WORDS)
    again = TextAutoencoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.embed(CAPTIONS), model.embed(CAPTIONS))


def test_bad_input_is_refused():
    model = small()
    with pytest.raises(TypeError, match="a list of captions"):
        model.embed("a red apple")
    with pytest.raises(ValueError, match=r"codes are \[N, 8\], not \(2, 3\)"):
        model.say(torch.zeros(2, 3))
    for field, value in {"words": 0, "word_width": 0, "code": 7, "padding": "none"}.items():
        with pytest.raises(ValueError, match=field):
            TextAutoencoderConfig(**{field: value})
    assert model.embed([]).shape == (0, 8)
    assert len(model.say(model.embed(["", "a word that nobody knows " * 9]))) == 2


def test_word_vectors_are_read_by_word(tmp_path):
    path, vocabulary = tmp_path / "glove.txt", Vocabulary(WORDS)
    path.write_text("frog 1 2 3\nnobody 7 7 7\nred -1 0.5 0\n")
    vectors, found = word_vectors(path, vocabulary, 3)
    assert found == 2
    assert vectors.shape == (len(vocabulary), 3)
    assert vectors[vocabulary.number["frog"]].tolist() == [1, 2, 3]
    assert vectors[vocabulary.number["red"]].tolist() == [-1, 0.5, 0]
    assert vectors.isfinite().all()
    with pytest.raises(ValueError, match="vectors of 3 numbers, not 4"):
        word_vectors(path, vocabulary, 4)
    with pytest.raises(ValueError, match="none of the"):
        word_vectors(path, Vocabulary(["elsewhere"]), 3)
    with pytest.raises(FileNotFoundError):
        word_vectors(tmp_path / "none.txt", vocabulary, 3)
