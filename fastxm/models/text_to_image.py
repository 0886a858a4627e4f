"""What the models that draw pictures of captions share: `generate`."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastxm.models.pretrained import Pretrained

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TextToImage(Pretrained):
    """A generator and what encodes its captions.

    The generator is called as generator(noise [B, noise_width], words [B, T, E], sentence [B, E],
    lengths [B]).
    """

    generator: nn.Module

    @property
    @abstractmethod
    def image_size(self) -> int:
        """S, the side of the pictures."""

    @property
    @abstractmethod
    def noise_width(self) -> int:
        """Random numbers of a picture."""

    @property
    @abstractmethod
    def text_encoder(self) -> Any:
        """What encodes captions: encoder(captions) has words, sentence and lengths."""

    @abstractmethod
    def attach(self, encoder: Any) -> None:
        """Uses this text encoder."""

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.generator.parameters()).dtype

    def picture(self, drawn: Any) -> Tensor:
        """[B, 3, S, S] in [0, 1], of what the generator returned."""
        return drawn

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        *,
        num_images: int = 1,
        seed: int | None = None,
        batch_size: int = 64,
        output: str = "tensor",
        precision: str = "fp32",
        compile: bool = False,
    ) -> Any:
        """Draws pictures of captions; the model stays as it was.

        Args:
            captions: at least one.
            num_images: pictures of each caption.
            seed: of the noise, which is drawn picture by picture: picture k of a caption is the
                same whatever the other captions are. None draws from PyTorch's global state.
            batch_size: pictures at once.
            output: "tensor" or "pil".
            precision: "fp32", "bf16" or "fp16".
            compile: run the generator under torch.compile.

        Returns:
            [len(captions) * num_images, 3, S, S] in [0, 1], float32 on the CPU, the pictures of one
            caption together; or as many PIL images.
        """
        captions = check_captions(captions)
        for name, count in {"num_images": num_images, "batch_size": batch_size}.items():
            if count < 1:
                raise ValueError(f"{name} is at least 1, not {count}")
        for name, value, known in (
            ("output", output, ("tensor", "pil")), ("precision", precision, tuple(PRECISIONS)),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} is one of {known}, not {value!r}")
        noise = self.noise(len(captions), num_images, seed)
        device, dtype = self.device, PRECISIONS[precision]
        network = torch.compile(self.generator) if compile else self.generator
        with evaluating(self):
            encoded = self.encode(captions, batch_size)
            text = [part.repeat_interleave(num_images, 0) for part in encoded]
            given = [part.to(device, self.dtype if part.is_floating_point() else part.dtype)
                     for part in (noise, *text)]  # fmt: skip
            rows = zip(*(part.split(batch_size) for part in given))
            with torch.autocast(device.type, dtype, enabled=bool(dtype)):
                images = torch.cat([self.picture(network(*row)).float().cpu() for row in rows])
        return to_pil(images) if output == "pil" else images

    def encode(self, captions: list[str], batch_size: int) -> list[Tensor]:
        """words [B, T, E], sentence [B, E] and lengths [B] of B captions, each encoded once."""
        starts = range(0, len(captions), batch_size)
        parts = [self.text_encoder(captions[start : start + batch_size]) for start in starts]
        return [torch.cat([getattr(p, n) for p in parts]) for n in ("words", "sentence", "lengths")]

    def noise(self, captions: int, num_images: int, seed: int | None) -> Tensor:
        """[captions * num_images, noise_width]; with a seed, all pictures k have the same."""
        width = self.noise_width
        if seed is None:
            return torch.randn(captions * num_images, width)
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(width, generator=generator) for _ in range(num_images)]
        return torch.stack(rows).repeat(captions, 1)


def check_captions(captions: Sequence[str]) -> list[str]:
    listed = None if captions is None or isinstance(captions, str) else list(captions)
    if listed is None or not all(isinstance(caption, str) for caption in listed):
        raise TypeError(f"captions are a list of strings, not {captions!r}")
    if not listed:
        raise ValueError("generate needs at least one caption")
    return listed


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode that each of its parts had outside."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def to_pil(images: Tensor) -> list[Any]:
    """PIL images of [B, 3, S, S] in [0, 1]."""
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]
