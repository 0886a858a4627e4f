"""CLIP from a local directory: pictures and captions in one space, differentiable to the pictures.

    DIR/config.json, model.safetensors, tokenizer files              transformers
    DIR/open_clip_config.json, open_clip_model.safetensors           open_clip

Pixels have the mean and the std of preprocessor_config.json or of open_clip's preprocess_cfg, and
OpenAI's where these name none. What is read before the image projection (the class token of a ViT)
is the evidence that VDL's posterior sees. Weights are read from safetensors alone: nothing in them
can run.
(Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.)
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.config import read_object
from fastxm.encoders.bert import TextBatch
from fastxm.encoders.frozen import Frozen, exact_convolutions, keep_spread, reading, standard

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's, where a directory names no other
STD = (0.26862954, 0.26130258, 0.27577711)


class Transformers(nn.Module):
    """A CLIPModel of transformers: features before the projections, and these."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        present(folder, "model.safetensors", "model.safetensors.index.json")
        from transformers import AutoTokenizer, CLIPModel

        kind = read_object(folder / "config.json").get("model_type")
        if kind != "clip":
            raise ValueError(f"{folder} holds a model of type {kind!r}, not a CLIP")
        read: Any = CLIPModel.from_pretrained
        options: Any = {"local_files_only": True}
        safely = {"use_safetensors": True, "output_loading_info": True, **options}
        with reading(folder):
            model, found = read(folder, dtype=torch.float32, **safely)  # whatever it is kept in
        if missing := ", ".join(sorted(found["missing_keys"])[:3]):
            raise ValueError(f"{folder} holds no whole CLIP: its weights lack {missing}")
        self.model: Any = model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
        config: Any = self.model.config
        self.image_size = config.vision_config.image_size
        self.words = config.text_config.max_position_embeddings
        self.evidence_width, self.text_width = (
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
        )
        self.width = config.projection_dim
        kept = folder / "preprocessor_config.json"
        pixels = read_object(kept) if kept.is_file() else {}
        self.mean, self.std = spread(pixels, "image_mean", "image_std", kept)

    def image(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).pooler_output

    def fits(self, caption: str) -> bool:
        return len(self.tokenizer(caption)["input_ids"]) <= self.words

    def text(self, captions: list[str], device: torch.device) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": self.words}
        tokens = self.tokenizer(captions, return_tensors="pt", **options)
        inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        return self.model.text_model(**inputs).pooler_output

    def project_image(self, features: Tensor) -> Tensor:
        return self.model.visual_projection(features)

    def project_text(self, features: Tensor) -> Tensor:
        return self.model.text_projection(features)


