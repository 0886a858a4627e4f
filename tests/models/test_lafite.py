import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golden import hashes, waves
from torch.autograd import gradgradcheck
from torch.nn import functional as F

from fastxm.models.lafite import Discriminator, Generator, LAFITEConfig, Mapping, Style

# the golden values come from running the released networks on the same patterns
GOLDEN = {"rtol": 1e-4, "atol": 1e-5}
TINY = {"image_size": 8, "embedding": 5, "z_dim": 4, "w_dim": 4, "mapping_layers": 1,
        "channel_base": 16, "channel_max": 3}  # fmt: skip


def near(value: torch.Tensor, expected: list[float] | float) -> None:
    torch.testing.assert_close(value, torch.tensor(expected), **GOLDEN)


@torch.no_grad()
def fill(network: torch.nn.Module) -> torch.nn.Module:
    """Golden weights; biases stay as they begin."""
    for module in network.modules():
        for name in ("weight", "const"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, torch.nn.Parameter):
                values = math.sqrt(3) * hashes(tensor.shape)
                tensor.copy_(values / getattr(module, "lr_multiplier", 1))
    return network


@pytest.fixture(scope="module")
def golden():
    config = LAFITEConfig(image_size=32, channel_base=512, channel_max=16)
    text = F.normalize(waves((4, 512), 1.3, 0.1), dim=1)
    generator, discriminator = fill(Generator(config)), fill(Discriminator(config))
    z, images = waves((4, 512), 0.7, 0.3), waves((4, 3, 32, 32), 0.37, 0.5)
    with torch.no_grad():
        return SimpleNamespace(
            w=generator.mapping(z),
            drawn=generator(z, text, noise="none"),
            judged=discriminator(images, text),
            quirk=fill(Discriminator(replace(config, logit="batch")))(images, text),
        )


def test_golden_generator(golden):
    near(golden.w[0, :4], [0.28224, 0.97195, -0.13274, -0.36355])
    near(golden.drawn.mean(), 1.096487)
    near(golden.drawn.std(correction=0), 1.769344)
    near(golden.drawn[0, :, 0, 0], [-0.13502, -0.63945, 0.26142])
    near(golden.drawn[3, :, 16, 16], [1.15828, -0.14219, 2.77022])


def test_golden_discriminator(golden):
    judged = golden.judged
    near(judged.realness, [-0.29667, -0.29882, -0.30040, -0.29915])
    near(judged.logits - judged.realness, [-0.06752, -0.08155, -0.08424, -0.07697])
    near(judged.semantic.norm(dim=1), [4.26687, 4.24855, 4.24940, 4.24177])
    near(golden.quirk.logits, [-0.60695, -0.60910, -0.61068, -0.60943])


def test_parameter_counts():
    config = LAFITEConfig()
    with torch.device("meta"):
        networks = Mapping(config), Generator(config), Discriminator(config)
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [2_101_248, 44_997_026, 29_126_785]
    assert networks[1].num_ws == 14
    blocks = [sum(p.numel() for p in block.parameters()) for block in networks[1].blocks]
    blocks[0] += networks[1].const.numel()
    assert blocks == [4_469_764, *[7_871_493] * 4, 4_396_293, 2_543_749]


def test_text_layers_learn_at_their_own_rate():
    fast, slow = (Generator(LAFITEConfig(**TINY, text_lr=rate)) for rate in (0.5, 0.01))
    slow.load_state_dict(fast.state_dict())
    for module in slow.modules():
        for layer in module.text if isinstance(module, Style) else ():
            layer.weight.data *= 0.5 / 0.01  # so that it is the same when used
    z, text = torch.randn(3, 4), F.normalize(torch.randn(3, 5), dim=1)
    drawn = [network(z, text, noise="none") for network in (fast, slow)]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)
    steps = []
    for network, picture in zip((fast, slow), drawn):
        layer = network.blocks[0].conv.style.text[0]
        before = layer.weight.detach() * layer.lr_multiplier
        picture.square().sum().backward()
        torch.optim.Adam(network.parameters(), 0.01).step()
        steps.append((layer.weight.detach() * layer.lr_multiplier - before).abs().max())
    torch.testing.assert_close(steps[0], 50 * steps[1], rtol=1e-2, atol=0)


