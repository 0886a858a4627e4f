"""LAFITE's and VDL's steps: who moves in which stage, resuming, captions that are not there."""

import functools
import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import COLOURS
from small_joint import LOOP, built, lafite, moved, state, vdl
from torch.nn import functional as F

from fastxm import VDL
from fastxm.data.leak_free import leak_free, told
from fastxm.encoders.dual import DualEncoder, DualEncoderConfig
from fastxm.models.lafite import LAFITE
from fastxm.models.vdl import VDLConfig
from fastxm.nn.directions import draw_noise
from fastxm.training import checkpoint, joint_data
from fastxm.training import config as configs
from fastxm.training.joint_data import Corpus
from fastxm.training.trainer import train
from fastxm.training.vdl import VDLTraining

pytestmark = pytest.mark.usefixtures("cache")


def test_stage_1_is_lafite_to_the_bit(data, clip):
    ours, theirs = built(vdl(data, clip)), built(lafite(data, clip))
    shared = {k: v for k, v in ours[0].model.state_dict().items() if "heads" not in k}
    theirs[0].model.load_state_dict(shared)
    found = []
    for recipe, batch in (ours, theirs):
        torch.manual_seed(5)
        found.append([recipe.step(batch) for _ in range(2)])
    for a, b in zip(*found):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_who_moves_in_which_stage(data, clip):
    recipe, batch = built(vdl(data, clip))
    model, seen = recipe.model, []
    frozen = state(recipe.encoder)
    for _ in range(7):
        before = {name: state(part) for name, part in model.named_children()}
        stage, _ = recipe.stage()
        metrics = recipe.step(batch)
        seen.append((stage, {n for n, part in model.named_children() if moved(part, before[n])}))
        assert all(value.isfinite() for value in metrics.values())
    both = {"generator", "discriminator"}
    assert (
        seen
        == [("adversarial", both)] * 2
        + [("posterior", {"posterior_heads"})] * 3
        + [("refinement", both)] * 2
    )
    assert not moved(recipe.encoder, frozen)


def test_joint_stage_moves_all_but_the_prior(data, clip):
    recipe, batch = built(vdl(data, clip, schedule="joint", adversarial_steps=1))
    recipe.step(batch)
    before = {name: state(part) for name, part in recipe.model.named_children()}
    metrics = recipe.step(batch)
    still = {n for n, part in recipe.model.named_children() if not moved(part, before[n])}
    assert still == {"prior_heads"}
    assert {"kl", "loss_q", "loss_g", "loss_d"} <= set(metrics)


def test_the_joint_stage_loses_what_its_own_drawings_lose(data, clip):
    found, slopes = [], []
    for kx, lc in ((0.0, 0.0), (3.0, 5.0)):
        weights = {"reconstruction_weight": kx, "alignment_weight": lc}
        options = {"schedule": "joint", "adversarial_steps": 0, "prior_share": 0.0}
        recipe, batch = built(vdl(data, clip, **options, **weights))
        recipe.update = slopes.append
        torch.manual_seed(1)
        metrics, (_, fake) = recipe.generator_update(batch)
        found.append((metrics, fake))
    (plain, fake), (whole, same) = found
    assert torch.equal(fake, same)  # nothing is drawn for it
    torch.testing.assert_close(whole["q_text"], whole["g_encoder"])
    more = 3 * whole["q_picture"] + 5 * whole["q_text"]
    torch.testing.assert_close(whole["loss_g"], plain["loss_g"] + more)
    assert not {"q_picture", "q_text"} & set(plain)
    for player in ("posterior", "generator"):
        assert any(not torch.allclose(*pair) for pair in zip(*(s[player] for s in slopes)))


def test_drawings_are_held_to_their_pictures_after_stage_1(data, clip):
    recipe, batch = built(vdl(data, clip, picture_weight=2.0, posterior_steps=1))
    found = [set(recipe.step(batch)) for _ in range(4)]
    assert ["g_picture" in metrics for metrics in found] == [False, False, False, True]
    assert configs.preset("vdl", "coco-256")["picture_weight"] > 0


def test_the_reconstruction_s_gradient_reaches_the_posterior_and_no_encoder(data, clip):
    recipe, batch = built(vdl(data, clip))
    q = recipe.posterior(batch)
    text = q.sample(draw_noise(4, 6))
    seen = recipe.see(recipe.draw_pictures(recipe.model.condition(text)))
    loss = (1 - (seen * batch["embedding"]).sum(1)).mean()
    last = recipe.model.posterior_heads.shift[-1].weight
    assert torch.autograd.grad(loss, last)[0].any()
    assert not any(p.requires_grad for p in recipe.encoder.parameters())


