"""MirrorGAN's stages and its update, against one written out here; resuming; other vocabularies."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from eye import Eye
from PIL import Image
from torch.nn import functional as F

import fastxm.encoders
from fastxm import DAMSM, STREAM, MirrorGAN
from fastxm.encoders.damsm import DAMSMConfig
from fastxm.encoders.stem import STEMConfig
from fastxm.models.mirrorgan import GLAMConfig
from fastxm.models.stream import STREAMConfig
from fastxm.training.captions import hide
from fastxm.training.damsm import DAMSMRecipe, DAMSMTraining
from fastxm.training.mirrorgan import MirrorGANRecipe, MirrorGANTraining, stages_before
from fastxm.training.stream import STREAMRecipe, STREAMTraining
from fastxm.training.trainer import LoopConfig, train

LOOP = LoopConfig(steps=2, log_every=1, sample_every=2, checkpoint_every=1)


@pytest.fixture(autouse=True)
def eye(monkeypatch):
    monkeypatch.setattr(fastxm.encoders, "image_encoder", lambda *_, **__: Eye())


def damsm(folder, **fields) -> DAMSMRecipe:
    model = DAMSMConfig(STEMConfig(words=5, embedding=4, width=6), region_width=3, image_width=12)
    plain = {"data": str(folder), "image_size": 64, "batch_size": 4, "device": "cpu", "loop": LOOP}
    return DAMSMRecipe(DAMSMTraining(model=model, **{**plain, **fields}))


def stream(folder, **fields) -> STREAMRecipe:
    model = STREAMConfig(words=5, embedding=4, hidden=6, image_width=12)
    plain = {"data": str(folder), "image_size": 64, "batch_size": 4, "device": "cpu", "loop": LOOP}
    return STREAMRecipe(STREAMTraining(model=model, **{**plain, **fields}))


@pytest.fixture
def stages(folder, tmp_path):
    """Finished runs of both stages."""
    for name, make in (("damsm", damsm), ("stream", stream)):
        made = make(folder)
        train(made, tmp_path / name, made.config.loop)
    return {name: str(tmp_path / name) for name in ("damsm", "stream")}


def recipe(folder, stages, **fields) -> MirrorGANRecipe:
    model = GLAMConfig(image_size=64, gf=2, df=2, z_dim=4, cond_dim=4, blocks=1)
    plain = {"batch_size": 4, "precision": "fp32", "samples": 3, "device": "cpu", "loop": LOOP}
    return MirrorGANRecipe(
        MirrorGANTraining(model=model, data=str(folder), **{**plain, **stages, **fields})
    )


@pytest.mark.parametrize("make", [damsm, stream])
def test_a_stage_learns_and_leaves_its_model(folder, tmp_path, make):
    loop = LoopConfig(steps=60, log_every=20, sample_every=60, checkpoint_every=60)
    made = make(folder, lr=0.02, loop=loop, unknown=0.1)
    made.build()
    batches = iter(made.batches)
    losses = [made.step(next(batches))["loss"].item() for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    figures = made.held_out()
    assert all(torch.tensor(value).isfinite() for value in figures.values())
    made.export(tmp_path)
    kind = {"damsm": DAMSM, "stream": STREAM}[made.system]
    again = kind.from_pretrained(tmp_path)
    assert again.config == made.model.config
    assert "red" in made.vocabulary.words


@pytest.mark.parametrize("make", [damsm, stream])
def test_a_stage_without_a_cache_sees_the_same(folder, make):
    found = []
    for cache in (True, False):
        made = make(folder, cache=cache)
        made.build()
        found.append(made.step(next(iter(made.batches)))["loss"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("make", [damsm, stream])
def test_a_resumed_stage_is_the_unbroken_one(folder, tmp_path, make):
    whole = train(make(folder, unknown=0.2), tmp_path / "whole", LOOP)
    train(make(folder, unknown=0.2), tmp_path / "parts", replace(LOOP, steps=1))
    again = train(make(folder, unknown=0.2), tmp_path / "parts", LOOP, resume=True)
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    last = [(run.out / "held_out.jsonl").read_text().splitlines()[-1] for run in (whole, again)]
    assert last[0] == last[1]
    # taken up once more where it ended, it writes the same once more, and not twice
    ended = (again.out / "held_out.jsonl").read_bytes()
    train(make(folder, unknown=0.2), tmp_path / "parts", LOOP, resume=True)
    assert (again.out / "held_out.jsonl").read_bytes() == ended


@pytest.mark.parametrize("make", [damsm, stream])
def test_an_image_encoder_of_another_width_is_refused(folder, make):
    made = make(folder)
    made.config = replace(made.config, model=replace(made.config.model, image_width=13))
    with pytest.raises(ValueError, match=r"image_width 12, the configuration.* 13"):
        made.build()


def test_hidden_words_are_unknown_and_padding_is_not():
    tokens, lengths = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]]), torch.tensor([3, 1])
    assert hide(tokens, lengths, 1.0).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert torch.equal(hide(tokens, lengths, 0.0), tokens)


def test_the_learning_rate_falls_with_each_pass(folder):
    made = damsm(folder, lr=1.0, lr_decay=0.5, lr_min=0.2)
    made.build()
    (group,) = made.players["damsm"].optimizer.param_groups
    seen = []
    for batch, _ in zip(made.batches, range(12)):
        made.step(batch)
        seen.append(group["lr"])
    each = len(made.batches.dataset) / 4
    assert seen == [max(0.5 ** int(k / each), 0.2) for k in range(1, 13)]


@pytest.fixture
def double():
    # in float64 the steps of Adam, nearly signs, do not hang on rounding where a gradient is 0
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(player, network, optimizer) -> None:
    """Weights, statistics, and the gradients that the optimisers remember."""
    options = {"rtol": 1e-6, "atol": 1e-7, "check_dtype": False}
    found, theirs = dict(player.network.state_dict()), dict(network.state_dict())
    torch.testing.assert_close(found, theirs, **options)
    found, theirs = (o.state_dict()["state"] for o in (player.optimizer, optimizer))
    torch.testing.assert_close(found, theirs, **options)


def matched(regions, words, lengths, image, sentence, labels):
    """DAMSM's word and sentence losses (AttnGAN, eqs. 7 to 14), gammas of 4, 5 and 10."""
    rows = []
    for text, length in zip(words, lengths):
        s = torch.einsum("brd,td->brt", regions, text[:length])
        attention = (4 * s.softmax(2)).softmax(1)
        context = torch.einsum("brt,brd->btd", attention, regions)
        cosines = F.cosine_similarity(context, text[:length].expand_as(context), dim=2)
        rows.append((5 * cosines).exp().sum(1).log())
    cosines = F.cosine_similarity(image[:, None], sentence, dim=2)
    target = torch.arange(len(labels))
    alike = (labels[:, None] == labels) & (target[:, None] != target)
    both = [(10 * s).masked_fill(alike, -torch.inf) for s in (torch.stack(rows), cosines)]
    return [F.cross_entropy(s, target) + F.cross_entropy(s.T, target) for s in both]


