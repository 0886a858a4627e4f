"""MirrorGAN's networks: golden counts, attention to the words that are there, round trips."""

import json

import pytest
import torch
from eye import Eye

from fastxm.encoders.damsm import DAMSMConfig
from fastxm.encoders.stem import STEM, STEMConfig
from fastxm.models.mirrorgan import (
    Discriminator,
    Generator,
    GLAMConfig,
    GlobalLocalAttention,
    MirrorGAN,
    MirrorGANConfig,
    present,
)
from fastxm.models.stream import STREAM, STREAMConfig

VOCABULARY = ("red", "apple", "a", "green", "frog", "picture", "of")
CUB = tuple(f"w{i}" for i in range(5448))  # with the end and the unknown word 5,450


def config(vocabulary=VOCABULARY, **glam) -> MirrorGANConfig:
    small = {"image_size": 64, "gf": 4, "df": 4, "z_dim": 6, "cond_dim": 5, "blocks": 1}
    stem = STEMConfig(vocabulary, words=6, embedding=7, width=8)
    return MirrorGANConfig(
        GLAMConfig(**{**small, **glam}),
        DAMSMConfig(stem, region_width=3, image_width=12),
        STREAMConfig(VOCABULARY, words=6, embedding=5, hidden=6, image_width=12),
    )


def tiny(**glam) -> MirrorGAN:
    torch.manual_seed(0)
    model = MirrorGAN(config(**glam)).eval()
    for part in (model.damsm, model.stream):
        part._encoders["image"] = Eye()
    return model


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_golden_counts_of_birds():
    generator = Generator(GLAMConfig(), 256)
    assert count(generator) == 7_105_392
    assert count(generator.augmentation) == 102_800
    assert count(generator.first) == 6_444_928
    for stage in generator.next:
        assert count(stage) == 277_536
        assert count(stage.attention) == 12_448
        assert count(stage.join) == 6_144
        assert count(stage.blocks) == 221_952
        assert count(stage.up) == 36_992
    assert [count(layer) for layer in generator.to_rgb] == [864] * 3
    counts = [count(Discriminator(64, size, 256)) for size in (64, 128, 256)]
    assert counts == [6_313_730, 19_424_002, 71_858_946]
    first = Discriminator(64, 64, 256)
    assert count(first.trunk) == 2_757_376
    assert count(first.alone) == 8_193
    assert count(first.joint) + count(first.matched) == 3_548_161


def test_golden_counts_of_coco():
    with torch.device("meta"):
        assert count(Generator(GLAMConfig(gf=48, df=96, blocks=3), 256)) == 13_853_408
        counts = [count(Discriminator(96, size, 256)) for size in (64, 128, 256)]
    assert counts == [13_304_450, 42_800_258, 160_774_274]


def test_golden_counts_of_text_networks():
    assert count(STEM(STEMConfig(CUB))) == 2_075_320
    stream = STREAM(STREAMConfig(CUB))
    read_write = (stream.embedding, stream.lstm, stream.word)
    assert sum(map(count, read_write)) == 5_768_010