def test_captions_move_the_prior_too(data, clip):
    recipe, batch = built(vdl(data, clip, label_fraction=1.0, adversarial_steps=1))
    recipe.step(batch)
    before = state(recipe.model.prior_heads)
    metrics = recipe.step(batch)
    assert moved(recipe.model.prior_heads, before)
    assert {"log_q", "log_p"} <= set(metrics)


def taught(data, clip, **weights):
    """What 60 steps of the posterior on captions log."""
    steps = {"adversarial_steps": 1, "posterior_steps": 60, "posterior_lr": 1e-2}
    recipe, batch = built(vdl(data, clip, label_fraction=1.0, **steps, **weights))
    recipe.step(batch)
    return [recipe.step(batch) for _ in range(60)]


def test_supervision_turns_posterior_and_prior_to_the_captions(data, clip):
    found = taught(data, clip, supervision_weight=10.0, ranking_weight=0.0)
    for name in ("log_q", "log_p"):
        assert found[-1][name] > found[0][name] + 0.5
    assert "rank_q" not in found[0]


def test_ranking_tells_the_captions_apart(data, clip):
    found = taught(data, clip, supervision_weight=0.0, ranking_weight=10.0)
    for name in ("rank_q", "rank_p"):
        assert found[-1][name] < found[0][name] - 0.2


def test_captions_alone_may_teach_the_posterior_first(data, clip, monkeypatch):
    options = {"adversarial_steps": 0, "reconstruction_weight": 0.0, "alignment_weight": 0.0}
    recipe, batch = built(vdl(data, clip, label_fraction=1.0, posterior_steps=2, **options))
    assert recipe.stage() == ("posterior", 0)
    before = state(recipe.model.posterior_heads)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "draw_pictures", None)  # nothing is drawn
        assert {"loss_q", "kl", "rank_q"} <= set(recipe.step(batch))
        recipe.step(batch)
    assert moved(recipe.model.posterior_heads, before)
    assert recipe.stage() == ("refinement", 0)
    assert "loss_g" in recipe.step(batch)


def test_the_ranking_is_cross_entropy_over_the_batch_s_texts(data, clip):
    recipe, _ = built(vdl(data, clip, label_fraction=1.0, supervision_batch=5))
    torch.manual_seed(3)
    loss, parts = recipe.supervision()
    torch.manual_seed(3)
    pairs = recipe.batches.embeddings.pairs(5)
    noise = draw_noise(5, 6)
    for name, found in (
        ("q", recipe.posterior(pairs)),
        ("p", recipe.model.prior(pairs["embedding"])),
    ):
        logits = found.sample(noise) @ pairs["text"].T / recipe.encoder.temperature
        same = pairs["index"][:, None] == pairs["index"]
        own = torch.where(same, logits, -torch.inf).logsumexp(1)
        torch.testing.assert_close(parts[f"rank_{name}"], (logits.logsumexp(1) - own).mean())
        torch.testing.assert_close(parts[f"log_{name}"], found.log_density(pairs["text"]).mean())
    expected = sum(parts[f"rank_{n}"] - 4 * parts[f"log_{n}"] / 6 for n in "qp")
    torch.testing.assert_close(loss, expected)


def test_pairs_are_of_labelled_pictures(data, clip):
    recipe, _ = built(vdl(data, clip, label_fraction=0.5))
    embeddings = recipe.batches.embeddings
    assert 0 < embeddings.labelled.sum() < len(embeddings.labelled)
    pairs = embeddings.pairs(64)
    assert embeddings.labelled[pairs["index"]].all()
    assert set(pairs["index"].tolist()) == set(embeddings.labelled.nonzero()[:, 0].tolist())
    for index, text in zip(pairs["index"], pairs["text"]):
        own = embeddings.text[embeddings.starts[index] : embeddings.starts[index + 1]]
        assert (own == text).all(1).any()
    assert torch.equal(pairs["embedding"], embeddings.image[pairs["index"]])


