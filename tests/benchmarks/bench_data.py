"""Images per second from a tar, compared with other readers and with the decoder alone.

    python tests/benchmarks/bench_data.py [--rounds N]
        [--only speed,remote,index,start,memory,deviation]

Sets: JPEGs of about 500 × 375 and of 250 × 250, cut out of the photographs that scikit-image and
scikit-learn ship, quality 90, in batches of 64 at 128 × 128 grayscale. Every contestant runs in a
process of its own, in turns; the result is the median over rounds. `cpu` is images per second on
two otherwise idle cores: from half the CPU time of all threads and workers, or from the busiest
thread's CPU time if that is more.

webdataset needs torch; if both are installed in another environment, set JDL_PEERS_PYTHON to its
interpreter. JDL_BENCH_SHARE=0.01 tries the script on a hundredth of the data.
"""

import argparse
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_remote
import numpy as np

SIZE, BATCH, CORES = 128, 64, 2
SHARE = float(os.environ.get("JDL_BENCH_SHARE", "1"))
SETS = {
    "500x375": (375, 500, round(SHARE * 4000)),
    "250x250": (250, 250, round(SHARE * 8000)),
}
MEMBERS = round(SHARE * 300_000)  # of the tar whose index is timed
PEERS = {"webdataset, one tar", "webdataset, two shards"}
ROOT = Path(os.environ.get("JDL_BENCH_DIR") or Path(tempfile.gettempdir()) / "jdl-bench-data")
ROOT /= "whole" if SHARE == 1 else f"share-{SHARE:g}"

# ---------------------------------------------------------------------- the sets


def photographs() -> list[Any]:
    from PIL import Image
    from skimage import data as ski
    from sklearn.datasets import load_sample_images

    found = [*load_sample_images().images]
    for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina"):
        found.append(getattr(ski, name)())
    found += [*ski.stereo_motorcycle()[:2]]
    return [Image.fromarray(np.asarray(pixels)).convert("RGB") for pixels in found]


