"""What the benchmarks share: providers timed in turn, with the limit beside them; tables; JSON.

A script names shapes and makes a `Case` of each: inputs, providers, and the least work that any
exact method must do. Providers run in rounds (A, B, C, A, B, C, ...) together with the limit
itself, a matrix product or a copy, so that a machine that slows down slows all of them.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from memory import peak_alone, peak_memory
from plot import plot
from timing import repeats, sample
from torch import Tensor

from fastxm.ops import backend
from fastxm.ops.dispatch import BACKENDS, build_info, missing
from fastxm.ops.memory import keep_freed_memory

ROOT = Path(__file__).parent.parent
LEAST = 3  # samples of a slow call
Shape = dict[str, Any]
Provider = Callable[..., "Tensor | tuple[Tensor, ...]"]
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Case:
    """One shape of one op.

    Args:
        inputs: what every provider is called with; those that require a gradient get one.
        providers: functions of the inputs by name, or the line that says why there is none.
        work: operations or bytes of forward, and of forward and backward together.
        bound: "gemm" if the work is operations, "copy" if it is bytes.
        other: what providers compute that do not compute the first one's function: in words, and as
            a formula.
        untimed: why providers are not run here, whose memory can still be measured alone.
    """

    inputs: tuple[Tensor, ...]
    providers: dict[str, Provider | str]
    work: tuple[float, float]
    bound: str = "gemm"
    other: dict[str, tuple[str, Provider]] = field(default_factory=dict)
    untimed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Forced:
    """An op under one backend, forward and backward."""

    op: Provider
    backend: str

    def __call__(self, *inputs: Tensor):
        return self.op(*inputs)


def ours(op: Provider, device: str) -> dict[str, Provider | str]:
    """The op as it chooses for itself, and under every backend that could run on the device."""

    found: dict[str, Provider | str] = {"fastxm": op}
    for name in BACKENDS:
        if name in ("cpu", "cuda") and name != device:
            continue
        found[f"fastxm {name}"] = missing(name) or Forced(op, name)
    return found


def peer(module: str, build: Callable[[Any], Provider], *, cuda_on: str = "") -> Provider | str:
    """What `build` makes of an installed package, or why it cannot be measured.

    Args:
        module: its import name.
        build: makes the provider of the imported module.
        cuda_on: the device of the run, for a package that only knows CUDA.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "not installed"
    if cuda_on and cuda_on != "cuda":
        return "needs a CUDA device"
    try:
        return build(importlib.import_module(module))
    except Exception as error:  # a peer that cannot be imported must not end the run
        return describe(error)


