"""XMC-GAN's two-step update against one written out here; precision, compiling, resuming."""

import copy
import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import Letters, recipe
from torch import nn
from torch.nn import functional as F

from fastxm import XMCGAN, encoders
from fastxm.training import checkpoint, gan, xmcgan
from fastxm.training.batches import split
from fastxm.training.trainer import LoopConfig, train


@pytest.fixture
def double():
    # in float64 the first step of Adam, a sign, does not hang on rounding where a gradient is 0
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def first(ours: xmcgan.XMCGANRecipe) -> dict:
    """The first batch, in the default dtype."""
    whole = next(iter(ours.batches))
    for name in ("image", "words", "sentence"):
        whole[name] = whole[name].to(torch.get_default_dtype())
    return whole


def batches(ours: xmcgan.XMCGANRecipe) -> list[dict]:
    """Its parts."""
    return split(first(ours), ours.config.d_steps_per_g)


def values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def changed(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, x in network.state_dict().items() if not torch.equal(x, before[name])}


def same(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()))


def contrast(a, b):
    """Cross-entropy of cosines over 0.1, both ways, summed."""
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.1
    return crossed(scores)


def crossed(scores):
    target = torch.arange(len(scores))
    return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)


def word_contrast(regions, words, lengths):
    scores = torch.zeros(len(words), len(regions))
    for t, n in enumerate(lengths.tolist()):
        w = words[t, :n]
        for i, r in enumerate(F.normalize(regions, dim=2)):
            attention = (5 * F.normalize(w, dim=1) @ r.T).softmax(1)
            scores[t, i] = 10 * (5 * F.cosine_similarity(w, attention @ r)).logsumexp(0)
    return crossed(scores)


def losses(out, batch):
    """Both totals of the paper, from what the discriminator says."""
    (real, fake), (h_real, h_fake) = out.logits.chunk(2), out.pooled.chunk(2)
    r_real, r_fake = out.regions.chunk(2)
    text = batch["words"], batch["lengths"]
    d = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    d = d + word_contrast(r_real, *text) + contrast(h_real, out.sentence)
    g = -fake.mean() + word_contrast(r_fake, *text) + contrast(h_fake, out.sentence)
    return d, g + contrast(h_fake, h_real)


def test_the_discriminator_s_own_step(folder, double):
    ours = recipe(folder)
    ours.build()
    batch = batches(ours)[0]
    generator = values(ours.model.generator)
    expected = copy.deepcopy(ours.model)
    optimizer = torch.optim.Adam(expected.discriminator.parameters(), 4e-4, (0.5, 0.999))

    state = torch.get_rng_state()
    ours.discriminator_step(batch)
    torch.set_rng_state(state)

    text = batch["words"], batch["sentence"], batch["lengths"]
    with torch.no_grad():
        fake = expected.generator(torch.randn(4, 4), *text)
    out = expected.discriminator(torch.cat([batch["image"], fake]), batch["sentence"])
    losses(out, batch)[0].backward()
    optimizer.step()
    same(ours.model.discriminator, expected.discriminator)
    assert changed(ours.model.generator, generator) == set()
    assert changed(expected.generator, generator)  # running statistics, which ours discards


def test_the_joint_step_takes_both_gradients_before_either_update(folder, double):
    ours = recipe(folder)
    ours.build()
    batch = batches(ours)[1]
    expected = copy.deepcopy(ours.model)

    state = torch.get_rng_state()
    metrics = ours.joint_step(batch)
    torch.set_rng_state(state)

    text = batch["words"], batch["sentence"], batch["lengths"]
    fake = expected.generator(torch.randn(4, 4), *text)
    out = expected.discriminator(torch.cat([batch["image"], fake]), batch["sentence"])
    d, g = losses(out, batch)
    torch.testing.assert_close(metrics["loss_d"], d, check_dtype=False)
    torch.testing.assert_close(metrics["loss_g"], g, check_dtype=False)
    for network, loss, lr in ((expected.discriminator, d, 4e-4), (expected.generator, g, 1e-4)):
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        for parameter, gradient in zip(network.parameters(), gradients):
            parameter.grad = gradient
        network.optimizer = torch.optim.Adam(network.parameters(), lr, (0.5, 0.999))
    expected.discriminator.optimizer.step()
    expected.generator.optimizer.step()
    same(ours.model.discriminator, expected.discriminator)
    same(ours.model.generator, expected.generator)