def encoded(height: int, width: int, count: int) -> Iterator[bytes]:
    """Windows of the photographs, at scales of a half to one, as JPEGs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    photos = photographs()
    for i in range(count):
        photo = photos[i % len(photos)]
        largest = min(photo.height, photo.width * height / width)
        high = largest * rng.uniform(0.5, 1.0)
        wide = high * width / height
        top, left = rng.uniform(0, photo.height - high), rng.uniform(0, photo.width - wide)
        # Some a little larger, some smaller, as photographs are.
        s = rng.uniform(0.9, 1.1) if height != width else 1.0
        size = (round(width * s), round(height * s))
        out = io.BytesIO()
        window = photo.resize(size, Image.Resampling.LANCZOS, (left, top, left + wide, top + high))
        window.save(out, "JPEG", quality=90)
        yield out.getvalue()


def write_tar(
    path: Path, members: Iterator[tuple[str, bytes]], comment: str = "", mtime: float = 0
) -> None:
    """A ustar archive; pax headers hold the comment, and times that are no whole numbers."""
    part = path.with_suffix(".part")
    format = tarfile.PAX_FORMAT if comment or mtime else tarfile.USTAR_FORMAT
    headers = {"comment": comment} if comment else {}
    with tarfile.open(part, "w", format=format, pax_headers=headers) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    part.rename(path)


def make_sets() -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    for name, (height, width, count) in SETS.items():
        whole = ROOT / f"{name}.tar"
        if whole.exists():
            continue
        print(f"making {whole}", file=sys.stderr)
        images = list(encoded(height, width, count))
        # As webdataset wants them: a key with its label beside it would be a second member.
        members = [(f"train/{i % 10}/{i:05d}.jpg", data) for i, data in enumerate(images)]
        for shard in range(2):
            write_tar(ROOT / f"{name}-{shard}.tar", iter(members[shard::2]))
        write_tar(whole, iter(members))


# ---------------------------------------------------------------------- contestants


def members(path: str) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(info).read() for info in tar if info.isreg()]  # type: ignore[union-attr]


def in_threads(decode: Callable[[bytes], np.ndarray], data: list[bytes]) -> Iterator[int]:
    """Only the decoder, in two threads; several images at a time."""
    done = threading.Semaphore(0)
    numbers = itertools.cycle(range(len(data)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                some = [next(numbers) for _ in range(16)]
            for i in some:
                decode(data[i])
            done.release()

    for _ in range(CORES):
        threading.Thread(target=work, daemon=True).start()
    while True:
        for _ in range(BATCH // 16):
            done.acquire()
        yield BATCH


def resized(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def simplejpeg_decoder(factor: int) -> Callable[[bytes], np.ndarray]:
    import simplejpeg

    def decode(data: bytes) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(
            data, "GRAY", min_height=SIZE, min_width=SIZE, min_factor=factor
        )
        return resized(pixels[:, :, 0])

    return decode


def halves_decoder(data: bytes) -> np.ndarray:
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    part = 8
    while -(-height // part) < SIZE or -(-width // part) < SIZE:
        part //= 2
    pixels = simplejpeg.decode_jpeg(
        data, "GRAY", min_height=-(-height // part), min_width=-(-width // part)
    )
    return resized(pixels[:, :, 0])


def pillow_decoder(data: bytes, draft: bool = True) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if draft:
            image.draft("L", (SIZE, SIZE))
        return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def ours(path: str, **options: Any) -> Iterator[int]:
    from jdl.data import from_tar

    data = from_tar(
        path,
        size=(SIZE, SIZE),
        grayscale=True,
        batch_size=BATCH,
        epochs=None,
        cache_bytes=0,
        **options,
    )
    for batch in data:
        yield len(batch["image"])


def halves_only(path: str) -> Iterator[int]:
    from jdl.data import images

    images.EIGHTHS = (1, 2, 4, 8)
    yield from ours(path)


def ours_with_pillow(path: str) -> Iterator[int]:
    from jdl.data import images

    images.simplejpeg = None
    yield from ours(path)


def classic(path: str) -> Iterator[int]:
    """The usual hand-written code: tarfile, Pillow, a list that becomes a batch."""
    from PIL import Image

    while True:
        batch = []
        with tarfile.open(path) as tar:
            for info in tar:
                if not info.name.endswith(".jpg"):
                    continue
                image = Image.open(tar.extractfile(info)).convert("L").resize((SIZE, SIZE))  # type: ignore[arg-type]
                batch.append(np.asarray(image))
                if len(batch) == BATCH:
                    yield len(np.stack(batch))
                    batch = []


def webdataset(paths: list[str]) -> Iterator[int]:
    import torch  # noqa: F401  webdataset's loader needs it, and fails late without
    import webdataset as wds
    from PIL import Image

    def decode(sample: dict[str, Any]) -> np.ndarray:
        image = Image.open(io.BytesIO(sample["jpg"])).convert("L").resize((SIZE, SIZE))
        return np.asarray(image)

    dataset = (
        wds.WebDataset(paths, shardshuffle=len(paths) > 1, nodesplitter=None, empty_check=False)
        .shuffle(1000)
        .map(decode)
        .batched(BATCH, partial=False)
        .repeat()
    )
    for batch in wds.WebLoader(dataset, batch_size=None, num_workers=2):
        yield len(batch[0] if isinstance(batch, tuple | list) else batch)


def contestants(name: str) -> dict[str, Callable[[], Iterator[int]]]:
    path = str(ROOT / f"{name}.tar")
    shards = [str(ROOT / f"{name}-{i}.tar") for i in range(2)]
    return {
        "jdl": lambda: ours(path),
        "jdl, simplejpeg 4/8": lambda: halves_only(path),
        "ceiling simplejpeg": lambda: in_threads(simplejpeg_decoder(1), members(path)),
        "ceiling simplejpeg, factor 2": lambda: in_threads(simplejpeg_decoder(2), members(path)),
        "ceiling simplejpeg, halves": lambda: in_threads(halves_decoder, members(path)),
        "jdl, Pillow only": lambda: ours_with_pillow(path),
        "ceiling Pillow, draft": lambda: in_threads(pillow_decoder, members(path)),
        "jdl, two workers": lambda: ours(path, workers=2),
        "tarfile and Pillow": lambda: classic(path),
        "webdataset, one tar": lambda: webdataset([path]),
        "webdataset, two shards": lambda: webdataset(shards),
    }


def processor_seconds() -> dict[int, float]:
    """CPU time of each thread of this process and of the processes it started."""
    import psutil

    found: dict[int, float] = {}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        found |= {t.id: t.user_time + t.system_time for t in process.threads()}
    return found


def least_seconds(before: dict[int, float]) -> float:
    """Seconds of the work since then on two idle cores: at least its busiest thread's CPU time."""
    spent = [seconds - before.get(t, 0.0) for t, seconds in processor_seconds().items()]
    return max(sum(spent) / CORES, max(spent))


