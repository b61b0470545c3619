"""The part `remote` of bench_data.py: one archive from disk, over HTTP and from an S3 server.

The HTTP server waits 20 ms before each answer, as a distant one would; the S3 server is moto's.
Each runs in a process of its own, but on the cores that the loader uses as well: `server` is its
CPU time for an image. The bare client is one of plain sockets: no loader gets more from the server.
"""

import asyncio
import http.client
import itertools
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LATENCY = 0.02
THREADS = (1, 4, 16)
BATCH = 64
S3_MEMBERS = 512  # moto copies the whole archive for each range
CLIENTS = 100  # of the bare client, as many as the connections of ours
KEYS = {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
}

# ---------------------------------------------------------------------- servers


def spent(requests: int) -> bytes:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return json.dumps([requests, usage.ru_utime + usage.ru_stime]).encode()


def serve_http(path: str, latency: float) -> None:
    from aiohttp import web

    content = Path(path).read_bytes()
    requests = itertools.count()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/spent":
            return web.Response(body=spent(next(requests)))
        await asyncio.sleep(latency)
        next(requests)
        headers = {"ETag": '"1"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if not asked:
            return web.Response(body=content, headers=headers)
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return web.Response(status=206, body=content[start:end], headers=headers)

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/{name}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
            await web.SockSite(runner, listening).start()
            print(listening.getsockname()[1], flush=True)
            await asyncio.Event().wait()

    asyncio.run(run())


def serve_s3(path: str) -> None:
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)
    requests = itertools.count()

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        number = next(requests)
        if environ["PATH_INFO"] == "/spent":
            start("200 OK", [])
            return [spent(number)]
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for place, data in (("/bucket", b""), ("/bucket/a.tar", Path(path).read_bytes())):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("PUT", place, data, {"x-amz-acl": "public-read"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()
    print(server.port, flush=True)
    threading.Event().wait()


@contextmanager
def served(*arguments: str) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended: {arguments}")
            yield int(line)
        finally:
            server.kill()


def server_spent(port: int) -> tuple[int, float]:
    """The requests that it has answered, and its CPU seconds."""
    if not port:
        return 0, 0.0
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/spent") as answer:
        requests, seconds = json.load(answer)
    return requests, seconds


# ---------------------------------------------------------------------- clients


def bare(port: int, name: str, archive: str, seconds: float) -> float:
    """Members a second that plain sockets get, one at a time each, from many threads."""
    with tarfile.open(archive) as tar:
        places = [(info.offset_data, info.size) for info in tar if info.isreg()]
    numbers = itertools.count()
    done = itertools.count()
    end = time.perf_counter() + seconds

    def work() -> None:
        connection = None
        while time.perf_counter() < end:
            at, size = places[next(numbers) * 7919 % len(places)]
            if connection is None:
                connection = socket.create_connection(("127.0.0.1", port), 30.0)
            asked = f"GET {name} HTTP/1.1\r\nHost: a\r\nRange: bytes={at}-{at + size - 1}\r\n\r\n"
            connection.sendall(asked.encode())
            answer = b""
            while (head := answer.find(b"\r\n\r\n")) < 0 or len(answer) < head + 4 + size:
                came = connection.recv(1 << 18)
                if not came:
                    raise RuntimeError(answer[:300].decode())
                answer += came
            next(done)
            if b"connection: close" in answer[:head].lower():
                connection.close()
                connection = None

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next(done) / (time.perf_counter() - start)


def measure(ours: Callable[..., Iterator[int]], url: str, port: str, seconds: str) -> Any:
    """[shuffled, threads, images/s, CPU s an image, the server's, requests a batch] of each way."""
    found = []
    for shuffle, threads in itertools.product((False, True), THREADS):
        batches = ours(url, shuffle=shuffle, threads=threads)
        for _ in range(2 * threads + 2):
            next(batches)
        before, cpu, start = server_spent(int(port)), time.process_time(), time.perf_counter()
        images = 0
        while time.perf_counter() - start < float(seconds):
            images += next(batches)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        after = server_spent(int(port))
        batches.close()  # type: ignore[attr-defined]
        requests, served = (b - a for a, b in zip(before, after, strict=True))
        row = [images / wall, cpu / images, served / images, requests / images * BATCH]
        found.append([shuffle, threads, *row])
    return found


def remote(elsewhere: Callable[..., Any], archive: Path, rounds: int, seconds: float) -> None:
    """Measures, and prints a table."""
    small = archive.with_name("remote.tar")
    with tarfile.open(archive) as tar, tarfile.open(small, "w", format=tarfile.USTAR_FORMAT) as few:
        for info in itertools.islice(tar, S3_MEMBERS):
            few.addfile(info, tar.extractfile(info))
    whole, few_only = str(archive), str(small)
    found: dict[str, list[Any]] = {}
    ceilings = {}
    with (
        tempfile.TemporaryDirectory() as cache,
        served("http", whole, str(LATENCY)) as http,
        served("s3", few_only) as s3,
    ):
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "JDL_CACHE": cache}
        urls = {
            "disk": (whole, 0),
            "HTTP, 20 ms": (f"http://127.0.0.1:{http}/a.tar", http),
            "S3": ("s3://bucket/a.tar", s3),
        }
        ceilings["HTTP, 20 ms"] = bare(http, "/a.tar", whole, seconds)
        ceilings["S3"] = bare(s3, "/bucket/a.tar", few_only, seconds)
        for _, (what, (url, port)) in itertools.product(range(rounds), urls.items()):
            rows = elsewhere(["remote", url, str(port), str(seconds)])
            found.setdefault(what, []).append(rows)
    print(f"\nremote, {archive.name}: images/s, µs of CPU an image, median of {rounds}")
    middle = {
        what: [
            [*ways[0][:2], *map(statistics.median, zip(*(w[2:] for w in ways), strict=True))]
            for ways in zip(*every, strict=True)
        ]
        for what, every in found.items()
    }
    for what, rows in middle.items():
        if what in ceilings:
            print(f"  {what:12} bare client, scattered: {ceilings[what]:6.0f} images/s")
        for row, disk in zip(rows, middle["disk"], strict=True):
            shuffle, threads, rate, cpu, served_cpu, requests = row
            print(
                f"  {what:12} {'shuffled' if shuffle else 'in order'} {threads:2} threads: "
                f"{rate:6.0f} images/s ({rate / disk[2]:.2f} of disk), cpu {cpu * 1e6:4.0f} "
                f"({disk[3] / cpu:.2f}), server {served_cpu * 1e6:4.0f}, {requests:5.1f} "
                "requests a batch"
            )


if __name__ == "__main__":
    if sys.argv[1] == "http":
        serve_http(sys.argv[2], float(sys.argv[3]))
    else:
        serve_s3(sys.argv[2])
