"""Archives that are compressed, piped, or remote: the same records as from the plain one."""

import bz2
import collections
import gzip
import http.server
import io
import itertools
import json
import logging
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jdl.core.check import DataError, UserError
from jdl.data import TarSource, describe, from_tar
from jdl.data.loading import InOrder
from jdl.data.tar import archive, inflate, remote, seekable
from jdl.data.tar import source as tar_source
from jdl.data.tar.open import open_archive
from jdl.data.tar.stream import MemberStream
from jdl.data.window import WindowOrder

zstd = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}
N = 60


def png(value, size=(6, 5)):
    out = io.BytesIO()
    Image.new("L", size[::-1], value).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def plain(tmp_path):
    """Image i has the value i everywhere, and the class i mod 3."""
    folder = tmp_path / "plain"
    folder.mkdir()
    return write_tar(folder / "a.tar", [(f"{i % 3}/{i:02d}.png", png(i)) for i in range(N)])


@pytest.fixture
def compressed(plain, tmp_path):
    def make(kind):
        path = tmp_path / f"a.tar.{kind}"
        with open(plain, "rb") as file:
            path.write_bytes(COMPRESS[kind](file.read()))
        return str(path)

    return make


def values(batches):
    found = []
    for batch in batches:
        rows = batch["image"][:, 0, 0, 0].tolist()
        mask = batch.get("mask", np.ones(len(rows)))
        found.append([v for v, counts in zip(rows, mask, strict=True) if counts])
    return found


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_archives_hold_the_same(kind, plain, compressed, caplog):
    path = compressed(kind)
    with caplog.at_level(logging.WARNING, "jdl.data"):
        source = TarSource(path)
    assert "read once from end to end" in caplog.text
    expected = TarSource(plain)
    assert [source[i] for i in (0, 5, 59, 3)] == [expected[i] for i in (0, 5, 59, 3)]
    assert source.count_classes() == expected.count_classes()
    assert describe(path).damage == []
    with caplog.at_level(logging.WARNING, "jdl.data"):
        found = values(from_tar(path, grayscale=True, batch_size=7))
    assert "read in order, not shuffled" in caplog.text
    assert "jdl pack" in caplog.text
    assert flat(found) == list(range(N))


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_truncated_or_damaged_compressed_archive(kind, compressed):
    path = compressed(kind)
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole[: len(whole) // 2])
    about = describe(path, keep_index=False)
    assert about.images < N
    assert "truncated" in {d["word"] for d in about.damage}
    assert any("cut short" in d["detail"] for d in about.damage)
    with pytest.raises(DataError):
        from_tar(path, batch_size=2)
    with open(path, "wb") as file:
        file.write(whole + b"what is this doing here?")
    about = describe(path, keep_index=False)
    assert about.images == N
    assert [d["word"] for d in about.damage] == ["damaged"]
    damaged = bytearray(whole)
    damaged[len(whole) // 2 :] = os.urandom(len(whole) - len(whole) // 2)
    with open(path, "wb") as file:
        file.write(damaged)
    about = describe(path, keep_index=False)
    assert about.images < N
    assert {d["word"] for d in about.damage} & {"damaged", "truncated"}


def test_chained_and_padded_gzip(plain, tmp_path):
    with open(plain, "rb") as file:
        whole = file.read()
    path = tmp_path / "chained.tar.gz"
    path.write_bytes(gzip.compress(whole[:7000]) + gzip.compress(whole[7000:]) + bytes(100))
    assert describe(path).images == N
    assert describe(path).damage == []


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("size", [7, 100, 1 << 18])
def test_zeros_between_chained_files_are_skipped_whatever_a_read_gives(compress, size):
    one, two = os.urandom(3000), os.urandom(2000)
    for zeros in (1, 7, 8, 600, 300_000 if size > 7 else 999):
        file = io.BytesIO(compress(one) + bytes(zeros) + compress(two) + bytes(zeros))
        found = list(inflate.pieces(file, size))
        assert b"".join(piece.data for piece in found) == one + two, zeros
        assert not any(piece.problem for piece in found)


def skippable(size, kind=0):
    """A frame of zstd's that decompressors pass over."""
    return (0x184D2A50 + kind).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size)


def zstd_frames(rng, data):
    """`data` in several zstd frames, some of them empty, with skippable frames anywhere."""
    ends = np.sort(rng.integers(0, len(data) + 1, rng.integers(0, 5)))
    out = b""
    for start, stop in itertools.pairwise([0, *ends.tolist(), len(data)]):
        for _ in range(rng.integers(0, 3)):
            out += skippable(int(rng.integers(0, 40)), int(rng.integers(16)))
        out += zstd.compress(data[start:stop])
    return out + skippable(17) * int(rng.integers(2))


@pytest.mark.parametrize("kind", range(16))
def test_zstd_begins_with_a_skippable_frame(kind, plain, tmp_path):
    path = tmp_path / "a.tar.zst"
    with open(plain, "rb") as file:
        path.write_bytes(skippable(4, kind) + zstd.compress(file.read()))
    source = TarSource(path, keep_index=False)
    assert source.mode == "stream"
    assert [*source] == [*TarSource(plain)]
    assert describe(path, keep_index=False).damage == []


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 18])
def test_zstd_frames_are_read_as_the_zstd_command_reads_them(size):
    rng = np.random.default_rng(size)
    for n in (0, 1, 5, 3000):
        data = rng.bytes(n)
        for _ in range(5):
            frames = skippable(3) + zstd_frames(rng, data)
            found = list(inflate.pieces(io.BytesIO(frames), size))
            assert b"".join(piece.data for piece in found) == data
            assert not any(piece.problem for piece in found)
            if shutil.which("zstd"):
                done = subprocess.run(["zstd", "-dc"], input=frames, capture_output=True)
                assert (done.returncode, done.stdout) == (0, data)
            for cut in (frames[: rng.integers(5, 11)], frames[:-1]):  # 11 bytes: the first frame
                *_, last = inflate.pieces(io.BytesIO(cut), size)
                assert last.problem == "its zstd data are cut short"