def test_bad_text_lr():
    with pytest.raises(ValueError, match="text_lr is above 0"):
        LAFITEConfig(text_lr=0.0)


def test_texts_of_unit_mean_square():
    raw, unit = (Generator(LAFITEConfig(**TINY, text_scale=scale)) for scale in ("raw", "unit"))
    unit.load_state_dict(raw.state_dict())
    z, text = torch.randn(2, 4), F.normalize(torch.randn(2, 5), dim=1)
    drawn = unit(z, text, noise="none")
    longer = text * math.sqrt(5)
    torch.testing.assert_close(drawn, raw(z, longer, noise="none"))
    assert not torch.allclose(drawn, raw(z, text, noise="none"))


def test_noise_is_added_by_its_strength():
    generator = Generator(LAFITEConfig(**TINY))
    z, text = torch.randn(2, 4), torch.randn(2, 5)
    assert torch.equal(generator(z, text), generator(z, text, noise="none"))
    with torch.no_grad():
        generator.blocks[0].conv.noise_strength.fill_(1)
    assert not torch.equal(generator(z, text), generator(z, text))
    generator.eval()
    assert torch.equal(generator(z, text), generator(z, text))
    assert not torch.equal(generator(z, text), generator(z, text, noise="none"))
    plain = Generator(LAFITEConfig(**TINY, grain=False))
    plain.load_state_dict(generator.state_dict())
    for noise in (None, "random", "const"):
        assert torch.equal(plain(z, text, noise=noise), generator(z, text, noise="none"))


def test_the_whole_discriminator_under_r1():
    discriminator = Discriminator(LAFITEConfig(**TINY)).double()
    images = torch.randn(2, 3, 8, 8).double().requires_grad_()
    text = torch.randn(2, 5).double()
    weights = list(discriminator.parameters())
    assert gradgradcheck(lambda x, *_: discriminator(x, text).logits, (images, *weights), atol=1e-4)


def test_the_generator_under_path_length():
    generator = Generator(LAFITEConfig(**TINY)).double()
    ws = torch.randn(2, generator.num_ws, 4).double().requires_grad_()
    text = torch.randn(2, 5).double()
    weights = [p for name, p in generator.named_parameters() if not name.startswith("mapping")]
    assert gradgradcheck(
        lambda w, *_: generator.synthesis(w, text, noise="none")[:, :, ::3, ::3],
        (ws, *weights[-6:]),
        atol=1e-4,
    )


def test_compiled_whole():
    config = LAFITEConfig(**TINY)
    generator, discriminator = Generator(config), Discriminator(config)
    z, text, images = torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 3, 8, 8)
    for network, inputs in ((generator, (z, text)), (discriminator, (images, text))):
        found = torch.compile(network, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(found, network(*inputs))


def test_bfloat16_stays_near():
    config = LAFITEConfig(image_size=32, channel_base=512, channel_max=16)
    generator = fill(Generator(config))
    z, text = waves((4, 512), 0.7, 0.3), F.normalize(waves((4, 512), 1.3, 0.1), dim=1)
    with torch.no_grad():
        exact = generator(z, text, noise="none")
        with torch.autocast("cpu", torch.bfloat16):
            rounded = generator(z, text, noise="none")
    assert rounded.dtype == torch.float32
    # some ten layers, each of which rounds
    eps = torch.finfo(torch.bfloat16).eps
    assert (rounded - exact).std() < 10 * eps * exact.std()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 48}, "power of two"),
        ({"image_size": 4}, "power of two"),
        ({"logit": "mean"}, "logit is one of"),
        ({"w_dim": 0}, "w_dim is at least 1"),
        ({"channel_base": 4}, "channel_base"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        LAFITEConfig(**{**TINY, **fields})