def wide(t: Tensor) -> Tensor:
    """In float32, or in float64 if it is that."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def compiled(formula: Provider) -> Provider:
    return torch.compile(formula, fullgraph=True, dynamic=False)


def describe(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def calls(provider: Provider, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """Forward without gradients, and forward with backward, as functions of nothing."""
    leaves = [x for x in inputs if x.requires_grad]
    cotangents: list[Tensor] = []

    def scope():
        return (
            backend(provider.backend) if isinstance(provider, Forced) else contextlib.nullcontext()
        )

    def forward():
        with torch.no_grad(), scope():
            return provider(*inputs)

    def both():
        with scope():
            out = provider(*inputs)
            outs = out if isinstance(out, tuple) else (out,)
            if not cotangents:
                generator = torch.Generator(outs[0].device).manual_seed(1)
                new = {"device": outs[0].device, "generator": generator}
                cotangents.extend(torch.randn(o.shape, **new).to(o.dtype) for o in outs)
            return outs, torch.autograd.grad(outs, leaves, cotangents, allow_unused=True)

    return {"forward": forward, "forward_backward": both}


def difference(result: Any, truth: Any) -> float:
    """The largest relative error |a - b| / |b| among outputs and gradients that both have."""
    wide = lambda t: None if t is None else t.detach().double()  # noqa: E731
    pairs = [(wide(a), wide(b)) for pair in zip(result, truth) for a, b in zip(*pair)]
    found = [
        float((a - b).norm() / b.norm().clamp(min=1e-30))
        for a, b in pairs
        if a is not None and b is not None and a.shape == b.shape
    ]
    return math.nan if any(map(math.isnan, found)) else max(found)


def float64_errors(case: Case) -> dict[str, float]:
    """The `difference` of each provider that runs from float64, of the function that it computes.

    The formulas, and the first provider, keep float64 as it is.
    """
    first = next(iter(case.providers.values()))
    floats = [t.is_floating_point() for t in case.inputs]
    wide = tuple(
        t.detach().double().requires_grad_(t.requires_grad) if is_float else t
        for t, is_float in zip(case.inputs, floats)
    )
    truths: dict[Provider | str, Any] = {}
    found = {}
    for name, provider in case.providers.items():
        if isinstance(provider, str):
            continue
        formula = case.other[name][1] if name in case.other else first
        if formula not in truths:
            truths[formula] = calls(formula, wide)["forward_backward"]()
        with contextlib.suppress(Exception):  # one that fails here fails, and says so, in `measure`
            result = calls(provider, case.inputs)["forward_backward"]()
            found[name] = difference(result, truths[formula])
    return found


def limit(bound: str, dtype: torch.dtype, device: str, quick: bool) -> tuple[Callable, float]:
    """A call that runs at the machine's limit, warmed up, and its operations (gemm) or bytes."""
    if bound == "copy":
        count = 2**20 if quick else {"cpu": 2**26, "cuda": 2**30}[device]
        source = torch.randn(count // 4, device=device)
        target = source.clone()
        return lambda: target.copy_(source), 2 * 4 * source.numel()
    n = 256 if quick else {"cpu": 2048, "cuda": 8192}[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def measure(
    case: Case, dtype: torch.dtype, args: argparse.Namespace, errors: dict[str, float]
) -> list[dict]:
    """One row a provider; the first row is the machine's limit."""
    limiter, amount = limit(case.bound, dtype, args.device, args.quick)
    ready: dict[tuple[str, str], Callable] = {("limit", case.bound): limiter}
    rows: dict[str, dict] = {name: {"provider": name} for name in case.providers}
    truth = None
    for name, error in errors.items():
        rows[name]["float64_error"] = error
        if name in case.other:
            rows[name]["computes"] = case.other[name][0]
        elif not error < torch.finfo(dtype).eps ** 0.5:  # which is no rounding
            rows[name]["computes"] = "NOT THE SAME, without this being known"
    for name, provider in case.providers.items():
        provider = case.untimed.get(name, provider)
        if isinstance(provider, str):
            rows[name]["skipped"] = provider
            continue
        try:
            parts = calls(provider, case.inputs)
            parts["forward"]()
            result = parts["forward_backward"]()
            truth = result if truth is None else truth
            if name not in case.other:
                rows[name]["difference"] = difference(result, truth)
            del result
            rows[name]["peak_mb"] = peak_memory(parts["forward_backward"], args.device)
            ready |= {(name, part): call for part, call in parts.items()}
        except NotImplementedError as error:
            rows[name]["skipped"] = str(error).split("\n")[0][:160]
        except Exception as error:  # reported in the table; the others go on
            rows[name]["error"] = describe(error)
        gc.collect()
    del truth
    times = interleave(ready, args, rows)
    seconds = median(times.pop(("limit", case.bound)))
    for (name, part), found in times.items():
        rows[name][f"{part}_ms"] = 1e3 * median(found)
        low, _, high = quantiles(found, n=4) if len(found) > 1 else [found[0]] * 3
        rows[name][f"{part}_ms_quartiles"] = [1e3 * low, 1e3 * high]
    rate = amount / seconds
    for row in rows.values():
        add_ratios(row, case.work, rate, rows)
    unit = "flops_per_s" if case.bound == "gemm" else "bytes_per_s"
    return [{"provider": "limit", "bound": case.bound, unit: rate}, *rows.values()]


def interleave(ready: dict, args: argparse.Namespace, rows: dict) -> dict[Any, list[float]]:
    """Times of every call in seconds: a slice of each in turn, `args.rounds` times.

    One that takes longer than its slice leaves out the rounds after `args.seconds`, but for LEAST.
    """
    each = {key: repeats(call, args.device, args.seconds / args.rounds)
            for key, call in ready.items()}  # fmt: skip
    times: dict[Any, list[float]] = {key: [] for key in ready}
    for _ in range(args.rounds):
        for key in list(times):
            if len(times[key]) >= LEAST and sum(times[key]) >= args.seconds > 0:
                continue
            try:
                times[key] += sample(ready[key], each[key], args.device)
            except Exception as error:
                rows[key[0]]["error"] = describe(error)
                del times[key]
    return times


def add_ratios(row: dict, work: tuple[float, float], rate: float, rows: dict[str, dict]) -> None:
    for part, amount in zip(("forward", "forward_backward"), work):
        if f"{part}_ms" in row:
            row[f"{part}_of_limit"] = amount / rate / (row[f"{part}_ms"] / 1e3)
    for other in ("eager", "compiled"):
        theirs = rows.get(other, {}).get("forward_backward_ms")
        if theirs and "forward_backward_ms" in row:
            row[f"speedup_over_{other}"] = theirs / row["forward_backward_ms"]


COLUMNS = {
    "fwd ms": "forward_ms:.3f",
    "fwd+bwd ms": "forward_backward_ms:.3f",
    "peak MB": "peak_mb:.1f",
    "fwd of limit": "forward_of_limit:.1%",
    "of limit": "forward_backward_of_limit:.1%",
    "vs eager": "speedup_over_eager:.2f",
    "vs compiled": "speedup_over_compiled:.2f",
    "rel. diff": "difference:.1e",
    "float64": "float64_error:.1e",
}


def table(title: str, rows: list[dict], columns: dict[str, str] = COLUMNS) -> str:
    """The rows as text: aligned columns that are also Markdown.

    Args:
        title: above it.
        rows: of one shape; those without figures follow the table with their reason.
        columns: head of each column, and "key:format" of its figures.
    """
    lines, notes = [["provider", *columns]], []
    for row in rows:
        if why := row.get("skipped") or row.get("error"):
            kind = "skipped" if "skipped" in row else "FAILED"
            notes.append(f"{row['provider']}: {kind}: {why}")
        elif row["provider"] != "limit":
            cells = [key.split(":") for key in columns.values()]
            texts = [format(row[k], spec) if row.get(k) is not None else "-" for k, spec in cells]
            lines.append([row["provider"], *texts])
            if "computes" in row:
                notes.append(f"{row['provider']}: computes {row['computes']}")
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(["", title, *(f"| {' | '.join(line)} |" for line in padded), *notes])


def chip(device: str) -> str:
    """The name of what computes; of a CPU with the instruction set that its kernels use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
    return f"{name}, {build_info()['cpu']}"


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def environment(device: str) -> dict:
    """Where and with what: the head of each table and file."""
    triton = importlib.util.find_spec("triton")
    return {
        "chip": chip(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if triton else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
    }


def machine(env: dict) -> str:
    """The folder of a machine's results: nvidia-h200, intel-xeon-avx512-2-threads."""
    name = env["chip"] if env["device"] == "cuda" else f"{env['chip']} {env['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", name.lower())).strip("-")