def prepared(ours, steps):
    """As many batches as steps, their pictures in the default dtype; what is drawn comes again."""
    for batch, _ in zip(ours.batches, range(steps)):
        batch["image"] = batch["image"].double()
        state = torch.get_rng_state()
        ours.step(batch)
        torch.set_rng_state(state)
        yield batch


def test_updates_of_damsm(folder, double):
    made = damsm(folder, cache=False)
    made.build()
    made.labels = made.labels % 2  # so that pictures of a batch are of one concept
    plain = copy.deepcopy(made.model)
    adam = torch.optim.Adam(plain.parameters(), 2e-3, (0.5, 0.999))
    for step, batch in enumerate(prepared(made, 5), 1):
        maps = Eye().features(batch["image"])
        text = plain.stem.read(batch["tokens"], batch["lengths"])
        regions, image = plain.project(maps[0].flatten(2).mT, maps[1].flatten(1))
        labels = made.labels[batch["index"]]
        assert len(labels.unique()) < 4
        losses = matched(regions, text.words, text.lengths, image, text.sentence, labels)
        adam.zero_grad()
        sum(losses).backward()
        gradients = [p.grad for p in plain.stem.parameters()]
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 0.25
        for g in gradients:
            g.mul_(0.25 / norm)
        adam.param_groups[0]["lr"] = 2e-3 * 0.98 ** (step * 4 // 13)  # of 13 pictures
        adam.step()
        same(made.players["damsm"], plain, adam)


def test_updates_of_stream(folder, double):
    made = stream(folder, cache=False)
    made.build()
    plain = copy.deepcopy(made.model)
    adam = torch.optim.Adam(plain.parameters(), 1e-3, (0.9, 0.999))
    assert plain.norm.momentum == 0.01
    for batch in prepared(made, 5):
        seen = plain.norm(plain.image(Eye()(batch["image"])))
        total = torch.zeros(())
        for start, tokens, length in zip(seen, batch["tokens"], batch["lengths"]):
            words = plain.embedding(tokens[:length])
            states, _ = plain.lstm(torch.cat([start[None], words]))
            said = F.pad(tokens[:length], (0, 1))  # the end is word 0
            total = total + F.cross_entropy(plain.word(states), said, reduction="sum")
        adam.zero_grad()
        (total / (batch["lengths"] + 1).sum()).backward()
        adam.step()
        same(made.players["stream"], plain, adam)


def bce(logits, target):
    return F.binary_cross_entropy(logits.sigmoid(), torch.full_like(logits, target))


def test_the_losses_are_the_published_ones(folder, stages):
    ours = recipe(folder, stages, stream_weight=3.0, damsm_weight=2.0, kl_weight=0.5)
    ours.build()
    batch = next(iter(ours.batches))
    assert len(set(ours.labels[batch["index"]].tolist())) == 4  # so that all other texts are wrong
    _, sentence, lengths = text = ours.text(batch)
    drawn = ours.generator(torch.randn(4, 8), *text)
    for i, real in enumerate(ours.pyramid(batch["image"])):
        d, fake = ours.model.discriminators[i], drawn.images[i].detach()
        expected = (bce(d(real)[0], 1.0) + bce(d(real, sentence)[1], 1.0)) / 2
        wrong = bce(d(fake)[0], 0.0) + bce(d(fake, sentence)[1], 0.0)
        wrong = wrong + bce(d(real, sentence[[3, 0, 1, 2]])[1], 0.0)
        found = ours.discriminator_loss(i, real, fake, sentence, batch)
        torch.testing.assert_close(found, expected + wrong / 3)
    expected = torch.zeros(())
    for d, images in zip(ours.model.discriminators, drawn.images):
        expected = expected + bce(d(images)[0], 1.0) + bce(d(images, sentence)[1], 1.0)
    mean, log_var = drawn.mean, drawn.log_var
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_var).exp()),
        torch.distributions.Normal(0.0, 1.0),
    ).mean()
    whole = Eye()(drawn.images[2])
    nll = ours.model.stream.nll(whole, batch["tokens"], lengths)
    surprise = nll.sum() / (lengths.sum() + 4)
    loss, parts = ours.generator_loss(drawn, text, batch)
    torch.testing.assert_close(parts["stream"], surprise)
    total = expected + 0.5 * kl + 3 * surprise + 2 * (parts["word"] + parts["sentence"])
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("fields", [{}, {"damsm_weight": 5.0}])
def test_updates_of_mirrorgan(folder, stages, double, fields):
    ours = recipe(folder, stages, **fields)
    ours.build()
    if fields:
        ours.labels = ours.labels % 2
    plain = copy.deepcopy(ours.model)
    networks = dict(zip(("generator", "discriminator-16", "discriminator-32", "discriminator-64"),
                        (plain.generator, *plain.discriminators)))  # fmt: skip
    adams = {
        name: torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999))
        for name, network in networks.items()
    }
    average = {name: p.detach().clone() for name, p in plain.generator.named_parameters()}

    def descend(name, loss):
        adams[name].zero_grad()
        loss.backward(inputs=list(networks[name].parameters()), retain_graph=True)
        adams[name].step()

    for batch in prepared(ours, 2):
        words, sentence, lengths = text = plain.damsm.stem.read(batch["tokens"], batch["lengths"])
        drawn, labels = plain.generator(torch.randn(4, 8), *text), ours.labels[batch["index"]]
        other = labels != labels.roll(1)
        assert other.any()
        assert other.all() != bool(fields)
        for side, fake in zip((16, 32, 64), drawn.images):
            judge, real = networks[f"discriminator-{side}"], batch["image"]
            if side < 64:
                real = F.interpolate(real, (side, side), mode="bilinear", antialias=True)
            # real pictures go through once: batch normalisation keeps what it has seen
            alone, right, wrong = judge(real, sentence, sentence.roll(1, 0))
            fake_alone, beside = judge(fake.detach(), sentence)
            loss = (bce(alone, 1.0) + bce(right, 1.0)) / 2
            loss = loss + (bce(fake_alone, 0.0) + bce(beside, 0.0) + bce(wrong[other], 0.0)) / 3
            descend(f"discriminator-{side}", loss)
        mean, log_var = drawn.mean, drawn.log_var
        loss = -0.5 * (1 + log_var - mean**2 - log_var.exp()).mean()
        for judge, images in zip(plain.discriminators, drawn.images):
            loss = loss + sum(bce(logits, 1.0) for logits in judge(images, sentence))
        maps = Eye().features(drawn.images[-1])
        nll = plain.stream.nll(maps[1].flatten(1), batch["tokens"], lengths)
        loss = loss + 20 * nll.sum() / (lengths + 1).sum()
        if fields:
            regions, image = plain.damsm.project(maps[0].flatten(2).mT, maps[1].flatten(1))
            loss = loss + 5 * sum(matched(regions, words, lengths, image, sentence, labels))
        descend("generator", loss)
        for name, network in networks.items():
            same(ours.players[name], network, adams[name])
        for name, p in plain.generator.named_parameters():
            average[name] = 0.999 * average[name] + 0.001 * p.detach()
    torch.testing.assert_close(dict(ours.ema.network.named_parameters()), average)


