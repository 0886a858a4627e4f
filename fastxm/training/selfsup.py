"""All stages of the self-supervised system: text autoencoder, image autoencoder, maps.

out/text, out/image, out/mapping-<family>...     a run each
out/model                                        the model, with the maps of the first family
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fastxm import encoders
from fastxm.models.selfsup import CrossModalAutoencoder
from fastxm.training import config as configs
from fastxm.training.image_autoencoder import ImageRecipe, ImageTraining
from fastxm.training.mapping import MappingRecipe, MappingTraining
from fastxm.training.ranks import alone
from fastxm.training.stages import Stage, check, train_stages
from fastxm.training.text_autoencoder import TextRecipe, TextTraining
from fastxm.training.trainer import Run


@dataclass(frozen=True)
class SelfSupTraining:
    """Everything that decides a training of the self-supervised system."""

    text: TextTraining = field(default_factory=TextTraining)
    image: ImageTraining = field(default_factory=ImageTraining)
    mapping: MappingTraining = field(default_factory=MappingTraining)
    data: str = "emoji"
    """"emoji", or a folder or tar shards of captioned pictures."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of weights, noise and the order of the data."""
    samples: int = 16
    """Pictures or captions in a sample grid."""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, not {self.samples}")


def stages(config: SelfSupTraining, out: Path) -> list[Stage]:
    """The stages of a training in their order."""
    shared = {"data": config.data, "device": config.device, "seed": config.seed}
    size, mapping = config.image.model.image_size, config.mapping
    text = partial(TextRecipe, config.text, image_size=size, **shared)  # type: ignore[arg-type]
    image = partial(ImageRecipe, config.image, samples=config.samples, **shared)  # type: ignore[arg-type]
    stages = [Stage("text", text, config.text.loop), Stage("image", image, config.image.loop)]
    for family in mapping.families:
        maps = partial(
            MappingRecipe,
            mapping,
            family,
            image=out / "image" / "model",
            text=out / "text" / "model",
            samples=config.samples,
            **shared,  # type: ignore[arg-type]
        )
        stages.append(Stage(mapping.stage(family), maps, mapping.loop))
    return stages


def train_selfsup(config: SelfSupTraining, out: Path, *, resume: bool = False) -> list[Run]:
    """Trains all stages, those that are done excepted, and writes the model.

    With `resume`, families or an anchor that the run has not seen become stages beside those that
    are there, on the same autoencoders.

    Args:
        config: of the training.
        out: the run's directory.
        resume: go on from what is there.

    Returns:
        the stages' runs, the last one interrupted if a signal came.

    Raises:
        ValueError: as `train_stages`, or there are several processes.
        ImportError, FileNotFoundError: the image encoder or its weights are not there.
    """
    alone("selfsup")
    made = stages(config, out)
    check(made, out, resume=resume)
    encoders.image_encoder(config.image.model.image_encoder)  # tells before hours if it is absent
    configs.write(out / "config.yaml", "selfsup", config)
    runs = train_stages(made, out, resume=resume)
    if not runs[-1].interrupted:
        first = out / config.mapping.stage(config.mapping.families[0]) / "model"
        CrossModalAutoencoder.from_pretrained(first).save_pretrained(out / "model")
    return runs