def test_beta_rises_while_the_kl_is_above_its_target_and_resumes(data, clip):
    recipe, batch = built(vdl(data, clip, adversarial_steps=1, kl_target=2.0, kl_warmup=0.0))
    found = [recipe.hold(kl) or recipe.multiplier for kl in (4.0, 4.0, 1.0)]
    assert found[1] > found[0] > 1
    assert found[2] < found[1]
    recipe.step(batch)
    before = recipe.multiplier
    assert recipe.step(batch)["beta"].item() == pytest.approx(0.1 * before)
    assert recipe.multiplier < before  # the first KL is 0
    other, _ = built(vdl(data, clip, adversarial_steps=1, kl_target=2.0))
    other.load_state_dict(recipe.state_dict())
    assert other.multiplier == recipe.multiplier


def test_warm_up_of_beta(data, clip):
    recipe, batch = built(vdl(data, clip, posterior_steps=10, kl_warmup=0.5, adversarial_steps=1))
    recipe.step(batch)
    betas = [recipe.step(batch)["beta"].item() for _ in range(7)]
    assert betas == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_pairs_condition_on_pictures_that_are_sometimes_hidden(data, clip):
    recipe, batch = built(vdl(data, clip, {"conditioning": "pair"}, drop_image=0.5))
    text = torch.randn(4, 6)
    torch.manual_seed(0)
    rows = torch.cat([recipe.condition(batch, text) for _ in range(50)])
    hidden = (rows[:, 6:] == 0).all(1)
    assert 60 < hidden.sum() < 140
    for _ in range(7):
        assert recipe.step(batch)


def test_the_trained_perturbation_learns_first_and_then_stays(data, clip):
    recipe, batch = built(lafite(data, clip, {"perturbation": "trained"}, perturbation_steps=20))
    first = [recipe.step(batch)["loss_perturbation"] for _ in range(20)]
    assert sum(first[-5:]) < sum(first[:5])
    before = state(recipe.model.perturbation)
    assert "loss_g" in recipe.step(batch)
    assert not moved(recipe.model.perturbation, before)


def test_the_average_s_half_life(data, clip):
    recipe, _ = built(lafite(data, clip, ema_images=40, ema_ramp=0.5))
    decays = []
    for _ in range(30):
        recipe.update_average()
        decays.append(recipe.ema.decay)
    # half of what is seen after 4, 8, ... pictures; 40 from 80 pictures on
    assert decays[:3] == pytest.approx([0.5**2, 0.5, 0.5 ** (4 / 6)])
    assert decays[-1] == pytest.approx(0.5 ** (4 / 40))


@pytest.mark.parametrize("make", [vdl, lafite])
def test_a_resumed_run_is_one_never_stopped(data, clip, make, tmp_path):
    whole = train(make(data, clip), tmp_path / "whole", LOOP)
    train(make(data, clip), tmp_path / "parts", replace(LOOP, steps=3))
    parts = train(make(data, clip), tmp_path / "parts", LOOP, resume=True)
    read = [(run.out / "metrics.jsonl").read_text() for run in (whole, parts)]
    assert read[0] == read[1]
    grids = [run.grid.read_bytes() for run in (whole, parts)]
    assert grids[0] == grids[1]
    figures = [(run.out / "held_out.jsonl").read_text() for run in (whole, parts)]
    last = [json.loads(text.splitlines()[-1]) for text in figures]
    assert last[0] == last[1]
    assert {"cos_image", "cos_prior", "recall@10_prior"} <= set(last[0])
    assert (make is lafite) == ({"kl", "cos_sampled", "recall@10_sampled"}.isdisjoint(last[0]))


def test_the_export_draws_from_text(data, clip, tmp_path):
    run = train(vdl(data, clip), tmp_path / "run", replace(LOOP, steps=1))
    model = VDL.from_pretrained(run.model)  # its config says where the CLIP is
    assert model.generate(["a red picture"], seed=0).shape == (1, 3, 16, 16)


def without_captions(data, folder, which):
    shutil.copytree(data, folder)
    for i in which:
        (folder / f"{i}.txt").unlink()
    return folder


def test_no_captions_at_all(data, clip, tmp_path):
    bare = without_captions(data, tmp_path / "bare", range(16))
    recipe = vdl(bare, clip)
    run = train(recipe, tmp_path / "run", LOOP)
    assert run.step == 7
    assert run.grid
    assert recipe.captions[0].startswith("picture ")
    with pytest.raises(ValueError, match=r"label_fraction is 0\.5, but bare has no captions"):
        vdl(bare, clip, label_fraction=0.5).build()
    with pytest.raises(ValueError, match="captioned pictures"):
        vdl(bare, "", encoder="").build()


