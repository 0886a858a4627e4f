"""What decides a training of LAFITE, at the values of the released code."""

from dataclasses import dataclass, field
from typing import Literal

from fastxm.data.transforms import parse
from fastxm.models.lafite import LAFITEConfig
from fastxm.training.joint_data import OF_ENCODER
from fastxm.training.trainer import LoopConfig

SHARES = ("label_fraction", "text_share", "smallest_crop", "text_noise", "style_mixing")
WEIGHTS = ("encoder_weight", "semantic_weight", "picture_weight", "feature_weight", "r1_gamma",
           "path_weight", "ema_ramp", "lr_d")  # fmt: skip


@dataclass(frozen=True)
class LAFITETraining:
    """Everything that decides a training of LAFITE."""

    model: LAFITEConfig = field(default_factory=LAFITEConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    data: str = "emoji"
    """"emoji", or a folder or tar shards of pictures, captioned or not."""
    encoder: str = ""
    """Directory of a joint encoder (CLIP or a dual encoder); empty trains one on a part of data."""
    encoder_size: int = 96
    """Side of the pictures that a trained encoder is given."""
    split: Literal["auto", "styles", "concepts", "all"] = "auto"
    """Which pictures: those of a style, or of a style and half of the concepts, that the encoder's
    pairs do not have, or all; auto is styles, with --encoder all."""
    corpus: str = ""
    """Texts of no picture in particular, whose mean given a picture's embedding its pseudo texts
    are around, instead of around the embedding: a file, one a line; "encoder", the captions that
    the encoder was trained on; or "auto", those, and none with --encoder."""
    label_fraction: float = 0.0
    """Share of the pictures whose captions are learnt from, in [0, 1]."""
    batch_size: int = 64
    """Pictures in an update, of all processes together; of several a multiple of 4."""
    lr: float = 0.0025
    """Adam's step, before the correction for lazy regularisation."""
    lr_d: float = 0.0
    """The discriminator's; 0 for the same."""
    adversarial: Literal["logistic", "hinge"] = "logistic"
    """What real and drawn pictures are told apart by: softplus as above, or the hinge."""
    contrast: Literal["plain", "sharpened"] = "plain"
    """InfoNCE, or the released code's exponential of it."""
    temperature: float = 0.5
    """Of the contrastive losses."""
    text_share: float = 0.0
    """Weight of telling a picture's text; the rest tells a text's picture."""
    encoder_weight: float = 10.0
    """itc: of drawn pictures and texts, in the encoder's space."""
    semantic_weight: float = 10.0
    """itd: of pictures and texts, in the discriminator's space."""
    picture_weight: float = 0.0
    """iic: of drawn pictures and real ones, in the encoder's space."""
    feature_weight: float = 0.0
    """iid: of drawn pictures and real ones, in the discriminator's space."""
    smallest_crop: float = 0.5
    """Least side of the square that the encoder sees of a drawn picture, of the picture's."""
    text_noise: float = 0.1
    """Share of noise in the embeddings of captions that are learnt from."""
    r1_gamma: float = 10.0
    """Weight of R1."""
    r1_every: int = 16
    """Steps between R1's; 0 leaves it out."""
    path_weight: float = 2.0
    """Weight of the path length."""
    path_every: int = 4
    """Steps between those of the path length; 0 leaves it out."""
    style_mixing: float = 0.9
    """Probability of a second w."""
    ema_images: int = 20_000
    """Pictures over which the generator's moving average forgets half."""
    ema_ramp: float = 0.05
    """Of all pictures seen so far, the largest share of that; 0 does without."""
    perturbation_steps: int = 2000
    """Steps of the trained perturbation, before it is frozen."""
    augment: str = ""
    """Of pictures that the discriminator judges: any of color,translation,cutout."""
    share_fakes: bool = False
    """Let the discriminator judge what the generator's update drew, not pictures drawn anew."""
    flip: bool = False
    """Mirror half of the real pictures."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of convolutions and matrix products; auto is bf16 where the device has it."""
    compile: bool = False
    """torch.compile what no second derivative is taken of."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of weights, noise and the order of the data."""
    samples: int = 32
    """Pictures in a sample grid."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("batch_size", "samples", "ema_images", "encoder_size"), 1)
        least |= dict.fromkeys(("r1_every", "path_every", "perturbation_steps", *WEIGHTS), 0)
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        for name in ("lr", "temperature", "smallest_crop"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is in [0, 1], not {getattr(self, name)}")
        if self.model.discriminator == "projected" and self.r1_every:
            raise ValueError(
                "a projected discriminator has no second derivative, which R1 takes: "
                f"with it r1_every is 0, not {self.r1_every}"
            )
        parse(self.augment)
        if self.split == "all" and not self.encoder:
            raise ValueError("split all needs an encoder: without one, some pairs are to train it")
        if self.corpus == OF_ENCODER and self.encoder:
            raise ValueError(
                "corpus encoder is what an encoder trained here learnt from: "
                "with an encoder that is given, give a file"
            )
