"""What MirrorGAN is judged by beside its pictures' distance: do they tell their captions again.

Held-out captions are drawn. R-precision: DAMSM finds a picture's caption among 100, of as many
concepts and of one style. Redescription: BLEU of what STREAM writes of the picture against all
captions of the real one, and STREAM's perplexity at the caption. Both judges have seen no held-out
picture, but the generator may have been trained with them; the dual encoder of `evaluate` was not.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastxm.data import CaptionedImages, open_dataset
from fastxm.data.cache import track
from fastxm.data.subsets import full_weight
from fastxm.data.vocabulary import split_words
from fastxm.encoders import image_encoder
from fastxm.evaluation.evaluator import Captions, caption_pools, embed_captions, pooled_recall
from fastxm.evaluation.metrics import class_score
from fastxm.evaluation.text import bleu, common_words, perplexity, shared_words
from fastxm.models.mirrorgan import MirrorGAN


@torch.no_grad()
def evaluate_redescription(
    model: MirrorGAN,
    data: str = "emoji",
    *,
    num_images: int = 1500,
    pool: int = 100,
    seed: int = 0,
    beams: int = 1,
    progress: bool = True,
    options: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Draws held-out captions and judges what the pictures say, beside real pictures.

    Args:
        model: the generator, with its DAMSM and STREAM.
        data: "emoji", or a folder or tar shards of captioned pictures.
        num_images: pictures drawn; where fewer are held out, each is drawn of several times.
        pool: captions among which a picture is to find its own.
        seed: of what is chosen and of the noise, which differs from picture to picture.
        beams: of the captioner.
        progress: show progress bars.
        options: of `open_dataset`.

    Returns:
        "R-precision": R@1, R@5, R@10 of generated and of real pictures, and chance;
        "redescription": "BLEU-1", "BLEU-4", "perplexity" and "shared words" of generated and of
        real pictures, and of each against the captions of other pictures ("shuffled"); words that
        more than one in twenty captions holds do not count as shared;
        "score": "EffLite0-score" and "spread" of both, which is no Inception score.

    Raises:
        ValueError: the data set holds no two concepts out.
    """
    size = model.image_size
    held_out = open_dataset(data, size, "val", progress=progress, **(options or {}))
    chosen = held_out.select(full_weight(held_out))
    if len(set(chosen.groups)) < 2:
        raise ValueError(f"{data} holds no two concepts out: nothing to find captions among")
    captions = Captions.of(chosen, turns(len(chosen), num_images, seed), seed)
    pictures = {
        "generated": draw(model, captions.texts, seed, progress),
        "real": chosen.batch(captions.rows),
    }
    pools = caption_pools(captions, pool, seed)
    keys = embed_captions(model.damsm, captions.texts).cpu()
    precision = {
        name: pooled_recall(model.damsm.embed_images(images).cpu(), keys, pools)
        for name, images in pictures.items()
    }
    among = len(pools[0])
    precision["chance"] = {name: min(int(name[2:]) / among, 1.0) for name in precision["real"]}
    ignore = common_words([split_words(c) for captions in chosen.captions for c in captions])
    others = elsewhere(captions.groups, seed)
    told: dict[str, Any] = {}
    score: dict[str, Any] = {}
    eye = image_encoder().to(model.device)
    for name, images in pictures.items():
        texts = [split_words(text) for text in model.caption(images, beams=beams)]
        of = model, chosen, captions, images, texts, ignore
        told[name] = retold(*of, np.arange(len(images)))
        told[f"{name}, shuffled"] = retold(*of, others)
        features = eye.embed(images)
        mean, spread = class_score(eye.classes(features), min(10, len(images)))
        score[name] = {"EffLite0-score": mean, "spread": spread, "pictures": len(images)}
    return {
        "R-precision": {name: {**found, "of": among} for name, found in precision.items()},
        "redescription": told,
        "score": score,
    }


def turns(pictures: int, count: int, seed: int) -> np.ndarray:
    """`count` numbers of pictures, each as often as any other, but for one."""
    random = np.random.default_rng(seed)
    rounds = [random.permutation(pictures) for _ in range(-(-count // pictures))]
    return np.concatenate(rounds)[:count]


def draw(model: MirrorGAN, captions: list[str], seed: int, progress: bool) -> Tensor:
    """A picture of each caption, each from noise of its own."""
    chunks = [captions[start : start + 64] for start in range(0, len(captions), 64)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shown = track(chunks, len(captions), "drawing", step=64, progress=progress)
        return torch.cat([model.generate(chunk) for chunk in shown])


def elsewhere(groups: np.ndarray, seed: int) -> np.ndarray:
    """For each picture the number of one of another concept."""
    random = np.random.default_rng(seed)
    return np.array([random.choice(np.flatnonzero(groups != group)) for group in groups])


def retold(
    model: MirrorGAN,
    dataset: CaptionedImages,
    captions: Captions,
    images: Tensor,
    told: list[list[str]],
    ignore: set[str],
    order: np.ndarray,
) -> dict[str, float]:
    """How pictures [N, 3, S, S], and what was told of them, fit the captions number `order` [N]."""
    stream = model.stream
    right = [[split_words(c) for c in dataset.captions[i]] for i in captions.rows[order]]
    texts = [captions.texts[i] for i in order]
    tokens, lengths = stream.vocabulary.encode(texts, stream.config.words)
    nll = []
    for image, token, length in zip(*(x.split(64) for x in (images, tokens, lengths))):
        whole = stream.image_encoder(image.to(model.device))
        nll.append(stream.nll(whole, token.to(model.device), length.to(model.device)).cpu())
    return {
        "BLEU-1": bleu(told, right, 1),
        "BLEU-4": bleu(told, right, 4),
        "shared words": shared_words(told, right, ignore),
        "perplexity": perplexity(torch.cat(nll), lengths),
    }
