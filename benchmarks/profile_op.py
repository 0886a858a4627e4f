"""Where the time of an op's worst shape goes: python benchmarks/profile_op.py FOLDER

Reads the results that the benchmarks wrote into FOLDER, takes the shape at which fastxm is farthest
from the machine's limit, and writes its kernels, the longest first, to FOLDER/profile.json.
"""

import argparse
import importlib
import json
from pathlib import Path

import torch
from common import DTYPES, calls, environment, precision, write
from torch.profiler import ProfilerActivity, profile

OPS = ("info_nce", "region_word", "mmd", "modulation")
REPEATS = 10


def worst(folder: Path) -> tuple[str, dict]:
    """The op and the row of fastxm with the smallest part of the limit."""
    files = [path for op in OPS if (path := folder / f"{op}.json").exists()]
    rows = [(path.stem, row) for path in files for row in json.loads(path.read_text())["rows"]]
    key = "forward_backward_of_limit"
    found = [(op, row) for op, row in rows if row["provider"] == "fastxm" and key in row]
    if not found:
        raise SystemExit(f"no results of fastxm in {folder}")
    return min(found, key=lambda pair: pair[1][key])


def kernels(call, device: str) -> list[dict]:
    """Microseconds and launches of one call, by kernel."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    call()
    with profile(activities=kinds) as trace:
        for _ in range(REPEATS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda e: getattr(e, key), reverse=True)
    return [
        {"name": e.key, "us": getattr(e, key) / REPEATS, "launches": e.count / REPEATS}
        for e in events[:25]
        if getattr(e, key) > 0
    ]


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folder", type=Path)
    folder = flags.parse_args(argv).folder
    op, row = worst(folder)
    device = json.loads((folder / f"{op}.json").read_text())["device"]
    script = importlib.import_module(f"bench_{op}")
    shape = {key: row[key] for key in script.SHAPES["quick"][0]}
    with precision(shape["dtype"]):
        case = script.case(shape, DTYPES[shape["dtype"]], device)
        call = calls(case.providers["fastxm"], case.inputs)["forward_backward"]
        rows = kernels(call, device)
    share = row["forward_backward_of_limit"]
    print(f"{op} {shape}: {share:.1%} of the limit, {row['forward_backward_ms']:.3f} ms")
    for kernel in rows:
        print(f"{kernel['us']:10.1f} us {kernel['launches']:6.1f} x  {kernel['name'][:100]}")
    facts = {"op": op, "shape": shape, "of_limit": share, "kernels": rows}
    write(folder / "profile.json", {**environment(device), **facts})


if __name__ == "__main__":
    main()
