"""Augmentation that gradients pass through: colour, translation and cutout of a batch.

Applied to real and generated pictures alike before the discriminator, it stretches a small data
set without leaking into what is generated (Zhao et al., Differentiable Augmentation for
Data-Efficient GAN Training, NeurIPS 2020).
"""

import torch
from torch import Tensor

BRIGHTNESS, SATURATION, CONTRAST, SHIFT_Y, SHIFT_X, CUT_Y, CUT_X = range(7)
POLICIES = ("color", "translation", "cutout")
SHIFT = 1 / 8  # the largest translation, of the side
CUT = 1 / 2  # the side of the cut square, of the side


def augment(
    images: Tensor,
    policy: str = "color,translation,cutout",
    *,
    parameters: Tensor | None = None,
    generator: torch.Generator | None = None,
    fill: float = 0.5,
) -> Tensor:
    """Augments each picture by its own random parameters.

    Args:
        images: [B, 3, H, W] in [0, 1].
        policy: any of "color", "translation" and "cutout", with commas between; "" for none.
        parameters: [B, 7] of `draw`; two batches that share them are augmented alike.
        generator: draws the parameters if they are not given. Compiled code takes parameters.
        fill: the value of what was cut away.

    Returns:
        [B, 3, H, W]; colours may leave [0, 1], where clamping would stop the gradient.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"augment needs images [B, 3, H, W], not {tuple(images.shape)}")
    chosen = parse(policy)
    if parameters is None:
        parameters = draw(len(images), generator=generator, device=images.device)
    if parameters.shape != (len(images), 7):
        raise ValueError(
            f"parameters are [{len(images)}, 7] of draw(), not {tuple(parameters.shape)}"
        )
    if "color" in chosen:
        images = jitter(images, parameters)
    if "translation" in chosen:
        images = translate(images, parameters)
    if "cutout" in chosen:
        images = cut(images, parameters, fill)
    return images


def parse(policy: str) -> list[str]:
    """The parts of a policy, such as "color,cutout"."""
    chosen = [part.strip() for part in policy.split(",") if part.strip()]
    if unknown := set(chosen) - set(POLICIES):
        raise ValueError(f"a policy is made of {POLICIES}, not {sorted(unknown)}")
    return chosen


def draw(
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random parameters of a batch: [B, 7], uniform in [0, 1), whatever the policy."""
    source = device if generator is None else generator.device
    return torch.rand(batch_size, 7, generator=generator, device=source).to(device)


def jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Brightness by -1/4 to 1/4, saturation by 0 to 2, contrast by 1/2 to 3/2."""
    u = parameters.to(images.dtype)[:, :, None, None, None].unbind(1)  # 7 of [B, 1, 1, 1]
    images = images + (u[BRIGHTNESS] - 0.5) / 2
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * u[SATURATION])
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + (images - middle) * (u[CONTRAST] + 0.5)


def translate(images: Tensor, parameters: Tensor) -> Tensor:
    """Moves each picture by whole pixels, up to an eighth of its side; its border moves in.

    A constant there would draw straight edges into pictures on white, which a generator copies.
    """
    B, C, H, W = images.shape
    room_y, room_x = round(H * SHIFT), round(W * SHIFT)
    rows, columns = (
        (origins(parameters[:, shift], 2 * room) - room + torch.arange(side, device=images.device))
        .clamp(0, side - 1)
        for shift, room, side in ((SHIFT_Y, room_y, H), (SHIFT_X, room_x, W))
    )  # fmt: skip
    tall = images.gather(2, rows[:, None, :, None].expand(B, C, H, W))
    return tall.gather(3, columns[:, None, None, :].expand(B, C, H, W))


def cut(images: Tensor, parameters: Tensor, fill: float) -> Tensor:
    """Replaces a square of half the side, around any point of the picture."""
    inside = []
    for side, column in zip(images.shape[2:], (CUT_Y, CUT_X)):
        size = round(side * CUT)
        start = origins(parameters[:, column], side) - size // 2
        place = torch.arange(side, device=images.device)
        inside.append((place >= start) & (place < start + size))  # [B, side]
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(square, fill, images)


def origins(u: Tensor, largest: int) -> Tensor:
    """Whole numbers from 0 to largest, each as likely. u: [B]. Returns int64 [B, 1]."""
    return (u.float() * (largest + 1)).long().clamp(max=largest)[:, None]


def random_flip(
    images: Tensor,
    p: float = 0.5,
    *,
    drawn: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mirrors each picture left to right with probability p; not for flags or letters.

    Args:
        images: [B, C, H, W].
        p: 0 to 1.
        drawn: [B], uniform in [0, 1): those below p are mirrored.
        generator: draws them if they are not given.
    """
    if drawn is None:
        source = images.device if generator is None else generator.device
        drawn = torch.rand(len(images), generator=generator, device=source)
    flipped = drawn.to(images.device) < p
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def random_square(
    images: Tensor, smallest: float = 0.5, *, generator: torch.Generator | None = None
) -> Tensor:
    """A square of random side and place, the same of every picture.

    Args:
        images: [B, C, S, S].
        smallest: the side's least share of S, in (0, 1].

    Returns:
        [B, C, s, s], a view; s from smallest * S to S.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest is in (0, 1], not {smallest}")
    size, place = images.shape[-1], torch.rand(3, generator=generator).tolist()
    side = round(size * (smallest + (1 - smallest) * place[0]))
    top, left = (int(u * (size - side + 1)) for u in place[1:])
    return images[..., top : top + side, left : left + side]
