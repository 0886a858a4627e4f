"""A picture of a benchmark's rows, where matplotlib is installed."""

import importlib.util
from pathlib import Path


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Bars of forward + backward, one panel a shape; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, float]]] = {}
    shape: list[str] = []
    for row in rows:
        if row["provider"] == "limit":
            # a shape's own keys stand before "provider"
            shape = list(row)[: list(row).index("provider")]
        if "forward_backward_ms" in row and "error" not in row:
            label = " ".join(f"{key}={row[key]}" for key in shape)
            panels.setdefault(label, []).append((row["provider"], row["forward_backward_ms"]))
    if not panels:
        return
    height = sum(len(bars) for bars in panels.values()) * 0.22 + len(panels) * 0.6 + 0.4
    figure = Figure(figsize=(8, height), layout="constrained")
    ratios = [len(bars) + 1 for bars in panels.values()]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    figure.suptitle(title, fontsize=9)
    for axis, (label, bars) in zip(axes, panels.items()):
        names, times = zip(*reversed(bars))
        colors = ["tab:blue" if name.startswith("fastxm") else "tab:gray" for name in names]
        axis.barh(names, times, color=colors)
        axis.set_title(f"{label}: forward + backward, ms", fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)
