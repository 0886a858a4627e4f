import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golden import hashes, waves
from torch.autograd import gradgradcheck
from torch.nn import functional as F

from fastxm.models.lafite import (
    LAFITE,
    Discriminator,
    Generator,
    LAFITEConfig,
    Mapping,
    ProjectedDiscriminator,
    Style,
)

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


PROJECTED = {**TINY, "discriminator": "projected", "head_width": 2, "picture_width": 2}


@pytest.fixture(scope="module")
def projected():
    torch.manual_seed(0)
    return ProjectedDiscriminator(LAFITEConfig(**PROJECTED))


def test_the_projected_discriminator_judges_at_four_scales_and_the_picture(projected):
    images, text = torch.rand(3, 3, 8, 8) * 2 - 1, F.normalize(torch.randn(3, 5), dim=1)
    judged = projected(images, text)
    assert judged.logits.shape == judged.realness.shape == (3, 5)
    assert judged.semantic.shape == (3, 5)
    # the mean over heads of the text's part is the text's product with the mean feature
    matched = (judged.logits - judged.realness).mean(1)
    torch.testing.assert_close(matched, (judged.semantic * text).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "strides"), [(64, (2, 4, 8, 16)), (128, (4, 8, 16, 32))])
def test_its_heads_are_on_the_four_coarsest_maps_that_have_places_enough(size, strides):
    network = ProjectedDiscriminator(LAFITEConfig(**PROJECTED, image_encoder_size=size))
    seen = []
    network.heads.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    network(torch.rand(1, 3, 8, 8), torch.randn(1, 5))
    assert [x.shape[2] for x in seen] == [size // stride for stride in strides]


def test_its_frozen_part_never_learns_and_is_not_saved(projected):
    projected.train()
    images = (torch.rand(2, 3, 8, 8) * 2 - 1).requires_grad_()
    judged = projected(images, torch.randn(2, 5))
    frozen = projected.image_encoder
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    (judged.logits.sum() + judged.semantic.square().sum()).backward()
    assert images.grad is not None
    assert images.grad.abs().amax((1, 2, 3)).gt(0).all()
    assert all(p.grad is not None and p.grad.any() for p in projected.heads.parameters())
    assert not any(p.grad is not None for p in frozen.parameters())
    shared = {tensor.data_ptr() for tensor in frozen.state_dict().values()}
    assert all(name.startswith("heads.") for name in projected.state_dict())
    assert shared.isdisjoint(tensor.data_ptr() for tensor in projected.state_dict().values())


def test_a_projected_model_is_saved_with_its_mixing(tmp_path):
    model = LAFITE(LAFITEConfig(**PROJECTED)).eval()
    model.save_pretrained(tmp_path)
    other = LAFITE.from_pretrained(tmp_path)
    assert other.config == model.config
    images, text = torch.rand(2, 3, 8, 8), torch.randn(2, 5)
    for ours, theirs in zip(model.discriminator(images, text), other.discriminator(images, text)):
        assert torch.equal(ours, theirs)


def test_the_batch_s_logit_of_a_projected_discriminator(projected):
    batch = ProjectedDiscriminator(LAFITEConfig(**{**PROJECTED, "logit": "batch"}))
    batch.load_state_dict(projected.state_dict())
    images, text = torch.rand(3, 3, 8, 8), torch.randn(3, 5)
    ours, theirs = (network.eval()(images, text) for network in (projected, batch))
    own = ours.logits - ours.realness
    whole = own.sum(0).expand(3, 5)
    torch.testing.assert_close(theirs.logits - theirs.realness, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"discriminator": "patch"}, "discriminator is one of"),
        ({"image_encoder_size": 96}, "image_encoder_size is a power of two from 64 on"),
        ({"image_encoder_size": 32}, "image_encoder_size is a power of two from 64 on"),
        ({"head_width": 0}, "head_width is at least 1"),
        ({"picture_width": -1}, "picture_width is at least 0"),
    ],
)
def test_bad_projected_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        LAFITEConfig(**{**PROJECTED, **fields})
