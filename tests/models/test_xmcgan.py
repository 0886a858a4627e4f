import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse
from golden import fill, hashes, waves

from fastxm import losses
from fastxm.models.xmcgan import XMCGAN, Discriminator, Generator, XMCGANConfig
from fastxm.nn import AttentionalModulation, SpectralConv2d, SpectralLinear, UpBlock
from fastxm.nn.blocks import Conv2d, upsample

TINY = {"image_size": 64, "gf": 4, "df": 4, "z_dim": 8, "cond_dim": 8, "text_width": 12}


class Letters(torch.nn.Module):
    """A text encoder whose features are waves that depend on the caption alone."""

    width = TINY["text_width"]

    def forward(self, captions):
        words = torch.stack([waves((5, self.width), 0.1 + len(c), 0.3) for c in captions])
        lengths = torch.tensor([min(5, 1 + len(c)) for c in captions])
        return SimpleNamespace(words=words, sentence=words.mean(1), lengths=lengths)


def tiny(**fields) -> XMCGAN:
    torch.manual_seed(0)
    model = XMCGAN(XMCGANConfig(**{**TINY, **fields}))
    model.attach(Letters())
    return model


def inputs(model: XMCGAN, batch: int = 3) -> tuple[torch.Tensor, ...]:
    text = Letters()(["a", "bcd", "ef"][:batch])
    return torch.randn(batch, model.config.z_dim), text.words, text.sentence, text.lengths


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


# the golden values come from running the released networks and losses (JAX) on the same patterns
GOLDEN = {"rtol": 1e-3, "atol": 1e-5}


def near(value: torch.Tensor, expected: list[float] | float) -> None:
    torch.testing.assert_close(value, torch.tensor(expected), **GOLDEN)


@pytest.fixture(scope="module")
def golden():
    """The network of the golden values after one training forward of both players."""
    model = fill(XMCGAN(XMCGANConfig(image_size=128, gf=8, df=8, text_width=768))).train()
    sentence, words = waves((2, 768), 1.3, 0.1), waves((2, 17, 768), 0.9, 0.2)
    text = (words, sentence, torch.tensor([9, 17]))
    z = waves((2, 128), 0.7, 0.3)
    real = (0.5 + 0.5 * waves((2, 128, 128, 3), 0.37, 0.5)).permute(0, 3, 1, 2)
    with torch.no_grad():
        fake = model.generator(z, *text)
        judged = model.discriminator(torch.cat([real, fake]), sentence)
        after = model.eval().generator(z, *text)
    return SimpleNamespace(fake=fake, judged=judged, after=after, words=words, lengths=text[2])


def test_golden_generator(golden):
    near(golden.fake.mean(), 0.331219)
    near(golden.fake.std(correction=0), 0.261932)
    near(golden.fake[0, :, 0, 0], [0.09745, 0.49628, 0.39915])
    near(golden.fake[1, :, 64, 64], [0.09325, 0.09723, 0.88041])


def test_golden_running_statistics(golden):
    near(golden.after.mean(), 0.610510)
    near(golden.after.std(correction=0), 0.306332)


def test_golden_discriminator_and_losses(golden):
    near(golden.judged.logits, [11.52909, 15.36889, 11.95152, 14.24262])
    regions, pooled = golden.judged.regions, golden.judged.pooled
    near(losses.region_word_loss(regions[2:], golden.words, golden.lengths), 4.69427)
    near(losses.region_word_loss(regions[:2], golden.words, golden.lengths), 4.65612)
    near(losses.nce(pooled[2:], golden.judged.sentence), 1.38725)
    near(losses.nce(pooled[:2], golden.judged.sentence), 1.39259)
    near(losses.nce(pooled[2:], pooled[:2]), 1.38702)