def contest(name: str, contestant: str, seconds: float) -> dict[str, float]:
    batches = contestants(name)[contestant]()
    for _ in range(8):
        next(batches)
    images, start, before = 0, time.perf_counter(), processor_seconds()
    while (spent := least_seconds(before)) < seconds:
        images += next(batches)
    return {"wall": images / (time.perf_counter() - start), "cpu": images / spent}


def speed(rounds: int, seconds: float, chosen: str) -> None:
    for name in SETS:
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(rounds):
            for contestant in contestants(name):
                if chosen not in contestant:
                    continue
                result = elsewhere(["contest", name, contestant, str(seconds)], contestant in PEERS)
                if result is not None:
                    found.setdefault(contestant, []).append(result)
        middle = {
            c: {clock: statistics.median(r[clock] for r in results) for clock in ("wall", "cpu")}
            for c, results in found.items()
        }
        print(f"\n{name}: images/s, median of {rounds}")
        for contestant, rates in middle.items():
            print(f"  {contestant:32} {rates['wall']:7.0f} wall {rates['cpu']:7.0f} cpu")
        if chosen:
            continue
        ceilings = [c for c in middle if c.startswith("ceiling simplejpeg")]
        best = max(ceilings, key=lambda c: middle[c]["cpu"])
        rows = [("jdl", best), ("jdl, Pillow only", "ceiling Pillow, draft")]
        rows += [("jdl", c) for c in middle if c.startswith(("webdataset", "tarfile"))]
        for mine, theirs in rows:
            ratios = [middle[mine][clock] / middle[theirs][clock] for clock in ("cpu", "wall")]
            print(f"  {mine} / {theirs}: {ratios[0]:.2f} cpu, {ratios[1]:.2f} wall")


