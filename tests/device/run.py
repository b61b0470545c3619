"""What is worth knowing of one accelerator, in at most 7.4 minutes.

    make device ARGS="--out DIR"
    python tests/device/run.py [--tiny] [--only PART[,PART]] [--minutes M] [--data DIR] --out DIR

Parts, the most important first; each runs in a process of its own, within a time limit, and writes
DIR/PART.json after every measurement, so that a run cut short still counts:

    truth    every optimizer on this device against the CPU, curvature products against float64,
             kill and resume bit for bit, parallel="jit", "fsdp" and "pmap" alike
    loop     the Estimator against a bare jit loop, peak memory, how long the device is idle
    clock    loss against seconds: deep autoencoder, language model of bytes, ResNet-18
    loader   images a second out of a tar, against the decoder alone; ResNet-50 trained from it
    compile  seconds to compile each optimizer's step; Lanczos on 2.8 and 100 million parameters
    vision   steps a second of style transfer and of DeepDream, PyTorch beside where it is installed

While `truth` runs, which times nothing, another process compiles what `loop` and `clock` need into
a compilation cache that lasts as long as the run; what each took there is in truth's JSON.

A summary is printed and left as DIR/summary.md and DIR/summary.json. The exit code is 1 if a part
failed or ran out of time, or if a comparison in `truth` is outside its tolerance.

`--tiny` runs the same code with small sizes, in about four minutes on two CPU cores. It needs jdl
and its own dependencies. simplejpeg and PyTorch take part where they are installed. `--data` names
a folder with MNIST's gzipped IDX files, in it or in its `mnist/`; without, the digits bundled with
jdl are enlarged.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARES = {"truth": 130, "loop": 62, "clock": 120, "loader": 48, "compile": 52, "vision": 32}
TINY_SHARES = {"truth": 60, "loop": 30, "clock": 40, "loader": 20, "compile": 20, "vision": 10}
MINUTES, TINY_MINUTES = 7.4, 10.0
NOT_PRINTED = {"traceback", "curve", "spread_ms", "bytes", "compiler_bytes", "steps", "residuals"}
# XLA tries dozens of kernels for each matrix product of a program. `truth` needs none of that, and
# cuBLAS is as fast for these nets as what is found; only `compile` measures XLA as it comes.
QUICK_COMPILE = {"truth": "--xla_gpu_autotune_level=0", "compile": ""}
CUBLAS = "--xla_gpu_enable_triton_gemm=false"
RESERVE = 6.0  # seconds before its limit at which a part begins nothing new


# ---------------------------------------------------------------------- one part, in its process


def run_part(name, out, limit, tiny, data):
    """Runs a part here; what it measures is written as it comes."""
    sys.path.insert(0, str(HERE))
    from results import Results

    found = Results(out / f"{name}.json", name, limit - RESERVE)
    importlib.import_module(f"{name}_part").run(found, tiny=tiny, data=data)
    found.end()
    sys.stdout.flush()
    os._exit(0)  # threads and worker processes may be in the middle of something


# ---------------------------------------------------------------------- all parts


def environment(name, cache):
    """The variables of a part's process."""
    given = dict(os.environ)
    if name == "compile":
        given["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    else:
        given.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        given.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    platforms = given.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        given["JAX_PLATFORMS"] = f"{platforms},cpu"  # truth compares with it
    flags = QUICK_COMPILE.get(name, CUBLAS)
    given["XLA_FLAGS"] = f"{given.get('XLA_FLAGS', '')} {flags}".strip()
    given.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # some parts share the card
    given["PYTHONUNBUFFERED"] = "1"
    given["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parents[1]), *filter(None, [given.get("PYTHONPATH")])]
    )
    return given


def start(name, out, args, limit, cache):
    """A part's process, and the file of what it prints."""
    command = [sys.executable, str(HERE / "run.py"), "--part", name, "--out", str(out)]
    command += ["--limit", str(limit), *(["--tiny"] if args.tiny else [])]
    command += ["--data", args.data] if args.data else []
    log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  until `finish`
    how = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment(name, cache)}
    return subprocess.Popen(command, start_new_session=True, **how), log