@pytest.mark.parametrize(
    ("size", "generator", "discriminator"),
    [(128, 78_507_779, 87_911_713), (256, 92_865_539, 99_415_585)],
)
def test_parameter_counts(size, generator, discriminator):
    config = XMCGANConfig(image_size=size, text_width=768)
    with torch.device("meta"):
        networks = Generator(config), Discriminator(config)
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [generator, discriminator]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    "options",
    [{}, {"attention": "per_layer", "first_layer": "z_sentence", "upsampling": "bilinear"}],
)
def test_shapes_and_gradients(size, options):
    model = tiny(image_size=size, **options)
    z, words, sentence, lengths = inputs(model, 2)
    fake = model.generator(z, words, sentence, lengths)
    assert fake.shape == (2, 3, size, size)
    assert fake.min() >= 0
    assert fake.max() <= 1
    judged = model.discriminator(torch.cat([fake, fake]), sentence)
    assert judged.logits.shape == (4,)
    assert judged.pooled.shape == (4, 64)
    assert judged.regions.shape == (4, 256, model.config.text_width)
    assert judged.sentence.shape == (2, 64)
    torch.testing.assert_close(judged.logits[:2], judged.logits[2:])
    loss = losses.region_word_loss(judged.regions[:2], words, lengths) + judged.logits.sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 3, 8, 8), (3, 4, 5, 9)])
def test_upsampling_convolution(shape, mode):
    layer = Conv2d(shape[1], 7, 3, up=mode)
    x, bias = torch.randn(shape), torch.randn(7)

    def ours(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    def formula(x, weight, bias):
        return F.conv2d(F.interpolate(x, scale_factor=2, mode=mode), weight, bias, padding=1)

    no_worse(ours, formula, x, layer.weight.detach(), bias)
    # sums of weights are rounded before they are multiplied
    gradients = (gradient(f, (0, 1, 2)) for f in (ours, formula))
    no_worse(*gradients, x, layer.weight, bias, factor=4.0)


def test_bilinear_skip_path_commutes():
    block, x = UpBlock(5, 3, "bilinear"), torch.randn(2, 5, 4, 4)
    upsampled = F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(upsample(block.skip(x), "bilinear"), block.skip(upsampled))


@pytest.mark.parametrize("down", [False, True])
def test_spectral_convolution(down):
    x, weight, bias = torch.randn(2, 5, 8, 6), torch.randn(7, 5, 3, 3), torch.randn(7)
    u = torch.randn(7)
    layer = SpectralConv2d(5, 7, 3, down=down)

    def ours(x, weight, bias):
        state = {"weight": weight, "bias": bias, "u": u.to(weight).clone()}
        return torch.func.functional_call(layer, state, (x,))

    def formula(x, weight, bias):
        w = weight.flatten(1)
        v = F.normalize(u.to(w) @ w.detach(), dim=0)
        sigma = F.normalize(w.detach() @ v, dim=0) @ w @ v
        y = F.conv2d(x, weight / sigma, bias, padding=1)
        return F.avg_pool2d(y, 2) if down else y

    no_worse(ours, formula, x, weight, bias)
    no_worse(gradient(ours, (0, 1, 2)), gradient(formula, (0, 1, 2)), x, weight, bias)


def test_power_iteration_finds_the_spectral_norm():
    layer = SpectralLinear(33, 17)
    before = layer.u.clone()
    layer.eval().normalised()
    assert torch.equal(layer.u, before)
    layer.train()
    for _ in range(300):
        layer.normalised()
    assert not torch.equal(layer.u, before)
    norm = torch.linalg.matrix_norm(layer.normalised().detach(), 2)
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-4, atol=0)


def test_modulation_is_the_convolution_of_the_attended_map():
    # the re-associated tables against the 1 x 1 convolution over [context; condition]
    layer = AttentionalModulation(6, 10, 5, [4, 3], sharpness=15.0)
    x, words, condition = torch.randn(2, 6, 4, 4), torch.randn(2, 5, 10), torch.randn(2, 5)
    lengths = torch.tensor([3, 5])
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}

    def ours(x, words, condition, *values):
        named = dict(zip(state, values))
        pairs = torch.func.functional_call(layer, named, (x, words, lengths, condition))
        return [gamma for gamma, _ in pairs] + [beta for _, beta in pairs]

    def formula(x, words, condition, query, query_bias, weight, bias):
        q = F.normalize(F.conv2d(x, query, query_bias), dim=1).flatten(2)
        w = F.normalize(words, dim=2)
        mask = torch.arange(5) < lengths[:, None]
        attention = (15 * w @ q).masked_fill(~mask[:, :, None], -1e9).softmax(1)
        context = (w.mT @ attention).unflatten(2, (4, 4))
        tiled = condition[:, :, None, None].expand(-1, -1, 4, 4)
        maps = F.conv2d(torch.cat([context, tiled], 1), weight[:, :, None, None], bias)
        return maps.split([4, 3, 4, 3], 1)

    no_worse(ours, formula, x, words, condition, *state.values())