class OpenCLIP(nn.Module):
    """A model of open_clip whose image tower ends in a projection matrix, as its ViTs do."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        present(folder, "open_clip_model.safetensors")
        try:
            import open_clip
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{folder} holds a model of open_clip: pip install open_clip_torch"
            ) from error
        from safetensors.torch import load_file

        kept = folder / "open_clip_config.json"
        config = read_object(kept)
        self.mean, self.std = spread(config.get("preprocess_cfg") or {}, "mean", "std", kept)
        if "model_cfg" not in config:
            raise ValueError(f"{kept} has no model_cfg: it is not of open_clip")
        self.model = open_clip.CLIP(**config["model_cfg"])
        with reading(folder):
            self.model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
        projection = getattr(self.model.visual, "proj", None)
        if not isinstance(projection, nn.Parameter):
            raise ValueError(f"{folder}: only image towers that end in a projection are supported")
        self.projection = projection
        self.model.visual.proj = None  # what the tower gives is then before it
        self.words = self.model.context_length
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.words)
        size = self.model.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.evidence_width, self.width = projection.shape
        self.text_width = self.width

    def image(self, pixels: Tensor) -> Tensor:
        return self.model.visual(pixels)

    def fits(self, caption: str) -> bool:
        return len(self.tokenizer.encode(caption)) + 2 <= self.words

    def text(self, captions: list[str], device: torch.device) -> Tensor:
        return self.model.encode_text(self.tokenizer(captions).to(device))

    def project_image(self, features: Tensor) -> Tensor:
        return features @ self.projection

    def project_text(self, features: Tensor) -> Tensor:
        return features


class CLIP(Frozen):
    """A frozen CLIP.

    Args:
        directory: local, of transformers or of open_clip.

    Attributes:
        width: D, of the joint space.
        evidence_width: of the image features before the projection.
        image_size: side that pictures are resized to, bicubic with antialiasing.
        name: tells apart whatever gives other features.

    Raises:
        FileNotFoundError: there is no such directory, or it has no CLIP or no weights.
        ValueError: the model in it is another, some of its weights are missing, damaged or of
            another size, or the mean or std of its pixels is not one of three channels.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__()
        folder = Path(directory)
        if not folder.is_dir():
            raise FileNotFoundError(f"a CLIP is read from a local directory, not from {folder}")
        if (folder / "open_clip_config.json").is_file():
            self.tower: Any = OpenCLIP(folder)
        elif (folder / "config.json").is_file():
            self.tower = Transformers(folder)
        else:
            raise FileNotFoundError(
                f"{folder} holds no CLIP: no config.json (transformers), no open_clip_config.json"
            )
        self.width, self.evidence_width = self.tower.width, self.tower.evidence_width
        self.image_size = self.tower.image_size
        pixels = self.tower.mean, self.tower.std
        keep_spread(self, *pixels)
        self.freeze()
        self.name = f"{folder.name}-{self.fingerprint()}"
        if pixels != (MEAN, STD):
            self.name += "".join(f"-{value}" for values in pixels for value in values)
        self.image_encoder, self.text_encoder = Images(self), Texts(self)

    @property
    def temperature(self) -> float:
        """Of the softmax over cosines that was learnt."""
        return math.exp(-self.tower.model.logit_scale.item())

    def features(self, images: Tensor) -> Tensor:
        """[B, evidence_width], before the projection, of images [B, 3, H, W] in [0, 1]."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are floats [B, 3, H, W] in [0, 1], not {images.dtype} {images.shape}"
            )
        size = (self.image_size, self.image_size)
        images = images.to(self.device)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return self.tower.image(standard(self, images))

    def evidence(self, features: Tensor) -> Tensor:
        """The features [B, evidence_width], each row of mean 0 and variance 1."""
        return F.layer_norm(features.to(self.device), features.shape[1:])

    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures in the joint space, differentiable to them.

        Args:
            images: [B, 3, H, W] in [0, 1], or features [B, evidence_width].

        Returns:
            [B, D], rows of length 1.
        """
        features = self.features(images) if images.ndim == 4 else images.to(self.device)
        return F.normalize(self.tower.project_image(features), dim=1)

    def text_features(self, captions: list[str]) -> Tensor:
        """[B, text_width], before the projection; of a caption too long, its clauses' mean."""
        parts = [
            [caption] if self.tower.fits(caption) else clauses(caption) for caption in captions
        ]
        whole = self.tower.text([part for several in parts for part in several], self.device)
        if len(whole) == len(parts):
            return whole
        return torch.stack([part.mean(0) for part in whole.split([*map(len, parts)])])

    def embed_text(self, text: Sequence[str] | Tensor) -> Tensor:
        """Captions in the joint space.

        Args:
            text: B captions, or features [B, text_width] of `text_encoder`.

        Returns:
            [B, D], rows of length 1.
        """
        given = isinstance(text, Tensor)
        features: Any = text if given else self.text_features(list(text))
        return F.normalize(self.tower.project_text(features.to(self.device)), dim=1)


class Images:
    """A CLIP's image tower as `image_features` takes it."""

    def __init__(self, clip: CLIP) -> None:
        self.clip, self.name, self.width = clip, clip.name, clip.evidence_width

    @torch.no_grad()
    @exact_convolutions()
    def embed(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """[N, evidence_width], of images [N, 3, H, W] in [0, 1], some at a time."""
        return torch.cat([self.clip.features(part) for part in images.split(batch_size)])


class Texts:
    """A CLIP's text tower as `text_features` takes it: one word a caption, its whole."""

    max_length = 1

    def __init__(self, clip: CLIP) -> None:
        self.clip, self.name, self.width = clip, f"{clip.name}-clauses", clip.tower.text_width

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextBatch:
        sentence = self.clip.text_features(list(captions))
        lengths = torch.ones(len(sentence), dtype=torch.int64)
        return TextBatch(sentence[:, None], sentence, lengths)


def clauses(caption: str) -> list[str]:
    """Its parts between full stops and commas, one at least (LAFITE's released code)."""
    return [part.strip() for part in re.split("[.,]", caption) if part.strip()] or [caption]


def spread(config: dict[str, Any], mean: str, std: str, where: Path) -> tuple[Any, Any]:
    """Mean and std of the pixels of each channel under these names; OpenAI's if they are not there.

    Raises:
        ValueError: they are not three numbers each, the std above 0.
    """
    means, stds = config.get(mean) or MEAN, config.get(std) or STD
    for name, values in ((mean, means), (std, stds)):
        whole = isinstance(values, (list, tuple)) and len(values) == 3
        if not whole or not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(f"{where}: {name} is three numbers, not {values!r}")
    if not min(stds) > 0:
        raise ValueError(f"{where}: {std} is above 0, not {stds!r}")
    return tuple(means), tuple(stds)


def present(folder: Path, *names: str) -> None:
    """Raises FileNotFoundError unless the folder has one of these files."""
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"{folder} has no weights: no {' or '.join(names)}")