def parse_shape(text: str, default: Shape) -> Shape:
    """ "N=4096,D=512,dtype=bfloat16" over the default's other entries."""
    pairs = dict(part.split("=", 1) for part in text.split(","))
    if unknown := set(pairs) - set(default):
        raise SystemExit(f"a shape has {', '.join(default)}, not {', '.join(unknown)}")
    return default | {k: int(v) if v.isdigit() else v for k, v in pairs.items()}


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    flags = argparse.ArgumentParser(description=description)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    flags.add_argument("--device", choices=["cpu", "cuda"], default=auto)
    flags.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    flags.add_argument("--shapes", nargs="+", metavar="K=V,...", help="instead of the usual ones")
    flags.add_argument("--providers", nargs="+", help="only those whose name begins so")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--seconds", type=float, default=2.0, help="of each provider and shape")
    flags.add_argument("--kernels", type=Path, help="of tests/compile.py --json: kept as well")
    flags.add_argument("--out", type=Path, help="folder (results/<machine>)")
    return flags


def output_folder(args: argparse.Namespace, env: dict) -> Path | None:
    if args.out is None and not (args.quick or args.shapes or args.providers):
        return ROOT / "benchmarks" / "results" / machine(env)
    return args.out


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, default=str, allow_nan=False)
    path.write_text(text + "\n")


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float32 products by tf32 for "tf32", in full otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def main(
    op: str,
    shapes: dict[str, list[Shape]],
    make: Callable[[Shape, torch.dtype, str], Case],
    argv: Sequence[str] | None = None,
    *,
    small: Shape | None = None,
    alone: dict[str, Sequence[tuple[str, Shape]]] | None = None,
) -> list[dict]:
    """Runs the benchmark of one op and returns its rows.

    Args:
        op: the op's name, and that of the result files.
        shapes: by "cpu", "cuda" and "quick"; each with a "dtype" of DTYPES.
        make: (shape, dtype, device) -> Case.
        argv: command line, default sys.argv.
        small: sizes at most so large, at which every provider is compared with float64.
        alone: as `shapes`: (provider, shape) whose peak memory is measured in a process of its own,
            too, unless other shapes or providers were asked for.
    """
    args = parser(f"Benchmark of {op}.").parse_args(argv)
    if args.quick:
        args.rounds, args.seconds = 2, 0.0
    usual = shapes["quick" if args.quick else args.device]
    chosen = [parse_shape(s, usual[0]) for s in args.shapes] if args.shapes else usual
    if args.device == "cpu":
        keep_freed_memory()  # as the trainer does; of use to all providers
    env = environment(args.device)
    folder = output_folder(args, env)
    head = f"{env['chip']}, {env['threads']} threads, torch {env['torch']}, {env['commit']}"
    rows: list[dict] = []
    result: dict[str, Any] = {"op": op, **env, "rows": rows}
    if args.kernels:
        every = json.loads(args.kernels.read_text())
        result["kernels"] = [row for row in every if row["kernel"].startswith(op)]
    errors: dict[str, dict[str, float]] = {}  # of small shapes
    for shape in chosen:
        torch.manual_seed(0)
        torch._dynamo.reset()
        with precision(shape["dtype"]):
            dtype = DTYPES[shape["dtype"]]
            tiny = {k: min(v, (small or {}).get(k, v)) for k, v in shape.items()}
            if small and str(tiny) not in errors:
                case = pick(make(tiny, dtype, args.device), args.providers)
                errors[str(tiny)] = float64_errors(case)
            case = pick(make(shape, dtype, args.device), args.providers)
            found = measure(case, dtype, args, errors.get(str(tiny), {}))
        label = " ".join(f"{k}={v}" for k, v in shape.items())
        print(table(f"{op} {label} ({head}; {speed(found[0])})", found), flush=True)
        rows += [{**shape, **row} for row in found]
        if folder:
            write(folder / f"{op}.json", result | {"rows": clean(rows)})
        del case
        gc.collect()
    if alone and not (args.shapes or args.providers):
        wanted = alone["quick" if args.quick else args.device]
        result["memory"] = [peak_alone(op, name, shape, args.device) for name, shape in wanted]
        columns = {"peak MB": "peak_mb:.1f", **{k: f"{k}:" for k in wanted[0][1]}}
        print(table(f"{op}, each in a process of its own", result["memory"], columns), flush=True)
    if folder:
        write(folder / f"{op}.json", result | {"rows": clean(rows)})
        plot(rows, folder / f"{op}.png", f"{op}: {head}")
        print(f"\nwritten: {folder / op}.json", file=sys.stderr)
    else:
        print("\nnothing written: runs of --quick, --shapes or --providers need --out FOLDER",
              file=sys.stderr)  # fmt: skip
    return rows


def pick(case: Case, names: Sequence[str] | None) -> Case:
    """The case with the providers whose names begin so, or all."""
    wanted = tuple(names or [""])
    case.providers = {k: v for k, v in case.providers.items() if k.startswith(wanted)}
    return case


def speed(row: dict) -> str:
    """The machine's limit in words."""
    if row["bound"] == "gemm":
        return f"gemm {row['flops_per_s'] / 1e12:.3g} TFLOP/s"
    return f"copy {row['bytes_per_s'] / 1e9:.3g} GB/s"


def clean(rows: list[dict]) -> list[dict]:
    """Rows without NaN, which JSON does not have."""
    bad = lambda v: isinstance(v, float) and not math.isfinite(v)  # noqa: E731
    return [{k: str(v) if bad(v) else v for k, v in row.items()} for row in rows]
