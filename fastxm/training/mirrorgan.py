"""MirrorGAN's training: every discriminator, then the generator on the same pictures.

    L_Di = (real + real beside its text) / 2
         + (fake + fake beside its text + real beside another) / 3
    L_G  = sum_i (fake_i + fake_i beside its text) + stream_weight surprise + KL
         + damsm_weight (word + sentence)

Each term of L_Di is a binary cross entropy; the sum is over the three sizes; surprise is
STREAM's at the caption, given the last picture, a mean over its words and its end. The text encoder
and the captioner were trained before and stay as they are. Another text is of another concept.
(T. Qiao et al. MirrorGAN, CVPR 2019, section 3.4, with the factors of the released code; the DAMSM
term is AttnGAN's, weight 0 in MirrorGAN.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxm import losses
from fastxm.data import CaptionedImages
from fastxm.data.vocabulary import Tokens, Vocabulary
from fastxm.encoders.damsm import DAMSM
from fastxm.encoders.frozen import fingerprint
from fastxm.models.mirrorgan import Drawn, GLAMConfig, MirrorGAN, MirrorGANConfig
from fastxm.models.pretrained import find_model
from fastxm.models.stream import STREAM
from fastxm.nn.outputs import at_least_float
from fastxm.training import config as configs
from fastxm.training.batches import Batch
from fastxm.training.captions import concepts
from fastxm.training.damsm import DAMSMRecipe, DAMSMTraining
from fastxm.training.gan import GANRecipe, GANTraining, gradients
from fastxm.training.precision import Precision, autocast, seed_all
from fastxm.training.ranks import started
from fastxm.training.recipe import Samples, State
from fastxm.training.stages import Stage, train_stages
from fastxm.training.stream import STREAMRecipe, STREAMTraining
from fastxm.training.trainer import Run, is_fresh, train

# the stages before: recipe and configuration
BEFORE: dict[str, tuple[Any, Any]] = {
    "damsm": (DAMSMRecipe, DAMSMTraining),
    "stream": (STREAMRecipe, STREAMTraining),
}


@dataclass(frozen=True, kw_only=True)
class MirrorGANTraining(GANTraining):
    """Everything that decides a training of MirrorGAN; samples are each drawn at three sizes."""

    model: GLAMConfig = field(default_factory=GLAMConfig)
    stages: str = "cpu-demo"
    """Preset of the stages before, `damsm` and `stream`, where no run of theirs is given."""
    damsm: str = ""
    """A run of `train damsm`; if not given, it is trained first, inside this run's directory."""
    stream: str = ""
    """A run of `train stream`; likewise."""
    batch_size: int = 12
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    stream_weight: float = 20.0
    """Weight of the redescription loss, lambda: 20 in the paper, 10 in the released code."""
    kl_weight: float = 1.0
    """Weight of the augmented sentence's divergence from a standard normal distribution."""
    damsm_weight: float = 0.0
    """Weight of the word and sentence losses of DAMSM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stream_weight", "kl_weight", "damsm_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


class MirrorGANRecipe(GANRecipe):
    """MirrorGAN as the loop sees it.

    Args:
        config: of the training.

    Attributes:
        stages: where the runs `damsm` and `stream` are that the configuration does not name.
    """

    system = "mirrorgan"
    spans = True
    model: MirrorGAN
    unbound = ("loop", "device", "compile", "stages", "damsm", "stream")
    stages = Path()

    def build(self) -> None:
        config = self.config
        seed_all(config.seed, self.device)
        damsm = DAMSM.from_pretrained(find_model(config.damsm or self.stages / "damsm"))
        stream = STREAM.from_pretrained(find_model(config.stream or self.stages / "stream"))
        whole = MirrorGANConfig(config.model, damsm.config, stream.config)
        vocabulary, words = damsm.stem.vocabulary, damsm.config.stem.words
        size = config.model.image_size
        self.batches = self.open(size, lambda dataset: numbered(dataset, vocabulary, words))
        self.labels = concepts(self.batches.dataset).to(self.device)
        model = MirrorGAN(whole)
        model.damsm.load_state_dict(damsm.state_dict())
        model.stream.load_state_dict(stream.state_dict())
        model.train().to(self.device)
        for frozen in (model.damsm, model.stream):
            frozen.eval().requires_grad_(False)
        self.frozen = fingerprint(model.damsm) + fingerprint(model.stream)
        self.players = {"generator": self.player(model.generator, config.lr_g)}
        for side, network in zip(config.model.sizes, model.discriminators):
            self.players[f"discriminator-{side}"] = self.player(network, config.lr_d)
        self.average_from(model)
        self.generator: Callable[..., Drawn] = model.generator
        self.discriminators: list[Callable[..., list[Tensor]]] = list(model.discriminators)
        if config.compile:
            self.compile()

    def compile(self) -> None:
        from torch._dynamo import config as dynamo

        # each discriminator runs in three forms, which are counted together: they share their code
        forms = 3 * len(self.model.discriminators)
        dynamo.recompile_limit = max(dynamo.recompile_limit, forms + 1)
        self.generator = torch.compile(self.model.generator, fullgraph=True)
        self.discriminators = [torch.compile(d, fullgraph=True) for d in self.model.discriminators]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(self.model.damsm.stem(captions))

    @torch.no_grad()
    def text(self, batch: Batch) -> tuple[Tensor, ...]:
        return tuple(self.model.damsm.stem.read(batch["tokens"], batch["lengths"]))

    def step(self, batch: Batch) -> dict[str, Tensor]:
        names = [name for name in self.players if name != "generator"]
        self.warm_up(names)
        text = self.text(batch)
        noise = self.draw_noise(self.model.noise_width)
        with autocast(self.config.precision, self.device):
            drawn = self.generator(noise, *text)
        metrics = {}
        for i, (name, real) in enumerate(zip(names, self.pyramid(batch["image"]))):
            loss = self.discriminator_loss(i, real, drawn.images[i].detach(), text[1], batch)
            parameters = list(self.players[name].network.parameters())
            self.update({name: gradients(self.scaler.scale(loss), parameters)})
            metrics[f"loss_d{self.config.model.sizes[i]}"] = loss
        loss, parts = self.generator_loss(drawn, text, batch)
        parameters = list(self.model.generator.parameters())
        self.update({"generator": gradients(self.scaler.scale(loss), parameters)})
        self.ema.update(self.model.generator)
        metrics = {**metrics, "loss_g": loss, **parts}
        return {name: value.detach() for name, value in metrics.items()}

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Real pictures at the three sizes."""
        resize = F.interpolate
        return [
            images
            if side == images.shape[-1]
            else resize(images, (side, side), mode="bilinear", antialias=True)
            for side in self.config.model.sizes
        ]

    def judge_pictures(self, i: int, images: Tensor, *sentences: Tensor) -> list[Tensor]:
        """Logits of pictures of size number i: alone, and beside each of the sentences."""
        if self.config.augment:
            images = self.augment(images)
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.config.precision, self.device):
            return self.discriminators[i](images, *sentences)

    def discriminator_loss(
        self, i: int, real: Tensor, fake: Tensor, sentence: Tensor, batch: Batch
    ) -> Tensor:
        """Of the discriminator of size number i."""
        whole = partial(self.ranks.whole, total=self.config.batch_size)
        labels = whole(self.labels[batch["index"]])
        # a batch draws a concept once, unless the data has fewer concepts than it has places
        other = labels != labels.roll(1)
        wrong_sentence = self.ranks.own(whole(sentence).roll(1, 0))
        alone, matched, mismatched = self.judge_pictures(i, real, sentence, wrong_sentence)
        of_fake = self.judge_pictures(i, fake, sentence)
        right = losses.bce(alone, True) + losses.bce(matched, True)
        wrong = sum(losses.bce(logits, False) for logits in of_fake)
        count = other.sum().clamp(min=1) * (self.share / self.ranks.size)  # share is of rows
        wrong = wrong + losses.bce(mismatched, False, where=self.ranks.own(other), count=count)
        return self.share * (right / 2 + wrong / 3)

    def generator_loss(
        self, drawn: Drawn, text: tuple[Tensor, ...], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss, and its parts before their weights."""
        config = self.config
        gan = torch.zeros((), device=self.device)
        for i, images in enumerate(drawn.images):
            logits = self.judge_pictures(i, images, text[1])
            gan = gan + self.share * sum(losses.bce(logit, True) for logit in logits)
        parts = {"gan": gan, "kl": self.share * losses.kl_normal(drawn.mean, drawn.log_var)}
        loss = gan + config.kl_weight * parts["kl"]
        if config.stream_weight or config.damsm_weight:
            of_text = self.text_losses(drawn.images[-1], text, batch)
            parts |= of_text
            loss = loss + config.stream_weight * of_text.get("stream", 0.0)
            matching = of_text.get("word", 0.0) + of_text.get("sentence", 0.0)
            loss = loss + config.damsm_weight * matching
        return loss, parts

    def text_losses(
        self, images: Tensor, text: tuple[Tensor, ...], batch: Batch
    ) -> dict[str, Tensor]:
        """How well the pictures tell their captions; of one look, where both see the same."""
        config, damsm, stream = self.config, self.model.damsm, self.model.stream
        group = self.ranks.group
        parts = {}
        # a CPU's bfloat16 makes these networks, of convolutions channel by channel, slower
        precision: Precision = config.precision if self.device.type == "cuda" else "fp32"
        with autocast(precision, self.device):
            same = damsm.image_encoder.name == stream.image_encoder.name
            if config.damsm_weight or same:
                regions, whole = damsm.look(images)
            seen = whole if same else stream.image_encoder(images)
        if config.stream_weight:
            told = batch["tokens"], batch["lengths"]
            parts["stream"] = stream.loss(at_least_float(seen), *told, group=group)
        if config.damsm_weight:
            words, sentence, lengths = text
            regions, image = damsm.project(at_least_float(regions), at_least_float(whole))
            given, labels = (regions, words, lengths, image, sentence), self.labels[batch["index"]]
            found = losses.damsm_loss(*given, labels=labels, group=group)
            parts["word"], parts["sentence"] = found
        return parts

    def sample(self) -> Samples:
        """The three pictures of each caption side by side, enlarged to the last one's size."""
        size = self.config.model.image_size
        sheets = [
            torch.cat([F.interpolate(x.float(), (size, size)) for x in drawn.images], 3)
            for drawn in self.draw()
        ]
        return Samples(torch.cat(sheets), self.captions)

    def state_dict(self) -> State:
        return {**super().state_dict(), "frozen": self.frozen}

    def load_state_dict(self, state: State) -> None:
        if state["frozen"] != self.frozen:
            raise ValueError(
                "the checkpoint was trained with other weights of damsm or stream "
                f"({state['frozen']}, now {self.frozen}): give the runs that it began with"
            )
        super().load_state_dict(state)


def numbered(dataset: CaptionedImages, vocabulary: Vocabulary, words: int) -> Tokens:
    """The captions in a vocabulary that knows most of their words.

    Raises:
        ValueError: it does not.
    """
    texts = (caption for captions in dataset.captions for caption in captions)
    theirs = set(Vocabulary.of(texts).words)
    known = len(theirs & set(vocabulary.words))
    if 2 * known < len(theirs):
        raise ValueError(
            f"damsm and stream know {known} of the {len(theirs)} words of {dataset.name}: train "
            "them on the same data"
        )
    return Tokens(dataset, vocabulary, words)


def stages_before(config: MirrorGANTraining, out: Path) -> list[Stage]:
    """The stages that no run is given of; one that has begun in `out` keeps its configuration."""
    asked = {name: getattr(config, name) for name in ("data", "resize", "device", "seed")}
    asked["image_size"] = config.model.image_size
    stages = []
    for name, (recipe, training) in BEFORE.items():
        if getattr(config, name):
            continue
        values, where = configs.preset(name, config.stages), f"preset {config.stages}"
        begun = out / name / "config.yaml"
        if begun.exists():
            values, where = configs.read(begun, name), str(begun)
        made = configs.construct(training, {**values, **asked}, where)
        stages.append(Stage(name, partial(recipe, made), made.loop))
    return stages


def train_mirrorgan(
    config: MirrorGANTraining,
    out: Path,
    *,
    resume: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> Run:
    """Trains MirrorGAN, and first the stages before it, each in a directory inside `out`.

    A stage that was stopped goes on, one that has ended is used as it is. Of several processes each
    calls this; they train every part together.

    Args:
        config: of the training.
        out: the run's directory.
        resume: as of `train`.
        tell: is given a line about each stage.

    Returns:
        the run, or that of the stage that a signal ended.

    Raises:
        FileNotFoundError: a run that the configuration names has no model.
        ValueError: as `train_stages`.
    """
    recipe = MirrorGANRecipe(config)
    recipe.stages = out
    if not resume:
        is_fresh(out)
    for path in filter(None, (config.damsm, config.stream)):
        find_model(path)
    before = stages_before(config, out)
    left = [stage for stage in before if not stage.ended(out)]
    with started(recipe.device) as ranks:
        ranks.any(False)  # nothing is written before all have looked
        tell = tell if ranks.first else (lambda line: None)
        for stage in before:
            if stage not in left:
                tell(f"{stage.name}: {out / stage.name} has ended, and is used as it is")
        if ranks.first and not (out / "config.yaml").exists():  # to resume from, in any stage
            configs.write(out / "config.yaml", recipe.system, config)
        runs = train_stages(left, out, resume=True, tell=tell)
        if runs and runs[-1].interrupted:
            return runs[-1]
        return train(recipe, out, config.loop, resume=resume)