def test_wrong_pairs_are_of_other_concepts(folder, stages):
    ours = recipe(folder, stages)
    ours.build()
    batch = next(iter(ours.batches))
    text = ours.text(batch)
    fake = torch.rand(4, 3, 16, 16)
    real = ours.pyramid(batch["image"])[0]
    ours.labels = torch.zeros_like(ours.labels)  # all of one concept: there is no wrong pair
    d, sentence = ours.model.discriminators[0], text[1]
    alone, matched = d(real, sentence)
    expected = (bce(alone, 1.0) + bce(matched, 1.0)) / 2
    expected = expected + sum(bce(logits, 0.0) for logits in d(fake, sentence)) / 3
    found = ours.discriminator_loss(0, real, fake, sentence, batch)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream_weight": 0.0},
        {"damsm_weight": 1.0},
        {"precision": "bf16", "damsm_weight": 1.0},
        {"precision": "fp16"},
    ],
)
def test_a_step_moves_every_player_and_no_frozen_network(folder, stages, fields):
    ours = recipe(folder, stages, **fields)
    ours.build()
    before = {k: v.clone() for k, v in ours.model.state_dict().items()}
    metrics = ours.step(next(iter(ours.batches)))
    assert ("stream" in metrics) == (fields.get("stream_weight") != 0)
    assert ("word" in metrics) == ("damsm_weight" in fields)
    moved = {
        k.split(".")[0] for k, v in ours.model.state_dict().items() if not torch.equal(v, before[k])
    }
    assert moved == {"generator", "discriminators"}
    sheet = ours.sample().images
    assert sheet.shape == (3, 3, 64, 3 * 64)


