"""Everything that needs a GPU, in one command and without a network.

    python benchmarks/gpu.py --minutes 8 [--out DIR] [--only build,test,...] [--archive FILE]

Stages run one after the other, each in a process of its own that is ended at its limit, or before
that once it has had twice its share of the time left: one slow stage does not starve the later
ones, several do; with little time name stages, and go on with others in another call.
Each writes DIR/stage_<name>.json as it ends; DIR/summary.json and a table come last.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
BENCH = ROOT / "benchmarks"
OPS = ("info_nce", "region_word", "mmd", "modulation")
TAIL = 6000  # characters of a stage's output that are kept
RESERVE = 3  # seconds for the summary


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take.

    Args:
        name: as --only knows it.
        command: its arguments, made when the stage begins, or the line that says why there is none.
        limit: seconds; also its weight in the sharing of time.
        env: set for it.
    """

    name: str
    command: Callable[[], list[str] | str]
    limit: int
    env: dict[str, str]


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def stages(out: Path, work: Path) -> list[Stage]:
    """All stages, in order."""
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", ROOT]
    doctor = "from rich.console import Console; from fastxm.doctor import report; report(Console())"
    chosen = "(cuda or triton or gpu) and not emulated"
    tests = [ROOT / "tests/ops", ROOT / "tests/test_losses.py", "-k", chosen]
    tests += ["-p", "no:cacheprovider"]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    stages = [
        Stage("build", lambda: python(*install), 150, {"FASTXM_CUDA": "1"}),
        Stage("doctor", lambda: python("-c", doctor), 30, {}),
        Stage("test", lambda: python("-m", "pytest", *tests, *parallel), 150, {}),
        Stage("memcheck", lambda: sanitizer("memcheck"), 60, UNCACHED),
        Stage("racecheck", lambda: sanitizer("racecheck"), 60, UNCACHED),
    ]
    for op in OPS:
        script = [BENCH / f"bench_{op}.py", "--device", "cuda", "--out", out]
        script += ["--rounds", 5, "--seconds", 0.5]
        limit = 180 if op == "info_nce" else 75  # it tries tiles for each class of shapes
        stages.append(Stage(op, lambda script=script: python(*script), limit, {}))
    steps = [BENCH / "bench_training.py", "--device", "cuda", "--out", out]
    steps += ["--rounds", 3, "--seconds", 3]
    return [
        *stages,
        Stage("steps", lambda: python(*steps), 180, {}),
        Stage("profile", lambda: python(BENCH / "profile_op.py", out), 30, {}),
        Stage("train", lambda: training(out, work), 60, {"FASTXM_DATA": str(work / "data")}),
    ]


UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(BENCH)}


def sanitizer(tool: str) -> list[str] | str:
    """The quick benchmarks of the ops, forward and backward, under compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        return "compute-sanitizer is not on PATH"
    runs = [f"import bench_{op}; rows += bench_{op}.run(argv)" for op in OPS]
    code = "\n".join(
        [
            "argv = ['--quick', '--device', 'cuda', '--providers', 'fastxm']",
            "rows = []",
            *runs,
            "raise SystemExit(any('error' in row for row in rows))",
        ]
    )
    return [found, "--tool", tool, "--error-exitcode", "9", *python("-c", code)]


def training(out: Path, work: Path) -> list[str] | str:
    """A short training at 64 px on drawn shapes, which need neither a cache nor a network."""
    if not importlib.util.find_spec("tyro"):
        return "fastxm train needs tyro"
    subprocess.run(python(BENCH / "synthetic.py", work), check=True)
    data = ["--data", work / "pictures", "--text-encoder", work / "encoder", "--text-width", 128]
    command = "from fastxm.cli import main; raise SystemExit(main())"
    flags = ["--preset", "emoji-64", "--pretrained-weight", 0, "--steps", 200, "--samples", 32]
    flags += ["--sample-every", 200, "--log-every", 20, "--out", work / "run"]
    kept = [str(work / "run" / pattern) for pattern in ("metrics.jsonl", "samples/*.png")]
    keep = f"[shutil.copy(path, {str(out)!r}) for p in {kept} for path in glob.glob(p)]"
    code = f"import glob, shutil\ntry:\n    {command}\nfinally:\n    {keep}"
    return python("-c", code, "train", "xmcgan", *data, *flags)


def share(stages: list[Stage], left: float) -> float:
    """Seconds for the first of the stages that are to come."""
    fair = left * stages[0].limit / sum(stage.limit for stage in stages)
    return min(stages[0].limit, 2 * fair, left)


def run(stage: Stage, limit: float, out: Path, work: Path) -> dict:
    """Runs one stage for at most `limit` seconds, and writes what came of it."""
    begin = time.monotonic()
    result: dict = {"stage": stage.name, "limit_s": round(limit, 1)}
    try:
        command = stage.command()
        if limit < 1 or isinstance(command, str):
            result |= {"status": "skipped", "why": command if limit >= 1 else "no time left"}
        else:
            code, text = call(command, limit, os.environ | stage.env, work)
            status = "ok" if code == 0 else "timed out" if code is None else "failed"
            result |= {"status": status, "returncode": code, "output": text[-TAIL:]}
            (out / f"stage_{stage.name}.log").write_text(text)
    except (OSError, subprocess.SubprocessError) as error:
        result |= {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    result["seconds"] = round(time.monotonic() - begin, 1)
    (out / f"stage_{stage.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def call(command: list[str], limit: float, env: dict, work: Path) -> tuple[int | None, str]:
    """Exit code (None: past its limit) and output; run outside the checkout, which has no _C."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=env, cwd=work, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()


def summary(results: list[dict]) -> str:
    lines = ["", "| stage      | status    | seconds |", "| ---------- | --------- | ------: |"]
    for result in results:
        line = f"| {result['stage']:10} | {result['status']:9} | {result['seconds']:7.1f} |"
        lines.append(f"{line} {result.get('why', '')}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--minutes", type=float, default=8, help="for all stages together")
    flags.add_argument("--out", type=Path, default=BENCH / "results" / "gpu")
    flags.add_argument("--only", help="stages, by commas")
    flags.add_argument("--archive", type=Path, help="pack DIR as FILE.tar.gz after every stage")
    args = flags.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes - RESERVE
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        every = stages(out, work)
        names = [stage.name for stage in every]
        wanted = args.only.split(",") if args.only else names
        if unknown := set(wanted) - set(names):
            flags.error(f"stages are {', '.join(names)}, not {', '.join(sorted(unknown))}")
        if (device := gpu()) is None:
            print("gpu.py needs a CUDA device and a PyTorch that sees it", file=sys.stderr)
            return 2
        out.mkdir(parents=True, exist_ok=True)
        results = []
        chosen = [stage for stage in every if stage.name in wanted]
        for i, stage in enumerate(chosen):
            limit = share(chosen[i:], deadline - time.monotonic())
            results.append(run(stage, limit, out, work))
            print(f"\n== {stage.name}: {results[-1]['status']}", flush=True)
            print(results[-1].get("output") or results[-1].get("why", ""), flush=True)
            facts = {"gpu": device, "minutes": args.minutes, "stages": results}
            (out / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
            if args.archive:
                shutil.make_archive(str(args.archive), "gztar", out)
    print(summary(results))
    return int(any(result["status"] == "failed" for result in results))


def gpu() -> str | None:
    """The GPU's name, asked of PyTorch in a process of its own."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run(python("-c", code), capture_output=True, text=True)
    return found.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