@pytest.mark.parametrize(
    ("size", "upsampling"), [(64, "nearest"), (64, "bilinear"), (128, "nearest")]
)
def test_shapes_and_gradients(size, upsampling):
    model = tiny(image_size=size, upsampling=upsampling).train()
    text = model.text_encoder(["a red apple", "frog"])
    drawn = model.generator(torch.randn(2, 11), *text)
    assert [tuple(x.shape) for x in drawn.images] == [(2, 3, s, s) for s in model.config.glam.sizes]
    assert model.config.glam.sizes == (size // 4, size // 2, size)
    assert drawn.mean.shape == drawn.log_var.shape == (2, 5)
    loss = drawn.log_var.sum()
    for network, images in zip(model.discriminators, drawn.images):
        assert 0 <= images.min() <= images.max() <= 1
        logits = network(images, text.sentence, text.sentence.roll(1, 0))
        assert [x.shape for x in logits] == [(2,)] * 3
        loss = loss + sum(x.sum() for x in logits)
    loss.backward()
    missing = [name for name, p in model.generator.named_parameters() if p.grad is None]
    assert missing == []


def attention(batch=2, side=4):
    torch.manual_seed(1)
    module = GlobalLocalAttention(3, 8, 5)
    return (
        module,
        torch.randn(batch, 3, side, side),
        torch.randn(batch, 6, 8),
        torch.randn(batch, 5),
    )


def by_hand(module, x, words, lengths, condition):
    """The attended words and sentence of each caption alone, without a mask at all."""
    found = []
    for f, w, n, s in zip(x, words, lengths.tolist(), condition):
        keys = w[:n] @ module.word.weight.T  # [n, C]
        f = f.flatten(1)  # [C, N]
        local = keys.T @ (keys @ f).softmax(0)
        v = module.sentence(s)[:, None]
        gate = (module.gate.weight.flatten(1) @ (f * v)).softmax(0)
        found.append(torch.cat([local, v * gate]).unflatten(1, x.shape[2:]))
    return torch.stack(found)


def test_attention_is_that_of_each_caption_alone():
    module, x, words, condition = attention()
    lengths = torch.tensor([6, 2])
    found = module(x, words, lengths, condition)
    torch.testing.assert_close(found, by_hand(module, x, words, lengths, condition))
    # what stands in the padding does not matter
    words[1, 2:] = 1e3
    torch.testing.assert_close(module(x, words, lengths, condition), found)
    last = module(x.contiguous(memory_format=torch.channels_last), words, lengths, condition)
    torch.testing.assert_close(last, found)


def test_the_released_mask_served_places_with_another_caption_s():
    """AttnGAN's and MirrorGAN's code repeats the mask as [b0, b1, b0, b1, ...], over rows that go
    [b0 place 0, b0 place 1, ...]: place r of the rows gets the mask of caption r mod B.
    """
    module, x, words, condition = attention()
    lengths = torch.tensor([6, 3])
    mask = ~present(words, lengths)  # [B, T], True where there is no word
    logits = (x.flatten(2).mT @ module.word(words).mT).flatten(0, 1)  # [B N, T]
    released = logits.masked_fill(mask.repeat(16, 1), -torch.inf).softmax(1)
    right = logits.masked_fill(mask.repeat_interleave(16, 0), -torch.inf).softmax(1)
    # every other place of the long caption loses words, of the short one attends to padding
    long, short = released.view(2, 16, 6)
    assert long[1::2, 3:].max() == 0
    assert long[0::2, 3:].min() > 0
    assert short[0::2, 3:].min() > 0
    assert short[1::2, 3:].max() == 0
    ours = module(x, words, lengths, condition)[:, :3].flatten(2).mT
    theirs, expected = (w.view(2, 16, 6) @ module.word(words) for w in (released, right))
    torch.testing.assert_close(ours, expected)
    assert (ours - theirs).abs().max() > 0.05


def test_a_caption_of_one_word_and_one_of_none():
    model = tiny()
    images = model.generate(["apple", "!?", "zebra", "a " * 50], seed=0)
    assert images.isfinite().all()
    # no word at all reads as one that is not known; what is beyond the limit is not read
    torch.testing.assert_close(images[1], images[2])
    torch.testing.assert_close(images[3], model.generate(["a a a a a a"], seed=0)[0])


def test_generate_is_a_function_of_seed_and_caption():
    model = tiny()
    captions = ["a red apple", "green frog"]
    first = model.generate(captions, num_images=2, seed=3)
    assert first.shape == (4, 3, 64, 64)
    torch.testing.assert_close(model.generate(captions[1:], num_images=2, seed=3), first[2:])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(model.generate(captions, seed=4)[0], first[0])
    described = model.redescribe(captions, seed=3, beams=2)
    assert len(described) == 2
    assert set(" ".join(described).split()) <= set(VOCABULARY)


def test_generate_repeats_in_training_and_leaves_every_part_in_its_mode():
    model = tiny().train()  # as it is built, with STEM's dropout
    model.stream.eval()
    modes = [module.training for module in model.modules()]
    first = model.generate(["a red apple"], seed=0)
    assert torch.equal(model.generate(["a red apple"], seed=0), first)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.eval().generate(["a red apple"], seed=0), first)


def test_saved_and_loaded(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = MirrorGAN.from_pretrained(tmp_path)
    assert again.config == model.config
    captions = ["a red apple"]
    torch.testing.assert_close(again.generate(captions, seed=1), model.generate(captions, seed=1))
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["stream"]["vocabulary"][0] = "blue"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="vocabularies of their own"):
        MirrorGAN.from_pretrained(tmp_path)


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"\(2 and 7 words, 1 shared\)"):
        config(vocabulary=("red", "blue"))


def test_text_of_unit_scale_counts_by_its_direction():
    model = tiny(text_scale="unit")
    text = model.text_encoder(["a red apple", "frog"])
    noise = torch.randn(2, 11)
    drawn = model.generator(noise, *text).images[2]
    louder = 7 * text.words, 3 * text.sentence, text.lengths
    torch.testing.assert_close(model.generator(noise, *louder).images[2], drawn)
    network, images = model.discriminators[2], drawn.detach()
    found = network(images, text.sentence)[1]
    torch.testing.assert_close(network(images, 3 * text.sentence)[1], found)
    raw = tiny()
    assert not torch.equal(
        raw.generator(noise, *louder).images[2], raw.generator(noise, *text).images[2]
    )


@pytest.mark.parametrize(
    "fields",
    [{"text_scale": "big"}, {"image_size": 32}, {"gf": 0}, {"upsampling": "cubic"}, {"blocks": 0}],
)
def test_config_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        GLAMConfig(**fields)


def test_compiles_without_a_graph_break():
    model = tiny()
    text = model.text_encoder(["a red apple", "frog"])
    noise = torch.randn(2, 11)
    compiled = torch.compile(model.generator, backend="eager", fullgraph=True)
    drawn = model.generator(noise, *text).images[2].detach()
    torch.testing.assert_close(compiled(noise, *text).images[2], drawn)
    network = model.discriminators[2]
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(drawn, text.sentence), network(drawn, text.sentence)):
        torch.testing.assert_close(ours, theirs)