def test_texts_are_read_in_float32_whoever_asks(folder, stages, monkeypatch):
    # a CPU may have no LSTM of bfloat16
    ours = recipe(folder, stages, precision="bf16", ema_statistics="own")
    ours.build()
    read, low = ours.text, []
    watched = lambda batch: low.append(torch.is_autocast_enabled("cpu")) or read(batch)  # noqa: E731
    monkeypatch.setattr(ours, "text", watched)
    ours.step(next(iter(ours.batches)))
    ours.sample()
    assert len(low) > 1
    assert not any(low)


def test_compiled_without_a_graph_break_it_computes_the_same(folder, stages, monkeypatch):
    plain, compiled = recipe(folder, stages), recipe(folder, stages, compile=True)
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)  # the whole graph, without generating code
    runs = []
    for ours in (plain, compiled):
        ours.build()
        batch = next(iter(ours.batches))
        runs.append([ours.step(batch) for _ in range(2)])
    torch.testing.assert_close(runs[0], runs[1])


def test_a_resumed_run_is_the_unbroken_one(folder, stages, tmp_path):
    fields = {"augment": "translation", "ema_statistics": "own", "damsm_weight": 1.0}
    whole = train(recipe(folder, stages, **fields), tmp_path / "whole", LOOP)
    train(recipe(folder, stages, **fields), tmp_path / "parts", replace(LOOP, steps=1))
    again = train(recipe(folder, stages, **fields), tmp_path / "parts", LOOP, resume=True)
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    model = MirrorGAN.from_pretrained(whole.model)
    assert model.generate(["a red picture"], seed=0).shape == (1, 3, 64, 64)


