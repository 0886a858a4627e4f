"""Writes the measured part of docs/contrastive.md, and draws docs/contrastive.png:

python benchmarks/page.py benchmarks/results/<machine> [<another> ..] [--page docs/contrastive.md]

What stands between the marks <!-- measured --> and <!-- end --> is replaced by tables of the files
info_nce.json and region_word.json there; the picture is of the first machine, and so are the GPU
kernels, which no machine changes. The tables of the others are folded up.
"""

import argparse
import json
import re
from pathlib import Path

from plot import curves

ROOT = Path(__file__).parent.parent
MARKS = ("<!-- measured -->\n", "<!-- end -->\n")
DEPTH = 512  # of the picture


def shape_of(row: dict) -> dict:
    """A row's sizes, which stand before its provider."""
    return {k: v for k, v in list(row.items())[: list(row).index("provider")] if k != "dtype"}


def head_of(row: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in shape_of(row).items())


def with_limits(rows: list[dict]) -> list[dict]:
    """The rows, those of the limit with its milliseconds of forward and backward."""
    limits = {}
    for row in rows:
        if "forward_backward_of_limit" in row:
            ms = row["forward_backward_of_limit"] * row["forward_backward_ms"]
            limits[row["dtype"], head_of(row)] = ms
    of = lambda row: limits.get((row["dtype"], head_of(row)))  # noqa: E731
    return [
        row | {"limit_ms": of(row)} if row["provider"] == "limit" and of(row) else row
        for row in rows
    ]


def markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def times(rows: list[dict]) -> str:
    """Of one dtype: ms (times the limit); the fastest of those of one function is in bold."""
    heads = list(dict.fromkeys(map(head_of, rows)))
    cells: dict[str, dict[str, str]] = {}
    errors, best = {}, {}
    for row in rows:
        ms = row.get("forward_backward_ms")
        if ms and "computes" not in row:
            best[head_of(row)] = min(ms, best.get(head_of(row), ms))
        if "float64_error" in row:
            errors[row["provider"]] = max(row["float64_error"], errors.get(row["provider"], 0.0))
    for row in rows:
        ms, name = row.get("forward_backward_ms"), row["provider"]
        if row.get("limit_ms"):
            text = figures(row["limit_ms"])
        elif ms:
            text = f"{figures(ms)} ({1 / row['forward_backward_of_limit']:.2f})"
            if ms == best.get(head_of(row)) and "computes" not in row:
                text = f"**{text}**"
        else:
            continue
        name += " \\*" if "computes" in row else ""
        cells.setdefault(name, {})[head_of(row)] = text
    error = lambda name: f"{errors[name]:.0e}" if name in errors else ""  # noqa: E731
    body = [
        [name, *(found.get(head, "") for head in heads), error(name.removesuffix(" \\*"))]
        for name, found in cells.items()
    ]
    return markdown([["ms (times the limit)", *heads, "error"], *body])


def memory(rows: list[dict], alone: list[dict]) -> str:
    """Of one dtype: MB; what was measured in a process of its own replaces what was not."""
    cells: dict[str, dict[str, str]] = {}
    for row in [*rows, *alone]:
        if row.get("peak_mb") is not None:
            cells.setdefault(row["provider"], {})[head_of(row)] = f"{row['peak_mb']:.0f}"
    for row in alone:
        if "skipped" in row:
            cells.setdefault(row["provider"], {})[head_of(row)] = row["skipped"]
    heads = list(dict.fromkeys(head_of(row) for row in [*rows, *alone]))
    body = [[name, *(found.get(head, "") for head in heads)] for name, found in cells.items()]
    return markdown([["MB beyond inputs", *heads], *body])


def kernels(rows: list[dict]) -> str:
    """The most that any variant of a kernel takes; spills are fewer than the bytes shown."""
    most: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        found = re.search(r"\.(cu):.*?\d([a-z_]+_kernel)|\.(_?[a-z_]+)$", row["kernel"])
        kind, name = ("CUDA", found[2]) if found[1] else ("Triton", found[3])
        key = (f"{kind} `{name.strip('_')}`", row["arch"])
        numbers = [row["registers"], row["spills"], row["shared"], 1]
        old = most.get(key, [0, 0, 0, 0])
        most[key] = [*map(max, numbers[:3], old), old[3] + 1]
    heads = ["kernel", "variants", "registers", "bytes spilled", "shared bytes"]
    body = [
        [f"{name}, {arch}", str(count), *map(str, numbers)]
        for (name, arch), (*numbers, count) in sorted(most.items())
        if arch in ("sm_80", "sm_90a")
    ]
    return markdown([heads, *body])


def figures(ms: float) -> str:
    """Three digits, and no exponent."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def section(result: dict, first: bool) -> list[str]:
    rows, alone = with_limits(result["rows"]), result.get("memory", [])
    parts = [f"### {result['op']}"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        parts += [f"{dtype}, forward and backward:", times(of_dtype)]
        parts += [memory(of_dtype, [row for row in alone if row["dtype"] == dtype])]
    other = dict.fromkeys(
        f"\\* {row['provider']} computes {row['computes']}." for row in rows if "computes" in row
    )
    absent = {r["provider"]: r["skipped"] for r in rows if "not installed" in r.get("skipped", "")}
    if absent:
        other[f"Not installed: {', '.join(absent)}."] = None
    parts += [" ".join(other)] if other else []
    if first and result.get("kernels"):
        of = f" of {result['kernels_commit']}" if "kernels_commit" in result else ""
        head = f"Its GPU kernels{of}, the most that any variant takes:"
        parts += [head, kernels(result["kernels"])]
    return parts


def of_machine(results: list[dict], first: bool) -> list[str]:
    one = results[0]
    where = f"On {one['chip']}, {one['threads']} threads, PyTorch {one['torch']}"
    where += f", fastxm {one['commit']}"
    parts = [part for result in results for part in section(result, first)]
    if first:
        return [f"{where}.", *parts]
    return ["<details>", f"<summary>{where}</summary>", *parts, "</details>"]


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folders", type=Path, nargs="+", help="results of the benchmarks")
    flags.add_argument("--page", type=Path, default=ROOT / "docs" / "contrastive.md")
    args = flags.parse_args(argv)
    machines = [
        [json.loads((folder / f"{op}.json").read_text()) for op in ("info_nce", "region_word")]
        for folder in args.folders
    ]
    first = machines[0][0]
    parts = [part for i, results in enumerate(machines) for part in of_machine(results, i == 0)]
    text = args.page.read_text()
    if text.count(MARKS[0]) != 1 or MARKS[1] not in text.split(MARKS[0])[1]:
        raise SystemExit(f"{args.page} has no place for the tables: {MARKS[0]} and {MARKS[1]}")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1], 1)[1]
    body = "\n\n".join(parts)
    args.page.write_text(f"{before}{MARKS[0]}\n{body}\n\n{MARKS[1]}{after}")
    rows, alone = with_limits(first["rows"]), first.get("memory", [])
    depth = DEPTH if any(row.get("D") == DEPTH for row in rows) else rows[0]["D"]
    curves(rows, alone, args.page.with_suffix(".png"), depth)


if __name__ == "__main__":
    main()