def test_updates_that_share_their_fakes(folder, double):
    ours = recipe(folder, d_steps_per_g=2, share_fakes=True)
    ours.build()
    whole = first(ours)
    alone, joint = split(whole, 2)
    expected = copy.deepcopy(ours.model)
    optimizer = torch.optim.Adam(expected.discriminator.parameters(), 4e-4, (0.5, 0.999))
    generator = expected.generator

    state = torch.get_rng_state()
    metrics = ours.step(whole)
    torch.set_rng_state(state)

    fake = generator(torch.randn(4, 4), joint["words"], joint["sentence"], joint["lengths"])
    sentences = torch.cat([alone["sentence"], joint["sentence"]])
    out = expected.discriminator(torch.cat([alone["image"], fake.detach()]), sentences)
    real, drawn = out.logits.chunk(2)
    d = F.relu(1 - real).mean() + F.relu(1 + drawn).mean()
    d = d + word_contrast(out.regions[:4], alone["words"], alone["lengths"])
    (d + contrast(out.pooled[:4], out.sentence[:4])).backward()
    optimizer.step()
    out = expected.discriminator(torch.cat([joint["image"], fake]), joint["sentence"])
    d, g = losses(out, joint)
    torch.testing.assert_close(metrics["loss_d"], d, check_dtype=False)
    torch.testing.assert_close(metrics["loss_g"], g, check_dtype=False)
    assert changed(ours.model.generator, values(generator))  # it was updated once, after all


@pytest.mark.parametrize(("d_steps", "alone"), [(1, 0), (2, 1), (3, 2)])
def test_the_schedule(folder, monkeypatch, d_steps, alone):
    ours = recipe(folder, d_steps_per_g=d_steps)
    ours.build()
    calls, indices = [], []
    for name in ("discriminator_step", "joint_step"):
        real = getattr(ours, name)

        def noted(batch, *fakes, name=name, real=real):
            calls.append(name)
            indices.extend(batch["index"].tolist())
            return real(batch, *fakes)

        monkeypatch.setattr(ours, name, noted)
    batch = next(iter(ours.batches))
    ours.step(batch)
    assert calls == ["discriminator_step"] * alone + ["joint_step"]
    assert indices == batch["index"].tolist()
    assert ours.images_per_step == 4 * d_steps
    assert ours.ema.updates == 1
    buffers = dict(ours.model.generator.named_buffers())
    for name, buffer in ours.ema.network.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_weights_of_the_losses(folder):
    ours = recipe(folder, word_weight=0.5, sentence_weight=2.0, image_weight=0.0)
    ours.build()
    metrics = ours.joint_step(batches(ours)[1])
    assert "g_image" not in metrics
    for p in "dg":
        parts = metrics[f"{p}_gan"] + 0.5 * metrics[f"{p}_word"] + 2 * metrics[f"{p}_sentence"]
        torch.testing.assert_close(metrics[f"loss_{p}"], parts)


