"""Pictures of benchmarks' rows, where matplotlib is installed."""

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


def curves(rows: list[dict], memory: list[dict], path: Path, depth: int) -> None:
    """Time and peak memory of info_nce against N, a column of panels for each dtype.

    Args:
        rows: of the benchmark of info_nce.
        memory: rows of memory alone, for what was not timed.
        path: of the picture.
        depth: the D of the rows that are drawn.
    """
    from matplotlib.figure import Figure

    known = {(r["provider"], r["N"], r["dtype"]) for r in rows if "peak_mb" in r}
    more = [r for r in memory if (r["provider"], r["N"], r["dtype"]) not in known]
    drawn = [r for r in [*rows, *more] if r["D"] == depth and r["provider"] not in HIDDEN]
    dtypes = list(dict.fromkeys(row["dtype"] for row in drawn))
    names = list(dict.fromkeys(row["provider"] for row in drawn if row.get("peak_mb")))
    figure = Figure(figsize=(4.6 * len(dtypes), 7), layout="constrained")
    axes = figure.subplots(2, len(dtypes), squeeze=False, sharex=True, sharey="row")
    parts = (("forward_backward_ms", "ms"), ("peak_mb", "MB beyond inputs"))
    for column, dtype in zip(axes.T, dtypes):
        of_dtype = [row for row in drawn if row["dtype"] == dtype]
        for axis, (key, unit) in zip(column, parts):
            for i, name in enumerate(names):
                found = [(r["N"], r[key]) for r in of_dtype if r["provider"] == name and r.get(key)]
                ours = name.startswith("fastxm")
                style = {"color": f"C{i}", "lw": 2.2 if ours else 1.1, "marker": "o", "ms": 3}
                axis.plot(*zip(*sorted(found)) if found else ([], []), label=name, **style)
            axis.set(xscale="log", yscale="log", ylabel=unit)
            axis.grid(alpha=0.3)
        limits = [(r["N"], r["limit_ms"]) for r in of_dtype if "limit_ms" in r]
        column[0].plot(*zip(*sorted(limits)), "k--", lw=1, label="limit: matrix products alone")
        sizes = sorted({row["N"] for row in drawn})
        column[1].set_xticks(sizes, [str(n) for n in sizes], fontsize=7)
        column[1].minorticks_off()
        column[0].set_title(f"{dtype}, D = {depth}: forward + backward", fontsize=9)
        column[1].set_xlabel("N")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


HIDDEN = ("fastxm reference", "pytorch-metric-learning")  # at the smallest N alone