def test_attention_options_differ():
    shared, own = tiny(), tiny(attention="per_layer")
    assert len(shared.generator.attentions) == 1
    assert len(own.generator.attentions) == len(shared.generator.attentions[0].tables.channels)
    z, words, sentence, lengths = inputs(own)
    pictures = own.generator(z, words, sentence, lengths)
    other = own.generator(z, words.flip(2), sentence, lengths)
    assert not torch.allclose(pictures, other)


def test_padding_is_not_attended_to():
    model = tiny()
    z, words, sentence, lengths = inputs(model)
    padding = torch.arange(words.shape[1]) >= lengths[:, None]
    assert padding.any()
    noisy = torch.where(padding[..., None], torch.randn_like(words), words)
    expected = model.generator(z, words, sentence, lengths)
    assert torch.equal(model.generator(z, noisy, sentence, lengths), expected)


def test_running_statistics_move_only_when_told():
    generator = tiny().train().generator
    given, before = inputs(tiny()), buffers(generator)
    held = generator(*given, update_stats=False)
    assert all(torch.equal(before[name], value) for name, value in generator.named_buffers())
    moved = generator(*given)
    assert torch.equal(held, moved)
    assert all(not torch.equal(before[name], value) for name, value in generator.named_buffers())


def test_compiles_without_a_graph_break():
    model, twin = tiny().train(), tiny().train()
    given = inputs(model)
    generator = torch.compile(model.generator, fullgraph=True, backend="aot_eager")
    discriminator = torch.compile(model.discriminator, fullgraph=True, backend="aot_eager")
    fake, expected = generator(*given), twin.generator(*given)
    torch.testing.assert_close(fake, expected)
    judged = discriminator([fake, fake.flip(3)], given[2])
    theirs = twin.discriminator([expected, expected.flip(3)], given[2])
    for ours, other in zip(judged, theirs):
        torch.testing.assert_close(ours.logits, other.logits)
    sum(output.logits.sum() for output in judged).backward()
    for (name, value), other in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(value, other, msg=name)


def test_autocast_keeps_statistics_and_pictures_wide():
    model = tiny().train()
    z, words, sentence, lengths = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        fake = model.generator(z, words, sentence, lengths)
        judged = model.discriminator(fake, sentence)
    assert fake.dtype == judged.logits.dtype == judged.pooled.dtype == torch.float32
    judged.logits.sum().backward()
    assert all(b.dtype == torch.float32 for b in model.buffers())
    assert all(p.grad.isfinite().all() for p in model.generator.parameters())


def test_double_precision():
    model = tiny().double()
    z, words, sentence, lengths = inputs(model)
    fake = model.generator(z.double(), words.double(), sentence.double(), lengths)
    assert fake.dtype == model.discriminator(fake, sentence.double()).logits.dtype == torch.float64


def test_generate_is_a_function_of_seed_and_caption():
    model = tiny().train()
    before = buffers(model)
    pictures = model.generate(["a", "bcd"], num_images=3, seed=7, batch_size=4)
    assert pictures.shape == (6, 3, 64, 64)
    assert model.training
    assert model.generator.training
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    alone = model.generate(["bcd"], num_images=2, seed=7, batch_size=1)
    torch.testing.assert_close(pictures[3:5], alone)
    assert torch.equal(alone, model.generate(["bcd"], num_images=2, seed=7, batch_size=1))
    assert not torch.allclose(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[3])
    assert not torch.allclose(alone, model.generate(["bcd"], num_images=2, seed=8))


class Multiplied(Letters):
    """An encoder with a matrix product, which autocast would round; it counts its captions."""

    def __init__(self):
        super().__init__()
        self.product, self.seen = torch.nn.Linear(self.width, self.width), []

    def forward(self, captions):
        self.seen += captions
        text = super().forward(captions)
        return SimpleNamespace(**{**vars(text), "words": self.product(text.words)})


def test_generate_encodes_each_caption_once_as_training_does():
    model, encoder, given = tiny(), Multiplied(), []
    model.attach(encoder)
    captions = ["a", "bcd", "ef"]
    with torch.no_grad():
        expected = encoder(captions)  # training encodes outside autocast
    encoder.seen.clear()
    model.generator.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1:]))
    model.generate(captions, num_images=2, batch_size=4, precision="bf16")
    assert encoder.seen == captions
    for found, name in zip(zip(*given), ("words", "sentence", "lengths")):
        assert torch.equal(torch.cat(found), getattr(expected, name).repeat_interleave(2, 0)), name