def finish(process, log, limit):
    """Waits for it so long; how it ended and the end of what it printed."""
    try:
        code = process.wait(timeout=max(limit, 0.0))
        state = "ended" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        state = f"killed at its limit, after {limit:.0f} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers of its own too
    process.wait()
    with log:
        log.seek(0)
        return state, log.read()[-4000:]


def read_part(name, out, state, output, seconds):
    """What the part has written, with how it ended."""
    path = out / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {"part": name, "rows": []}
    found |= {"state": state, "wall_seconds": round(seconds, 1)}
    errors = [row for row in found["rows"] if "error" in row["figures"]]
    if state == "ended" and errors:
        found["state"] = f"ended with {len(errors)} errors"
    if state != "ended":
        found["output"] = output
    path.write_text(json.dumps(found, indent=1))
    return found


def report(found):
    """A part's results, a line each."""
    lines = [f"## {found['part']}: {found['state']}, {found['wall_seconds']} s"]
    if "machine" in found:
        lines.append(", ".join(f"{k}: {v}" for k, v in found["machine"].items()))
    for row in found["rows"]:
        shown = {k: v for k, v in row["figures"].items() if k not in NOT_PRINTED}
        figures = (f"{k}={short(v)}" for k, v in shown.items() if v is not None)
        lines.append(f"- {row['case']}: {', '.join(figures)}")
    if "output" in found:
        lines.append("```\n" + found["output"][-1500:] + "\n```")
    return "\n".join(lines)


def short(value):
    """A figure as it is printed."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + " ".join(f"{k} {short(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list):
        return "[" + " ".join(map(short, value)) + "]"
    return str(value)


def good(found):
    """Whether a part ended, and nothing in it failed or is outside its tolerance."""
    outside = any(row["figures"].get("within") is False for row in found["rows"])
    return found["state"] == "ended" and not outside


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for two CPU cores")
    parser.add_argument("--only", default=",".join(SHARES), help="parts, separated by commas")
    parser.add_argument("--minutes", type=float, help="for all parts together")
    parser.add_argument("--data", help="folder with MNIST's IDX files")
    parser.add_argument("--part", choices=[*SHARES, "warm"], help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args.part, args.out, args.limit, args.tiny, args.data)
    parts = args.only.split(",")
    unknown = sorted({*parts} - {*SHARES})
    if unknown:
        parser.error(f"--only must be of {', '.join(SHARES)}, got {', '.join(unknown)}")
    sys.exit(run_parts([p for p in SHARES if p in parts], args))


def run_parts(parts, args):
    """Runs them in turn; time that one leaves goes to the next. Gives the exit code."""
    shares = TINY_SHARES if args.tiny else SHARES
    end = time.monotonic() + 60 * (args.minutes or (TINY_MINUTES if args.tiny else MINUTES))
    everything = []
    with tempfile.TemporaryDirectory(prefix="jdl-device-") as cache:
        warm = None
        for i, name in enumerate(parts):
            began, left = time.monotonic(), end - time.monotonic()
            limit = left * shares[name] / sum(shares[p] for p in parts[i:])
            if name == "truth" and len(parts) > 1:
                warm = start("warm", Path(cache), args, 1.3 * limit, cache), began + 1.3 * limit
            state, output = finish(*start(name, args.out, args, limit, cache), limit)
            found = read_part(name, args.out, state, output, time.monotonic() - began)
            everything.append(found)
            if warm is not None:
                state, output = finish(*warm[0], warm[1] - time.monotonic())
                found["warm"] = read_part("warm", Path(cache), state, output, 0.0)["rows"]
                warm = None
            print(report(found), flush=True)
            write_summary(everything, args.out)
    for found in everything:
        print(f"{found['part']:8} {found['wall_seconds']:6.1f} s  {found['state']}")
    return 0 if all(map(good, everything)) else 1


def write_summary(everything, out):
    summary = {
        "parts": {f["part"]: f["state"] for f in everything},
        "within": all(map(good, everything)),
        "machine": next((f["machine"] for f in everything if "machine" in f), {}),
        "results": {f["part"]: f["rows"] for f in everything},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    (out / "summary.md").write_text("\n\n".join(map(report, everything)) + "\n")


if __name__ == "__main__":
    main()