def test_the_generator_first_learns_by_the_pixels(folder, monkeypatch, double):
    ours = recipe(folder, pixel_steps=2, pixel_weight=3.0, d_steps_per_g=2, d_warmup=5)
    ours.build()
    network, drawn = ours.model.generator, []
    plain = copy.deepcopy(network)
    adam = torch.optim.Adam(plain.parameters(), ours.config.lr_g, (0.5, 0.999))
    judge = values(ours.model.discriminator)
    real = torch.nn.Module.__call__

    def noted(module, *inputs, **options):
        if module is network:
            drawn.append(inputs)
        return real(module, *inputs, **options)

    for step in range(1, 3):
        batch = first(ours)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "__call__", noted)
            metrics = ours.step(batch)
        fake, picture = plain(*drawn[-1]), split(batch, 2)[1]["image"]
        cells = [
            x.unflatten(2, (16, -1)).unflatten(4, (16, -1)).mean((3, 5)) for x in (fake, picture)
        ]
        pixels = (fake - picture).abs().mean() + (cells[0] - cells[1]).abs().mean()
        expected = {"loss_g": 3 * pixels.detach(), "g_pixel": pixels.detach()}
        torch.testing.assert_close(metrics, expected)
        adam.zero_grad()
        (3 * pixels).backward()
        adam.step()
        same(network, plain)
        assert ours.ema.updates == step
    assert not changed(ours.model.discriminator, judge)
    metrics = ours.step(first(ours))
    assert changed(ours.model.discriminator, judge)
    step_size = ours.players["discriminator"].optimizer.param_groups[0]["lr"]
    assert step_size == pytest.approx(ours.config.lr_d / 5)
    parts = [metrics[f"g_{name}"] for name in ("gan", "word", "sentence", "image", "pixel")]
    torch.testing.assert_close(metrics["loss_g"], sum(parts) + 2 * parts[-1])


def test_the_discriminator_warms_up(folder):
    ours, state = recipe(folder, d_warmup=4, lr_d=4e-4), None
    ours.build()
    sizes = []
    for _, batch in zip(range(6), ours.batches):
        if len(sizes) == 2:  # as if resumed
            state = copy.deepcopy(ours.state_dict())
            ours = recipe(folder, d_warmup=4, lr_d=4e-4)
            ours.build()
            ours.load_state_dict(state)
        ours.step(batch)
        sizes.append(ours.players["discriminator"].optimizer.param_groups[0]["lr"])
    assert sizes == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])
    assert ours.players["generator"].optimizer.param_groups[0]["lr"] == ours.config.lr_g


@pytest.mark.parametrize("loss", ["word", "sentence", "image"])
def test_a_loss_of_weight_0_is_left_out(folder, loss):
    ours = recipe(folder, **{f"{loss}_weight": 0.0})
    ours.build()
    metrics = ours.step(next(iter(ours.batches)))
    assert f"g_{loss}" not in metrics
    assert all(torch.isfinite(value) for value in metrics.values())


def test_the_pretrained_network_is_named_and_missed_before_all_else(folder, monkeypatch):
    asked = []
    given = lambda source, **options: asked.append((source, options)) or nn.Identity()  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(xmcgan, "image_encoder", given)
        recipe(folder, pretrained_weight=1.0, pretrained_encoder="r.pth").build()
    assert asked == [("r.pth", {"image_size": 224})]
    with pytest.raises(FileNotFoundError, match=r"or a file, not absent\.pth"):
        recipe(folder / "none", pretrained_weight=1.0, pretrained_encoder="absent.pth").build()