def test_generate_options():
    model = tiny()
    (picture,) = model.generate(["a"], seed=0, output="pil")
    assert picture.size == (64, 64)
    full, half = (model.generate(["a"], seed=0, precision=p) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.manual_seed(3)
    first = model.generate(["a"])
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(["a"]))


@pytest.mark.parametrize(
    ("captions", "options", "error"),
    [
        ([], {}, ValueError),
        ("a red apple", {}, TypeError),
        (["a", 3], {}, TypeError),
        (None, {}, TypeError),
        (["a"], {"num_images": 0}, ValueError),
        (["a"], {"batch_size": 0}, ValueError),
        (["a"], {"output": "jpeg"}, ValueError),
        (["a"], {"precision": "int8"}, ValueError),
    ],
)
def test_generate_refuses(captions, options, error):
    with pytest.raises(error):
        tiny().generate(captions, **options)


def test_encoder_of_another_width():
    with pytest.raises(ValueError, match="width 12"):
        tiny().attach(SimpleNamespace(width=13))


@pytest.mark.parametrize(
    "fields",
    [{"image_size": 96}, {"attention": "none"}, {"first_layer": "s"}, {"gf": 0}, {"sentence": ""}],
)
def test_config_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        XMCGANConfig(**fields)


def test_discriminator_refuses_a_ragged_batch():
    with pytest.raises(ValueError, match="3 images"):
        tiny().discriminator(torch.rand(3, 3, 64, 64), torch.randn(2, 12))


def test_saved_and_loaded(tmp_path):
    model = tiny(attention="per_layer").train()
    model.generator(*inputs(model))  # statistics that are not the first ones
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = XMCGAN.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    for (name, value), other in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(value, other), name
    loaded.attach(Letters())
    assert torch.equal(loaded.generate(["a"], seed=1), model.generate(["a"], seed=1))


def test_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("fastxm.models.pretrained.save_file", full)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_load_refuses_what_is_no_xmcgan(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        XMCGAN.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"model_type": "mirrorgan"}, "'mirrorgan'"),
        ({"depth": 3}, "depth"),
        ({"gf": 8}, "does not fit"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            XMCGAN.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="JSON"):
        XMCGAN.from_pretrained(tmp_path)


def test_damaged_weights(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        XMCGAN.from_pretrained(tmp_path)


def test_initial_kernels_are_glorot():
    torch.manual_seed(0)
    generator = Generator(XMCGANConfig(image_size=64, gf=8, df=8, text_width=64))
    tables = generator.attentions[0].tables
    for part, channels in zip(tables.weight.split(2 * tables.channels), 2 * tables.channels):
        expected = (2 / (channels + tables.in_features)) ** 0.5
        # the standard deviation of n normal numbers is off by 1 / sqrt(2 n); four of those
        assert abs(part.std() / expected - 1) < 4 / (2 * part.numel()) ** 0.5
    assert not generator.first.bias.any()
    assert hashes((2,)).dtype == torch.float32


def test_batches_judged_apart_are_judged_as_one():
    model, twin = tiny().train(), tiny().train()
    images, sentence = torch.rand(4, 3, 64, 64), torch.randn(2, 12)
    apart = model.discriminator(images.chunk(2), sentence)
    whole = twin.discriminator(images, sentence)
    for name in ("logits", "pooled", "regions"):
        joined = torch.cat([getattr(output, name) for output in apart])
        torch.testing.assert_close(joined, getattr(whole, name))
    for (name, value), other in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(value, other, msg=name)
    assert all(getattr(layer, "held", None) is None for layer in model.modules())


def test_a_generator_exported_for_any_batch():
    model = tiny().eval()
    given, fewer = inputs(model, 3), inputs(model, 2)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model.generator, given, dynamic_shapes=({0: batch},) * 4)
    torch.testing.assert_close(exported.module()(*fewer), model.generator(*fewer))


def test_a_generator_mapped_over_captions():
    model = tiny().eval()
    given = inputs(model)
    one = torch.func.vmap(lambda *row: model.generator(*(part[None] for part in row))[0])
    torch.testing.assert_close(one(*given), model.generator(*given))