@pytest.mark.skipif(not shutil.which("pzstd"), reason="needs pzstd")
def test_what_pzstd_writes_is_read(plain, tmp_path):
    path = tmp_path / "a.tar.zst"
    subprocess.run(["pzstd", "-q", "-p", "2", plain, "-o", str(path)], check=True)
    assert path.read_bytes()[1:4] == b"\x2a\x4d\x18"
    assert [*TarSource(path, keep_index=False)] == [*TarSource(plain)]


@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (b"\x04\x22\x4d\x18", "lz4 file"),
        (b"\x1f\x9d\x90", "compress file"),
        (b"LZIP\x01", "lzip file"),
        (b"PK\x03\x04", "zip archive"),
        (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    ],
)
def test_other_compression_is_named_and_its_bytes_are_never_read_as_a_tar(
    magic, kind, plain, tmp_path
):
    path = tmp_path / "a.tar.lz4"
    with open(plain, "rb") as file:  # a stored block holds the tar's bytes as they are
        path.write_bytes(magic.ljust(512, b"x") + file.read())
    with pytest.raises(DataError, match=f"it is a {kind}, not a tar that is plain or compressed"):
        from_tar(path, batch_size=2, keep_index=False)
    with pytest.raises(DataError, match="no images"):
        from_tar(path, batch_size=2, on_error="skip", keep_index=False)


def test_a_compression_bomb_is_read_in_small_pieces(tmp_path):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(200):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with open(path, "rb") as file:
        assert sum(len(piece.data) for piece in inflate.pieces(file, 1 << 18)) == 200 << 20
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


# ---------------------------------------------------------------------- the window