def test_the_pretrained_loss_reaches_the_generator(folder, monkeypatch):
    class Frozen(nn.Module):
        def logits(self, images):
            return images.flatten(1)[:, ::97]

    monkeypatch.setattr(xmcgan, "image_encoder", lambda *_, **__: Frozen())
    ours = recipe(folder, pretrained_weight=3.0)
    ours.build()
    batch = batches(ours)[1]
    seen = []
    monkeypatch.setattr(ours, "generate", lambda batch, **_: seen[0])
    seen.append(torch.rand(4, 3, 64, 64, requires_grad=True))
    judged = ours.judge(batch, seen[0])
    total, parts = ours.generator_loss(*judged, batch, seen[0])
    theirs, real = seen[0].flatten(1)[:, ::97], batch["image"].flatten(1)[:, ::97]
    torch.testing.assert_close(parts["g_pretrained"], contrast(theirs, real))
    ours.features = None
    without, _ = ours.generator_loss(*judged, batch, seen[0])
    torch.testing.assert_close(total, without + 3 * parts["g_pretrained"])
    (gradient,) = torch.autograd.grad(parts["g_pretrained"], seen)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(folder, precision):
    ours = recipe(folder, precision=precision, augment="color,translation,cutout", flip=True)
    ours.build()
    before = values(ours.model)
    for _, batch in zip(range(12), ours.batches):  # fp16 first finds its scale
        metrics = ours.step(batch)
        assert all(torch.isfinite(value) for value in metrics.values())
    assert all(parameter.dtype == torch.float32 for parameter in ours.model.parameters())
    assert len(changed(ours.model, before)) > len(before) / 2


def test_fp16_skips_an_update_that_overflowed(folder):
    ours = recipe(folder, precision="fp16")
    ours.build()
    before, network = values(ours.model.discriminator), ours.model.discriminator
    scale = ours.scaler.scale(torch.ones(()))
    gradients = tuple(torch.full_like(p, float("inf")) for p in network.parameters())
    ours.update({"discriminator": gradients})
    assert changed(network, before) == set()
    assert ours.scaler.scale(torch.ones(())) == scale / 2


def test_compiled_without_a_graph_break_it_computes_the_same(folder, monkeypatch, double):
    plain, compiled = recipe(folder), recipe(folder, compile=True)
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)  # the whole graph, without generating code
    runs = []
    for ours in (plain, compiled):
        ours.build()
        runs.append(ours.joint_step(batches(ours)[1]))
    torch.testing.assert_close(runs[0], runs[1])
    same(plain.model, compiled.model)


def test_gradients_of_another_memory_order_update_the_same(folder):
    updated = []
    for order in (torch.contiguous_format, torch.channels_last):
        ours = recipe(folder)
        ours.build()
        network = ours.players["generator"].network
        torch.manual_seed(0)
        gradients = [torch.randn(p.shape) for p in network.parameters()]
        gradients = [g.contiguous(memory_format=order) if g.ndim == 4 else g for g in gradients]
        ours.update({"generator": tuple(gradients)})
        updated.append(network)
    for a, b in zip(updated[0].parameters(), updated[1].parameters()):
        assert torch.equal(a, b)


