"""A captioned data set and a text encoder made from nothing, for machines that hold neither.

python benchmarks/synthetic.py FOLDER writes FOLDER/pictures and FOLDER/encoder.
"""

import itertools
import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "gray"]
SHAPES = ["circle", "square", "triangle", "bar"]
SIZES = {"small": 10, "large": 22}
COPIES = 8  # of each colour, shape and size, at random places
SIDE = 64


def pictures(folder: Path) -> Path:
    """512 pictures of one shape each, and metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    places = random.Random(0)
    lines = []
    for size, color, shape, copy in itertools.product(SIZES, COLORS, SHAPES, range(COPIES)):
        x, y = (places.uniform(24, SIDE - 24) for _ in range(2))
        image = Image.new("RGB", (SIDE, SIDE), "white")
        paint(ImageDraw.Draw(image), shape, color, x, y, SIZES[size])
        name = f"{size}-{color}-{shape}-{copy}.png"
        image.save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"a {size} {color} {shape}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def paint(draw: ImageDraw.ImageDraw, shape: str, color: str, x: float, y: float, r: int) -> None:
    box = [x - r, y - r, x + r, y + r]
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=color)
    else:
        flat = r if shape == "square" else r / 3
        draw.rectangle([x - r, y - flat, x + r, y + flat], fill=color)


def encoder(folder: Path) -> Path:
    """A BERT of random weights that knows the words of the captions."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *SIZES, *COLORS, *SHAPES]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(pictures(target / "pictures"), encoder(target / "encoder"))