@pytest.mark.parametrize(("n", "window"), [(1, 1), (5, 9), (300, 16), (300, 300)])
def test_a_window_is_a_permutation_of_bounded_reach(n, window):
    counts = np.array([n // 3, n - n // 3])
    order = WindowOrder(counts, window=window, seed=3)
    found = order.records(2, 0, n)
    assert sorted(found.tolist()) == list(range(n))
    np.testing.assert_array_equal(order.records(2, n // 2, n), found[n // 2 :])
    one = WindowOrder(np.array([n]), window=window, seed=3).records(0, 0, n)
    assert (one <= np.arange(n) + window - 1).all()
    np.testing.assert_array_equal(order.plain().records(0, 0, n), np.arange(n))


def test_a_window_draws_evenly():
    draws = np.stack(
        [WindowOrder(np.array([40]), window=8, seed=s).records(0, 0, 40) for s in range(300)]
    )
    first = np.bincount(draws[:, 0], minlength=8)
    assert len(first) == 8
    assert ((first - 300 / 8) ** 2 / (300 / 8)).sum() < 30
    assert abs(np.mean(draws[:, 20]) - (20 + 0.5)) < 2  # the mean of what a window holds there


@pytest.mark.parametrize("where", ["read", "decode"])
def test_batches_can_be_closed_in_their_own_thread(where):
    closed, begun = [], threading.Event()

    def step(name):
        begun.wait(10)
        if name == where:
            batches.close()
            closed.append(name)

    batches = InOrder(lambda i: [step("read")], lambda read: step("decode"), 1, 1, 1)
    begun.set()
    (waiting,) = batches._waiting
    waiting.result(timeout=10)
    assert closed == [where]


def test_closing_at_the_interpreters_end_is_silent():
    program = """
import concurrent.futures.thread
from jdl.data.loading import InOrder

class Holder:
    batches = InOrder(lambda i: i, lambda read: read, 1000, 2, 8)
    def __del__(self):
        self.batches.close()

next(Holder.batches)
concurrent.futures.thread.held = Holder()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_resuming_at_any_position(plain, compressed):
    path = compressed("gz")

    def make(threads, batch_size=7):
        return from_tar(
            path,
            batch_size=batch_size,
            epochs=2,
            shuffle=True,
            seed=5,
            window=16,
            threads=threads,
            grayscale=True,
        )

    reference = values(make(2))
    epochs = flat(reference[:9]), flat(reference[9:])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(N))
    assert epochs[0] != epochs[1]
    for done in (0, 1, 5, 9, 13, 18):
        iterator = iter(make(1))
        for _ in range(done):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
        resumed = iter(make(3))
        resumed.set_state(state)
        assert values(resumed) == reference[done:]
    with pytest.raises(DataError, match="'order'"):
        iter(from_tar(path, batch_size=7, epochs=2, shuffle=True, seed=5)).set_state(state)
    # The plain archive gives the same through the same window.
    same = from_tar(plain, batch_size=7, epochs=2, shuffle=True, seed=5, window=16, grayscale=True)
    assert values(same) == reference
    assert flat(values(make(2).once())) == list(range(N))


def test_hosts_share_a_stream(compressed):
    path = compressed("zst")
    whole = list(from_tar(path, batch_size=8, epochs=1, shuffle=True, window=16))
    parts = [
        list(from_tar(path, batch_size=8, epochs=1, shuffle=True, window=16, shard=(p, 2)))
        for p in range(2)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name in batch:
            np.testing.assert_array_equal(
                batch[name], np.concatenate([half[name] for half in halves])
            )


def test_a_stream_names_a_corrupt_image_once(tmp_path):
    members = [(f"c/{i:02d}.png", png(i) if i != 4 else b"junk") for i in range(12)]
    path = write_tar(tmp_path / "a.tar", members)
    with open(path, "rb") as file:
        data = gzip.compress(file.read())
    (tmp_path / "a.tar.gz").write_bytes(data)
    iterator = iter(from_tar(tmp_path / "a.tar.gz", batch_size=3, size=(6, 5)))
    next(iterator)
    with pytest.raises(DataError, match=r"'c/04\.png'"):
        next(iterator)
    assert next(iterator)["image"][:, 0, 0, 0].tolist() == [6, 7, 8]
    iterator.close()


def test_seekable_gzip(plain, compressed):
    pytest.importorskip("indexed_gzip")
    path = compressed("gz")
    assert TarSource(path).mode == "stream"
    assert seekable.make_seekable(path) == path + seekable.SEEK_SUFFIX
    source = TarSource(path)
    assert source.mode == "seekable"
    expected = TarSource(plain)
    assert [source[i] for i in range(N)] == [expected[i] for i in range(N)]
    options = {"batch_size": 7, "epochs": 1, "shuffle": True}
    assert values(from_tar(path, **options)) == values(from_tar(plain, **options))
    with pytest.raises(UserError, match="needs none"):
        seekable.make_seekable(plain)
    with pytest.raises(UserError, match="jdl pack"):
        seekable.make_seekable(compressed("xz"))
    with open(path + seekable.SEEK_SUFFIX, "r+b") as file:
        file.write(b"junk")
    with pytest.raises(DataError, match="seek file"):
        TarSource(path, keep_index=False)


# ---------------------------------------------------------------------- remote


class Server(http.server.ThreadingHTTPServer):
    """Serves one file: with or without ranges, slowly, or dropping every third connection."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, content, *, ranges=True, drop=0, delay=0.0, piece=1 << 16):
        self.content, self.ranges, self.drop, self.delay = content, ranges, drop, delay
        self.piece = piece
        self.requests, self.etag = 0, '"1"'
        self.at_once = self.most_at_once = 0
        self.counting = threading.Lock()
        self.cut = collections.Counter()  # where a range starts -> how often it was cut
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/a.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a short answer would come 40 ms late

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        content = server.content
        if content is None:
            self.send_error(404)
            return
        with server.counting:
            server.requests += 1
            number = server.requests
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.delay)
        with server.counting:
            server.at_once -= 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop, status = 0, len(content), 200
        if asked and server.ranges:
            start, stop, status = int(asked[1]), min(int(asked[2]) + 1, len(content)), 206
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", server.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        # A client gives up after six tries: where only some connections are cut, each range is
        # cut no more than three times.
        spared = server.drop > 1 and server.cut[start] == 3
        if server.drop and number % server.drop == 0 and not spared:
            server.cut[start] += 1
            self.wfile.write(content[start : start + (stop - start) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        for at in range(start, stop, server.piece):
            self.wfile.write(content[at : min(at + server.piece, stop)])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(plain, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("JDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.001)
    servers = []

    def start(content=None, **options):
        if content is None:
            with open(plain, "rb") as file:
                content = file.read()
        servers.append(Server(content, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop": 3},
        {"delay": 0.02},
        {"ranges": False},
        {"ranges": False, "drop": 3, "piece": 1000},
    ],
)
def test_remote_archives(options, plain, serve, caplog):
    server = serve(**options)
    ranges = options.get("ranges", True)
    with caplog.at_level(logging.WARNING, "jdl.data"):
        source = TarSource(server.url)
    assert source.mode == ("random" if ranges else "stream")
    assert ("without ranges" in caplog.text) != ranges
    expected = TarSource(plain)
    assert [source[i] for i in (3, 4, 50)] == [expected[i] for i in (3, 4, 50)]
    data = from_tar(server.url, batch_size=16, epochs=1, shuffle=True, grayscale=True)
    assert sorted(flat(values(data))) == list(range(N))


def test_a_remote_index_is_kept_and_renewed(serve):
    server = serve()
    first = TarSource(server.url)
    assert first.indexes[0].file.startswith(os.environ["JDL_CACHE"])
    before = server.requests
    TarSource(server.url)
    assert server.requests - before < 10
    server.etag = '"2"'
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote, "_RECHECK", 0.0)
        with pytest.raises(DataError, match="has changed"):
            first[0]
    assert len(TarSource(server.url)) == N


def test_remote_compressed(plain, serve):
    with open(plain, "rb") as file:
        server = serve(gzip.compress(file.read()))
    data = from_tar(server.url, batch_size=16, grayscale=True)
    assert flat(values(data)) == list(range(N))


def test_remote_failures_are_clear(serve):
    server = serve()
    url = server.url
    server.content = None
    with pytest.raises(DataError, match="no such file"):
        TarSource(url)
    server = serve(drop=1)
    with pytest.raises(DataError, match="tried 6 times"):
        TarSource(server.url)
    server = serve()
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"Cannot look up"):
        TarSource(url)
    with pytest.raises(UserError, match="nosuch"):
        TarSource("nosuch://a/b.tar")


def test_object_stores_through_fsspec(plain, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("JDL_CACHE", str(tmp_path / "cache"))
    with open(plain, "rb") as file:
        fsspec.filesystem("memory").pipe("/bucket/a-0.tar", file.read())
        file.seek(0)
        fsspec.filesystem("memory").pipe("/bucket/a-1.tar", file.read())
    source, expected = TarSource("memory://bucket/a-{0..1}.tar"), TarSource(plain)
    shuffled = np.random.default_rng(0).permutation(2 * N)
    assert list(source.read_many(shuffled)) == list(expected.read_many(shuffled % N))


def test_s3(plain, tmp_path, monkeypatch):
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    keys = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "JDL_CACHE": str(tmp_path / "cache")}
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        s3 = s3fs.S3FileSystem(skip_instance_cache=True)
        s3.mkdir("bucket")
        s3.put(plain, "bucket/a.tar")
        source, expected = TarSource("s3://bucket/a.tar"), TarSource(plain)
        assert source.mode == "random"
        shuffled = np.random.default_rng(0).permutation(N)
        assert list(source.read_many(shuffled)) == list(expected.read_many(shuffled))
        assert [source[i] for i in (0, N - 1)] == [expected[i] for i in (0, N - 1)]
        with pytest.raises(DataError, match="no such file"):
            TarSource("s3://bucket/b.tar")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(remote, "_RECHECK", 0.0)
            s3.pipe("bucket/a.tar", b"other")
            with pytest.raises(DataError, match="has changed"):
                source[0]
    finally:
        server.stop()


@pytest.fixture(scope="module")
def large():
    """An archive of 200 members of about 40 kB, of random bytes that are no images."""
    rng, out = np.random.default_rng(0), io.BytesIO()
    members = [rng.bytes(40_000 + i) for i in range(200)]
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i, data in enumerate(members):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue(), members


def test_records_side_by_side_come_in_one_request(serve, large):
    content, members = large
    server = serve(content)
    source = TarSource(server.url)
    source[0]
    for records, most in ((np.arange(40), 1), (np.arange(40)[::-1], 1), (np.arange(200), 5)):
        server.requests = 0
        assert list(source.read_many(records)) == [members[i] for i in records]
        assert 1 <= server.requests <= most


def test_scattered_records_come_at_the_same_time(serve, large):
    """One at a time would take as many round trips as there are records."""
    content, members = large
    server = serve(content)
    source = TarSource(server.url)
    source[0]
    server.delay = 0.05
    records = np.arange(0, 200, 5)
    np.random.default_rng(0).shuffle(records)
    server.requests = server.most_at_once = 0
    assert list(source.read_many(records)) == [members[i] for i in records]
    assert server.requests == len(records)
    assert server.most_at_once >= 20


def test_archives_are_asked_at_the_same_time(serve, plain, monkeypatch):
    monkeypatch.setattr(tar_source, "_open_left", [2])  # of files; opening takes more requests
    server = serve()
    source = TarSource([server.url.replace("a.tar", f"{k}.tar") for k in range(8)])
    every = np.arange(8) * N + np.arange(8)
    read = list(source.read_many(every))
    server.requests, server.most_at_once, server.delay = 0, 0, 0.05
    assert list(source.read_many(every)) == read == list(TarSource(plain).read_many(np.arange(8)))
    assert server.requests == 8
    assert server.most_at_once >= 6


def test_a_broken_request_for_many_records_is_repeated(serve, large):
    content, members = large
    server = serve(content)
    source = TarSource(server.url)
    source[0]
    server.drop, server.requests = 2, 1
    assert list(source.read_many(np.arange(200))) == members
    assert sum(server.cut.values()) >= 1
    server.drop = 1
    with pytest.raises(DataError, match="tried 6 times"):
        list(source.read_many(np.arange(200)))


def test_bytes_waiting_to_be_used_are_bounded(serve, large, monkeypatch):
    content, members = large
    server = serve(content)
    source = TarSource(server.url)
    source[0]
    monkeypatch.setattr(remote, "_WAITING", 1 << 20)
    server.requests = 0
    reading = source.read_many(np.arange(200))
    assert next(reading) == members[0]
    time.sleep(0.2)
    assert server.requests == 2  # those of the first megabyte, and the next ones
    reading.close()
    tracemalloc.start()
    for data, expected in zip(source.read_many(np.arange(200)), members, strict=True):
        assert data == expected
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 1100)), max_size=30),
    limits=st.tuples(st.integers(0, 100), st.integers(1, 400), st.integers(1, 600)),
)
def test_any_places_give_their_bytes(places, limits):
    """Overlapping, empty, repeated, up to the end and beyond, whatever the limits."""
    fsspec = pytest.importorskip("fsspec")
    content = np.random.default_rng(0).bytes(1000)
    fsspec.filesystem("memory").pipe("/bucket/bytes", content)
    file = remote.RemoteFile("memory://bucket/bytes")
    asked, cat_file = [], file._fs.cat_file

    def recorded(name, start, end):
        asked.append((start, end))
        return cat_file(name, start=start, end=end)

    with pytest.MonkeyPatch.context() as patched:
        for name, limit in zip(("_GAP", "_LONGEST", "_WAITING"), limits, strict=True):
            patched.setattr(remote, name, limit)
        patched.setattr(file._fs, "cat_file", recorded)
        read = list(file.pread_many(places))
    assert read == [content[at : at + size] for size, at in places]
    gap, longest, _ = limits
    assert all(end - start <= max(longest, 300) for start, end in asked)
    wanted = sum(map(len, read))
    assert sum(end - start for start, end in asked) <= wanted + gap * len(places)


def test_streaming_many_shards_keeps_one_in_memory(tmp_path):
    """Each open decompressor holds a window of a megabyte or more."""
    data = np.random.default_rng(0).bytes(4 << 20)
    for k in range(12):
        path = write_tar(tmp_path / f"{k:02d}", [(f"c/{k}.png", png(k)), ("x.bin", data)])
        with open(path, "rb") as file:
            (tmp_path / f"{k:02d}.tar.gz").write_bytes(gzip.compress(file.read(), 0))
        os.unlink(path)
    source = TarSource(tmp_path)
    list(source.read_many(np.arange(12)))
    tracemalloc.start()
    assert len(list(source.read_many(np.arange(12)))) == 12
    assert tracemalloc.get_traced_memory()[1] < 6 << 20
    tracemalloc.stop()


def linked_tar(path):
    """Images with links to the first and the last of them, and one to nothing."""
    with tarfile.open(path, "w") as tar:
        for i in range(N):
            for name, kind, target in (
                (f"a/{i:02d}.png", tarfile.REGTYPE, ""),
                (f"b/{i:02d}.png", tarfile.SYMTYPE, f"../a/{N - 1 - i:02d}.png"),
                (f"c/{i:02d}.png", tarfile.LNKTYPE, "a/00.png"),
            ):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                data = png(i) + bytes(50_000) if kind == tarfile.REGTYPE else b""
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_links_in_a_compressed_archive_are_followed_without_going_back(tmp_path, monkeypatch):
    plain = linked_tar(tmp_path / "a.tar")
    with open(plain, "rb") as file:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(file.read(), 1))
    source = TarSource(tmp_path / "a.tar.gz")
    passes = []
    real = archive.Stream._end
    monkeypatch.setattr(archive.Stream, "_end", lambda self: (passes.append(1), real(self)))
    found = {record.name: record.data for record in source}
    assert not passes
    with tarfile.open(plain) as tar:
        expected = {info.name: tar.extractfile(info).read() for info in tar}
    assert found == expected
    assert len(found) == 3 * N


def test_a_tar_that_is_read_once_names_the_links_that_it_leaves_out(tmp_path):
    opened = open_archive(linked_tar(tmp_path / "a.tar"))
    stream = MemberStream(opened)
    assert [member.name for member in stream] == [f"a/{i:02d}.png" for i in range(N)]
    opened.close()
    assert {(d.word, d.lost) for d in stream.damage} == {("link", True)}
    assert [d.name for d in stream.damage[:2]] == ["b/00.png", "c/00.png"]
    assert len(stream.damage) == 2 * N