def test_samples_and_export_are_of_the_average(folder, tmp_path):
    ours = recipe(folder, ema_decay=0.9)
    ours.build()
    ours.step(next(iter(ours.batches)))
    state, before = torch.get_rng_state(), values(ours.model)
    first, second = ours.sample(), ours.sample()
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (3, 3, 64, 64)
    ours.export(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert changed(ours.model, before) == set()
    exported = XMCGAN.from_pretrained(tmp_path / "model")
    same(exported.generator, ours.ema.network)
    same(exported.discriminator, ours.model.discriminator)
    assert changed(exported.generator, values(ours.model.generator))


def test_killed_it_resumes_to_the_same_metrics(folder, tmp_path):
    steps, out = 12, tmp_path / "killed"
    loop = LoopConfig(steps=steps, log_every=2, sample_every=4, checkpoint_every=3)
    whole = train(recipe(folder, augment="color"), tmp_path / "whole", loop)
    command = [sys.executable, str(Path(__file__).with_name("small.py")), folder, out, str(steps)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(out / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train(recipe(folder, augment="color"), out, loop, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (whole.out / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (whole.model / name).read_bytes()


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    loop = LoopConfig(steps=1)
    train(recipe(folder), tmp_path / "run", loop)
    other = recipe(folder)
    other.config = replace(other.config, model=replace(other.config.model, gf=4))
    with pytest.raises(ValueError, match=r"another run: model\.gf was 2, now 4"):
        train(other, tmp_path / "run", loop, resume=True)


def test_a_checkpoint_of_other_pictures_is_refused(folder, tmp_path):
    loop = LoopConfig(steps=1)
    train(recipe(folder), tmp_path / "run", loop)
    for i in range(0, 16, 2):
        (folder / f"{i}.png").unlink()
    with pytest.raises(ValueError, match="the checkpoint was trained with other pictures"):
        train(recipe(folder), tmp_path / "run", LoopConfig(steps=2), resume=True)


def test_it_learns_from_the_sentences_that_it_samples_with(folder, monkeypatch):
    asked = []

    def opened(name, **options):
        asked.append((name, options))
        return Letters()

    for home in (xmcgan, encoders):
        monkeypatch.setattr(home, "text_encoder", opened)
    ours = recipe(folder)
    ours.config = replace(ours.config, model=replace(ours.config.model, sentence="reference"))
    ours.build()
    assert ours.model.text_encoder
    assert asked[0] == asked[1]
    assert asked[0][1] == {"max_length": 5, "sentence": "reference"}


def test_pictures_of_a_folder_may_be_stretched(folder, tmp_path):
    for path in folder.glob("*.png"):
        Image.linear_gradient("L").resize((64, 128)).save(path)
    found = {}
    for resize in ("crop", "stretch"):
        ours = recipe(folder, resize=resize)
        ours.build()
        found[resize] = ours.batches.dataset.image(0)
    assert found["stretch"].amin() < 0.05 < 0.2 < found["crop"].amin()
    later = {"resize", "pixel_weight", "pixel_steps", "pretrained_encoder"}
    assert not later & recipe(folder).identity().keys()  # as in checkpoints of before
    kept = checkpoint.save(tmp_path / "kept", 1, recipe(folder).identity(), {}, 1)
    with pytest.raises(ValueError, match="resize was None, now 'stretch'"):
        checkpoint.check(kept, ours.identity())


def test_text_features_must_fit_the_model(folder):
    ours = recipe(folder)
    ours.config = replace(ours.config, model=replace(ours.config.model, text_width=7))
    with pytest.raises(ValueError, match="has text_width 6, the configuration 7"):
        ours.build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"lr_g": -1.0}, "lr_g must be above 0, not -1.0"),
        ({"pixel_weight": -0.5}, "pixel_weight must be at least 0, not -0.5"),
        ({"word_weight": float("nan")}, "word_weight must be at least 0, not nan"),
        ({"sentence_weight": -3.0}, "sentence_weight must be at least 0, not -3.0"),
        ({"pixel_steps": -1}, "pixel_steps must be at least 0, not -1"),
        ({"ema_decay": 2.0}, r"ema_decay is in \[0, 1\), not 2.0"),
        ({"pixel_steps": 9}, "9 pixel_steps need a pixel_weight above 0"),
        ({"device": "tpu9"}, "device is auto, cpu or cuda, not 'tpu9'"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        xmcgan.XMCGANRecipe(xmcgan.XMCGANTraining(**fields))


@pytest.mark.parametrize("own", ["own", "live"])
def test_statistics_beside_the_average(folder, own):
    ours = recipe(folder, ema_statistics=own)
    ours.build()
    for _, batch in zip(range(2), ours.batches):
        ours.step(batch)
    live = dict(ours.model.generator.named_buffers())
    network, before = ours.average(), torch.get_rng_state()
    moved = {name for name, x in network.named_buffers() if not torch.equal(x, live[name])}
    assert moved == ({name for name in live if "running" in name} if own == "own" else set())
    assert not network.training
    if own == "own":  # the first layer that normalises sees the mean of what it is given
        seen = []
        hook = network.blocks[0].norm1.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        for inputs in ours.random_inputs(gan.STATISTICS):
            network(*inputs)
        hook.remove()
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
        torch.testing.assert_close(network.blocks[0].norm1.running_mean, mean)
    assert torch.equal(before, torch.get_rng_state())