def test_captions_missing_for_some_pictures(data, clip, tmp_path):
    some = without_captions(data, tmp_path / "some", range(0, 16, 2))
    recipe, _ = built(vdl(some, clip, label_fraction=1.0))
    embeddings, dataset = recipe.batches.embeddings, recipe.batches.dataset
    expected = [bool(captions) for captions in dataset.captions]
    assert embeddings.labelled.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    everything = recipe.batches.batch(
        torch.arange(len(dataset)), torch.zeros(len(dataset), dtype=torch.int64)
    )
    assert torch.equal(everything["text"].norm(dim=1) > 0, embeddings.labelled)
    text = recipe.draw_text(everything)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(len(dataset)))
    near = (text * everything["text"]).sum(1)
    assert (near[embeddings.labelled] > 0.9).all()


def test_fractions_are_nested(data, clip):
    chosen = []
    for fraction in (0.0, 1e-9, 0.2, 0.6):
        recipe, _ = built(vdl(data, clip, label_fraction=fraction))
        chosen.append(recipe.batches.embeddings.labelled)
    for some, more in pairwise(chosen):
        assert (some <= more).all()
    none, one, few, many = (int(labelled.sum()) for labelled in chosen)
    assert none == 0
    assert one == 1 < few < many


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_fraction": 1.5}, r"label_fraction is in \[0, 1\], not 1.5"),
        ({"label_fraction": -0.1}, r"label_fraction is in \[0, 1\]"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"r1_every": -1}, "r1_every must be at least 0"),
        ({"lr_d": -0.1}, "lr_d must be at least 0"),
        (
            {"model": VDLConfig(discriminator="projected")},
            "a projected discriminator has no second derivative.* r1_every is 0, not 16",
        ),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"augment": "translation,flip"}, "a policy is made of"),
        ({"encoder_weight": -5.0}, "encoder_weight must be at least 0, not -5"),
        ({"r1_gamma": -1.0}, "r1_gamma must be at least 0"),
        ({"path_weight": float("nan")}, "path_weight must be at least 0, not nan"),
        ({"smallest_crop": 0.0}, "smallest_crop must be above 0, not 0"),
        ({"smallest_crop": 1.5}, r"smallest_crop is in \[0, 1\], not 1.5"),
        ({"text_noise": 7.0}, r"text_noise is in \[0, 1\], not 7"),
        ({"style_mixing": 9.0}, r"style_mixing is in \[0, 1\], not 9"),
        ({"text_share": -0.5}, r"text_share is in \[0, 1\]"),
        ({"posterior_lr": 0.0}, "posterior_lr must be above 0"),
        ({"alignment_weight": -1.0}, "alignment_weight must be at least 0"),
        ({"prior_share": 2.0}, r"prior_share is in \[0, 1\]"),
        ({"posterior_steps": 0}, "posterior_steps must be at least 1"),
        ({"adversarial_steps": -1}, "adversarial_steps must be at least 0"),
        ({"ranking_weight": -1.0}, "ranking_weight must be at least 0"),
        ({"split": "all", "encoder": ""}, "split all needs an encoder"),
        (
            {"corpus": "encoder", "encoder": "clip"},
            "corpus encoder is what an encoder trained here",
        ),
    ],
)
def test_bad_trainings(fields, message):
    with pytest.raises(ValueError, match=message):
        VDLTraining(**fields)


def test_widths_that_do_not_match(data, clip):
    with pytest.raises(ValueError, match="width 6, the configuration has embedding 5"):
        vdl(data, clip, {"embedding": 5}).build()
    with pytest.raises(ValueError, match="evidence of width 8, the configuration has"):
        vdl(data, clip, {"evidence_width": 9}).build()


def test_bad_corpora(data, clip, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    with pytest.raises(ValueError, match=r"empty\.txt has no caption"):
        vdl(data, clip, corpus=str(empty)).build()
    with pytest.raises(FileNotFoundError, match=r"corpus: there is no file nowhere\.txt"):
        vdl(data, clip, corpus="nowhere.txt").build()


def test_a_corpus_gives_the_mean_text_of_an_embedding():
    text = F.normalize(torch.randn(40, 6, dtype=torch.float64), dim=1)
    image = F.normalize(torch.randn(9, 6, dtype=torch.float64), dim=1)
    found = Corpus(text, 0.1)(image)
    weight = (image.numpy() @ text.numpy().T / 0.1).astype(float)
    weight = np.exp(weight - weight.max(1, keepdims=True))
    mean = weight / weight.sum(1, keepdims=True) @ text.numpy()
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), mean, rtol=1e-12)
    near = Corpus(text, 1e-6)(image)  # without heat the nearest text
    torch.testing.assert_close(near, text[(image @ text.T).argmax(1)])