def test_stages_before_have_the_seed_and_the_pictures_of_the_gan(folder, tmp_path):
    ours = replace(recipe(folder, {}).config, resize="stretch", seed=7, stages="birds")
    made = [stage.recipe().config for stage in stages_before(ours, tmp_path)]
    assert [(each.seed, each.resize) for each in made] == [(7, "stretch")] * 2
    assert [each.data for each in made] == [str(folder)] * 2


def test_a_stage_sees_pictures_as_it_is_told_and_goes_on_as_before(cache, tmp_path):
    (tmp_path / "wide").mkdir()
    for i in range(4):
        picture = Image.linear_gradient("L").resize((64, 128))
        picture.save(tmp_path / "wide" / f"{i}.png")
        (tmp_path / "wide" / f"{i}.txt").write_text(f"number {i}\n")
    seen = []
    for resize in ("crop", "stretch"):
        made = damsm(tmp_path / "wide", batch_size=2, resize=resize)
        made.build()
        seen.append(made.batches.dataset.image(0)[0, :, 0])
        # a checkpoint from before says nothing of it
        assert ("resize" in made.identity()) == (resize == "stretch")
    assert seen[0][0] > 0.2 > seen[1][0]


def test_other_stages_are_refused(folder, stages, tmp_path):
    run = train(recipe(folder, stages), tmp_path / "run", LOOP)
    other = damsm(folder, seed=1)
    train(other, tmp_path / "other", LOOP)
    with pytest.raises(ValueError, match="other weights of damsm or stream"):
        train(
            recipe(folder, {**stages, "damsm": str(tmp_path / "other")}),
            run.out,
            replace(LOOP, steps=3),
            resume=True,
        )
    with pytest.raises(FileNotFoundError, match="no model in"):
        recipe(folder, {**stages, "stream": str(tmp_path / "absent")}).build()
    with pytest.raises(ValueError, match="is of model type 'damsm', not 'stream'"):
        recipe(folder, {**stages, "stream": stages["damsm"]}).build()


def test_other_vocabularies_are_refused(folder, stages, tmp_path):
    words = ("one", "two")
    for name, make in (("damsm", damsm), ("stream", stream)):
        made = make(folder)
        model = made.config.model
        if name == "damsm":
            model = replace(model, stem=replace(model.stem, vocabulary=words))
        else:
            model = replace(model, vocabulary=words)
        made.config = replace(made.config, model=model)
        train(made, tmp_path / f"other-{name}", LOOP)
    with pytest.raises(ValueError, match="vocabularies of their own"):
        recipe(folder, {**stages, "stream": str(tmp_path / "other-stream")}).build()
    theirs = {name: str(tmp_path / f"other-{name}") for name in stages}
    with pytest.raises(ValueError, match="know 0 of the"):
        recipe(folder, theirs).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr_d": 0.0}, "lr_d must be above 0"),
        ({"stream_weight": -1.0}, "stream_weight must be at least 0"),
        ({"ema_decay": 2.0}, r"ema_decay is in \[0, 1\), not 2.0"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MirrorGANTraining(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_count": 0}, "min_count must be at least 1"),
        ({"unknown": 1.0}, r"unknown is a share in \[0, 1\)"),
        ({"flip": True}, "are not cached: --no-cache"),
    ],
)
def test_bad_settings_of_a_stage_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DAMSMTraining(**fields)