def elsewhere(arguments: list[str], peer: bool = False) -> Any:
    """What this script prints when run with these arguments in a process of its own."""
    python = os.environ.get("JDL_PEERS_PYTHON", sys.executable) if peer else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, __file__, "--run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        if "ModuleNotFoundError" not in lines[-1]:
            raise RuntimeError(done.stderr)
        print(f"  left out {arguments[-2]}: {lines[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------- index, start, memory


HEADERS = {  # as `tar`, `git archive` and `tar --format=pax` write them
    "plain": {},
    "one pax header for all": {"comment": "0" * 40},
    "a pax header for each": {"mtime": 1.7e9 + 0.25},
}


def index(rounds: int) -> None:
    data = np.random.default_rng(0).bytes(400)
    print(f"\nindex of {MEMBERS:,} members, seconds of processor time, median of {rounds}")
    for kind, headers in HEADERS.items():
        path = ROOT / f"members-{kind.replace(' ', '-')}.tar"
        if not path.exists():
            names = (f"train/{i % 1000}/{i:06d}.jpg" for i in range(MEMBERS))
            write_tar(path, ((name, data) for name in names), **headers)
        path.read_bytes()  # warm
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for what in ("scan", "open", "tarfile"):
                times.setdefault(what, []).append(elsewhere(["index", what, str(path)])["seconds"])
            start = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(["tar", "-tf", str(path)], stdout=subprocess.DEVNULL, check=True)
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
            times.setdefault("GNU tar -t", []).append(cpu)
        medians = {what: statistics.median(seconds) for what, seconds in times.items()}
        print(f"  {kind}: scan / GNU tar -t = {medians['scan'] / medians['GNU tar -t']:.2f}")
        for what, seconds in medians.items():
            print(f"    {what:12} {seconds:.3f}")


def run_index(what: str, path: str) -> dict[str, float]:
    from jdl.data.tar import index as tar_index

    if what == "open":
        tar_index.open_index(path)
    start = time.process_time()
    if what == "scan":
        assert len(tar_index.open_index(path, keep=False)) == MEMBERS
    elif what == "open":
        assert tar_index.open_index(path).file
    else:
        with tarfile.open(path) as tar:
            assert sum(1 for _ in tar) == MEMBERS
    seconds = time.process_time() - start
    Path(path + tar_index.SUFFIX).unlink(missing_ok=True)
    return {"seconds": seconds}


def start(rounds: int) -> None:
    runs = [elsewhere(["start", str(ROOT / "500x375.tar")]) for _ in range(rounds)]
    print(f"\nseconds to the first batch, median of {rounds}")
    for what in runs[0]:
        print(f"  {what:24} {statistics.median(r[what] for r in runs):.3f}")


def run_start(path: str) -> dict[str, float]:
    began = time.perf_counter()
    import grain  # noqa: F401

    grain_seconds = time.perf_counter() - began
    from jdl.data import from_tar

    began = time.perf_counter()
    options: dict[str, Any] = {"size": (SIZE, SIZE), "grayscale": True, "batch_size": BATCH}
    data = from_tar(path, epochs=None, **options)
    made = time.perf_counter()
    next(iter(data))
    done = time.perf_counter()
    return {"importing grain": grain_seconds, "from_tar": made - began, "first batch": done - made}


def memory() -> None:
    sources = [("100 MB", 1), ("1 GB", 10)]
    one = ROOT / "500x375.tar"
    peaks = {}
    for what, copies in sources:
        path = ROOT / f"memory-{copies}.tar"
        if not path.exists():
            data = members(str(one))
            few = data[: next(i for i in range(len(data)) if sum(map(len, data[:i])) > SHARE * 1e8)]
            several = itertools.chain.from_iterable([few] * copies)
            write_tar(path, ((f"a/{i:06d}.jpg", d) for i, d in enumerate(several)))
        peaks[what] = elsewhere(["memory", str(path)])["peak"]
    print("\npeak resident memory of one shuffled epoch, MB")
    for what, peak in peaks.items():
        print(f"  {what:8} {peak / 1e6:.1f}")
    print(f"  1 GB / 100 MB: {peaks['1 GB'] / peaks['100 MB']:.3f}")


def run_memory(path: str) -> dict[str, float]:
    from jdl.data import from_tar

    data = from_tar(
        path, size=(SIZE, SIZE), grayscale=True, batch_size=BATCH, shuffle=True, epochs=1
    )
    for batch in data:
        assert batch["image"].shape[0] == BATCH
    # Not getrusage's: that one counts what the parent had when it forked.
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return {"peak": int(line.split()[1]) * 1024.0}


def deviation() -> None:
    from jdl.data import images

    print("\nmean deviation from Pillow's full decode, of 255, at 128 × 128 gray, 400 images")
    simplejpeg = images.simplejpeg
    for name in SETS:
        data = members(str(ROOT / f"{name}.tar"))[:400]
        whole = [pillow_decoder(d, draft=False).astype(int) for d in data]
        for what, module, exact in (
            ("simplejpeg", simplejpeg, False),
            ("Pillow, draft", None, False),
            ("exact", simplejpeg, True),
        ):
            images.simplejpeg = module
            found = [
                np.abs(images.decode(d, size=(SIZE, SIZE), grayscale=True, exact=exact)[..., 0] - w)
                for d, w in zip(data, whole, strict=True)
            ]
            worst = max(f.mean() for f in found)
            print(f"  {name} {what:14} {np.mean(found):.3f}, of the worst image {worst:.3f}")
    images.simplejpeg = simplejpeg


def run_remote(*arguments: str) -> Any:
    return data_remote.measure(ours, *arguments)


RUN = {
    "contest": None,
    "index": run_index,
    "start": run_start,
    "memory": run_memory,
    "remote": run_remote,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="each, on two cores")
    parser.add_argument("--only", default="speed,remote,index,start,memory,deviation")
    parser.add_argument("--contestants", default="", help="only those with this in their name")
    parser.add_argument("--run", nargs="+")
    options = parser.parse_args()
    if options.run:
        what, *arguments = options.run
        if what == "contest":
            result = contest(arguments[0], arguments[1], float(arguments[2]))
        else:
            result = RUN[what](*arguments)  # type: ignore[misc]
        print(json.dumps(result), flush=True)
        os._exit(0)  # no waiting for workers
    make_sets()
    chosen = options.only.split(",")
    if "speed" in chosen:
        speed(options.rounds, options.seconds, options.contestants)
    if "remote" in chosen:  # two rounds, for they take long
        rounds = min(options.rounds, 2)
        data_remote.remote(elsewhere, ROOT / "250x250.tar", rounds, options.seconds)
    if "index" in chosen:
        index(options.rounds)
    if "start" in chosen:
        start(options.rounds)
    if "memory" in chosen:
        memory()
    if "deviation" in chosen:
        deviation()


if __name__ == "__main__":
    main()