def test_prior_and_posterior_are_around_what_the_corpus_says(data, clip, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{colour} thing" for colour in COLOURS) + "\n")
    recipe, batch = built(vdl(data, clip, corpus=str(corpus)))
    texts = recipe.encoder.embed_text(corpus.read_text().splitlines())
    centre = Corpus(texts, recipe.encoder.temperature)(batch["embedding"])
    torch.testing.assert_close(batch["centre"], centre, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(centre, batch["embedding"], atol=0.01)
    for found in (recipe.pseudo_text(batch), recipe.posterior(batch)):
        assert torch.equal(found.mean, batch["centre"])
    plain, batch = built(vdl(data, clip))
    assert torch.equal(batch["centre"], batch["embedding"])
    measured = [other.held_out()["cos_prior"] for other in (recipe, plain)]
    assert measured[0] != measured[1]


def test_the_corpus_of_the_encoder_is_what_it_was_trained_on(monkeypatch, data):
    def trained(config):
        width = {"image_encoder_size": 32, "width": 6, "image_width": 16, "text_width": 6}
        return DualEncoder(DualEncoderConfig(**width))

    monkeypatch.setattr(joint_data, "cached_dual_encoder", trained)
    monkeypatch.setattr(joint_data, "image_features", lambda *_: torch.randn(4, 16))
    asked = []
    monkeypatch.setattr(
        joint_data, "embed_captions",
        lambda pairs, encoder: asked.append(pairs) or encoder.embed_text(torch.randn(12, 6)),
    )  # fmt: skip
    for corpus in ("encoder", "auto"):
        config = vdl(data, "", encoder="", corpus=corpus).config
        joint_data.JointData(config, torch.device("cpu"))
        assert told(asked.pop()) == told(leak_free(str(data), 16).encoder)


def test_an_encoder_that_is_given_has_no_corpus_of_its_own(data, clip):
    _, batch = built(vdl(data, clip, corpus="auto"))
    assert torch.equal(batch["centre"], batch["embedding"])
    with pytest.raises(ValueError, match="corpus encoder is what an encoder trained here learnt"):
        vdl(data, clip, corpus="encoder")


def test_a_clip_without_weights(data, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        vdl(data, tmp_path).build()


def test_no_caption_leaks(data):
    parts = leak_free(str(data), 16)
    named = [set(p.groups) for p in (parts.encoder, parts.generator, parts.held_out)]
    assert not named[0] & named[1]
    assert not (named[0] | named[1]) & named[2]
    assert not told(parts.encoder) & (told(parts.generator) | told(parts.held_out))
    assert parts.lines()[-1].startswith("of the encoder's: 0 captions and 0 concepts are among")


def test_bf16_with_every_regulariser(data, clip):
    recipe, batch = built(lafite(data, clip, precision="bf16"))
    metrics = recipe.step(batch)
    assert {"path", "r1"} <= set(metrics)
    assert all(value.isfinite() for value in metrics.values())


def test_a_compiled_projected_discriminator_has_its_encoder(data, clip, monkeypatch):
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)
    options = {"compile": True, "r1_every": 0, "path_every": 0}
    recipe, batch = built(lafite(data, clip, {"discriminator": "projected"}, **options))
    assert all(value.isfinite() for value in recipe.step(batch).values())


def test_step_s_loss_is_the_sum_of_its_parts(data, clip):
    recipe, batch = built(lafite(data, clip, picture_weight=2.0, feature_weight=0.5))
    text = F.normalize(torch.randn(4, 6), dim=1)
    torch.manual_seed(1)
    total, parts, _ = recipe.generator_loss(batch, text)
    weights = {"g_gan": 1, "g_encoder": 10, "g_semantic": 10, "g_picture": 2, "g_feature": 0.5}
    assert set(parts) == set(weights)
    torch.testing.assert_close(total, sum(w * parts[name] for name, w in weights.items()))


def test_a_run_of_lafite_stands_in_for_stage_1(data, clip, tmp_path):
    first = train(lafite(data, clip), tmp_path / "first", replace(LOOP, steps=2))
    (kept,) = checkpoint.steps(first.out / "checkpoints")
    recipe, batch = built(vdl(data, clip, stage1=str(first.out), lr=1e-3))
    assert recipe.begin() == 2
    found = LAFITE.from_pretrained(first.model).generator.state_dict()
    average = recipe.average().state_dict()
    assert all(torch.equal(found[name], average[name]) for name in found)
    assert recipe.ema.updates == 2
    assert recipe.path_mean == checkpoint.read(kept)["recipe"]["path_mean"] > 0
    rates = [recipe.players[name].optimizer.param_groups[0]["lr"] for name in recipe.players]
    assert rates[0] == pytest.approx(1e-3 * 2 / 3)  # not the other run's
    assert recipe.stage() == ("posterior", 0)
    assert "loss_q" in recipe.step(batch)
    whole = train(vdl(data, clip, stage1=str(first.out)), tmp_path / "run", replace(LOOP, steps=6))
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 5, 6]  # three of 2a, and one of 2b
    assert [line["step"] for line in lines if "loss_g" in line] == [6]
    assert (
        "stage1" not in whole.out.joinpath("checkpoints/step-00000006/checkpoint.json").read_text()
    )
    with pytest.raises(ValueError, match=r"stage1: .* has no checkpoint"):
        built(vdl(data, clip, stage1=str(tmp_path)))[0].begin()
    with pytest.raises(ValueError, match=r"stage1: .* is of other networks"):
        built(vdl(data, clip, {"channel_max": 3}, stage1=str(first.out)))[0].begin()
    shutil.rmtree(first.out)  # all of it that counts is in the checkpoint
    longer = replace(LOOP, steps=7)
    assert train(vdl(data, clip, stage1=str(first.out)), whole.out, longer, resume=True).step == 7


def changed(folder, copy):
    """A copy of a CLIP with other weights of equal width, by the same name."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    options = {"metadata": {"format": "pt"}}
    save_file({k: v + 0.1 for k, v in weights.items()}, copy / "model.safetensors", **options)
    return copy


@pytest.mark.parametrize("make", [vdl, lafite])
def test_a_checkpoint_is_bound_to_its_encoder_and_its_pictures(data, clip, make, tmp_path):
    pictures, encoder = tmp_path / "pictures", tmp_path / "clip"
    shutil.copytree(data, pictures)
    shutil.copytree(clip, encoder)
    loop = replace(LOOP, steps=1)
    out = train(make(pictures, encoder), tmp_path / "run", loop).out
    shutil.rmtree(encoder)
    changed(clip, encoder)
    before = sorted(out.rglob("*"))
    with pytest.raises(ValueError, match="trained with other weights of the encoder"):
        train(make(pictures, encoder), out, replace(LOOP, steps=2), resume=True)
    if make is vdl:
        other = {"stage1": str(out), "adversarial_steps": 1}
        with pytest.raises(ValueError, match=r"stage1: .* trained with other weights of the"):
            train(make(pictures, encoder, **other), tmp_path / "new", LOOP)
        assert not (tmp_path / "new").exists()
    shutil.rmtree(encoder)
    shutil.copytree(clip, encoder)
    for i in range(0, 16, 2):
        (pictures / f"{i}.png").unlink()
    with pytest.raises(ValueError, match="the checkpoint was trained with other pictures"):
        train(make(pictures, encoder), out, replace(LOOP, steps=2), resume=True)
    assert sorted(out.rglob("*")) == before


def test_checkpoints_from_before_there_were_digests_go_on(data, clip, tmp_path):
    recipe, batch = built(vdl(data, clip))
    recipe.step(batch)
    state = recipe.state_dict()
    assert set(state.pop("stands_on")) == {"pictures", "weights of the encoder"}
    other, _ = built(vdl(data, clip))
    other.load_state_dict(state)
    assert other.done == 1


def test_no_step_is_left_after_stage_1(data, clip, tmp_path):
    first = train(lafite(data, clip), tmp_path / "first", replace(LOOP, steps=1))
    whole = vdl(data, clip, stage1=str(first.out), adversarial_steps=7)
    with pytest.raises(ValueError, match="adversarial_steps 7: of 7 none is left"):
        train(whole, tmp_path / "run", LOOP)
    assert not (tmp_path / "run").exists()
