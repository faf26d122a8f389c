"""Reading a layer: blob to index (digests, headers, content hashes), and the walk over the headers alone."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from layerkit.formats.tar.reader import Chunk, TarReader
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.unpack import index_layer

ROUNDS = 5
LAYER_BYTES = 1 << 30
LAYER_ENTRIES = 60_000
LARGEST_FILE = 1 << 20  # gives some 20 KB a file, as in public images
HEADER_ENTRIES = 20_000
MEMORY_ENTRIES = 500_000
SOURCES = ("/usr/lib", "/usr/share", "/usr/bin", "/usr/include", "/usr/local", "/opt", "/root", "/home", "/var/lib")


def rows(work: Path) -> list[dict[str, Any]]:
    """Return the measurements, made in ``work``, an empty folder."""
    tar = work / "layer.tar"
    entries = make_layer(tar)
    out = []
    for form, tool, level, target in (("gzip", "gzip", "-6", ">= 2.5"), ("zstd", "zstd", "-3", ">= 2")):
        blob = tar.with_suffix(f".tar.{form}")
        compressor = "pigz" if form == "gzip" and shutil.which("pigz") else tool
        with tar.open("rb") as source, blob.open("wb") as sink:
            subprocess.run([compressor, level, "-c"], stdin=source, stdout=sink, check=True)
        descriptor, diff_id = described(blob), described(tar).digest
        ours, theirs = alternate(
            partial(index, blob, descriptor, diff_id),
            partial(subprocess.check_output, f"{tool} -dc < '{blob}' | sha256sum", shell=True),
        )
        child = subprocess.run(
            [sys.executable, __file__, "peak", blob, str(descriptor.digest)], stdout=subprocess.PIPE, check=True
        )
        size = tar.stat().st_size
        what = f"index, {form}: {size / 1e6:,.0f} MB, {entries:,} entries with PAX headers"
        out.append(row(what, ours, f"{tool} -d | sha256sum", theirs, target) | {"memory": int(child.stdout)})
        blob.unlink()
    tar.unlink()
    for name, header_form in (("PAX", tarfile.PAX_FORMAT), ("GNU", tarfile.GNU_FORMAT)):
        data = make_headers(header_form)
        # One thread each and no waiting: processor time is the same, and does not ask who else is at work.
        ours, theirs = alternate(partial(walk, data), partial(walk_with_tarfile, data), time.process_time)
        what = f"headers, {name}: each of {HEADER_ENTRIES:,} entries"
        out.append(
            row(what, ours / HEADER_ENTRIES, "tarfile", theirs / HEADER_ENTRIES, ">= 5" if name == "PAX" else "")
        )
    child = subprocess.run([sys.executable, __file__, "entries"], stdout=subprocess.PIPE, check=True)
    per_entry = int(child.stdout) / MEMORY_ENTRIES
    what = f"index, peak memory: {per_entry:.0f} B for each of {MEMORY_ENTRIES:,} entries in no order"
    out.append(row(what, None, "", None, "<= 1 (350 B per entry)") | {"ratio": per_entry / 350})
    return out


def row(what: str, ours: float | None, peer: str, theirs: float | None, target: str) -> dict[str, Any]:
    ratio = theirs / ours if ours and theirs else None
    return {"what": what, "ours_s": ours, "peer": peer, "peer_s": theirs, "ratio": ratio, "target": target}


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Return the medians in seconds of both, measured by turns, after one run of each that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for call, found in zip((ours, theirs), times, strict=True):
            started = clock()
            call()
            if number:
                found.append(clock() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def make_layer(tar: Path) -> int:
    """Write a layer of the machine's own files, with PAX headers as GNU tar makes them; return its entries."""
    names: list[bytes] = []
    size = 0
    for source in SOURCES:
        for folder, folders, files in os.walk(os.fsencode(source)):
            folders.sort()
            names.append(folder)
            for name in sorted(files):
                path = os.path.join(folder, name)
                stat = os.lstat(path)
                if stat.st_size < LARGEST_FILE:
                    names.append(path)
                    size += stat.st_size
            if size >= LAYER_BYTES or len(names) >= LAYER_ENTRIES:
                break
        if size >= LAYER_BYTES or len(names) >= LAYER_ENTRIES:
            break
    command: list[str | Path] = [
        "tar", "--format=posix", "--no-recursion", "-cf", tar, "-C", "/", "--ignore-failed-read", "--null",
        "--files-from=-",
    ]  # fmt: skip
    done = subprocess.run(
        command, input=b"\0".join(name.lstrip(b"/") for name in names), stderr=subprocess.DEVNULL, check=False
    )
    if done.returncode > 1:  # 1: a file changed while it was read
        raise RuntimeError(f"tar ended with {done.returncode}")
    return len(names)


def make_headers(form: int) -> bytes:
    """Return a tar of tiny files, so that what is measured is the headers."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for i in range(HEADER_ENTRIES):
            info = tarfile.TarInfo(f"usr/lib/python3/dist-packages/package{i // 40}/module_{i % 40:02}.py")
            info.size, info.mtime = i % 64, 1_700_000_000 + i
            if form == tarfile.PAX_FORMAT:
                times = dict.fromkeys(("mtime", "atime", "ctime"), f"{info.mtime}.{i:09}")
                info.pax_headers = times
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return out.getvalue()


def walk(data: bytes) -> None:
    reader = TarReader("layer")
    reader.read([(data, len(data))])
    assert len(reader.index(Digest.of(b""))) == HEADER_ENTRIES


def walk_with_tarfile(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert sum(1 for _ in archive) == HEADER_ENTRIES


def described(path: Path) -> Descriptor:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Descriptor("", Digest("sha256", digest), path.stat().st_size)


def index(blob: Path, descriptor: Descriptor, diff_id: Digest | None) -> None:
    with blob.open("rb", buffering=0) as reader:
        index_layer(reader, descriptor, diff_id)


def peak_bytes() -> int:
    """Return this process's peak memory; unlike getrusage's it does not count what forked it."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def many_entries(count: int) -> Iterator[Chunk]:
    """Yield a tar of ``count`` small files in chunks, their names in no order, without holding it."""
    info = tarfile.TarInfo()
    buffer = bytearray(512 * 2048)
    for start in range(0, count, 2048):
        rows = range(start, min(start + 2048, count))
        for at, i in enumerate(rows):
            info.name = f"usr/lib/python3/dist-packages/package{i * 7919 % count // 50:05}/module_{i % 50:03}.py"
            buffer[at * 512 : at * 512 + 512] = info.tobuf(tarfile.USTAR_FORMAT)
        yield buffer, len(rows) * 512
    yield bytes(1024), 1024


def peak_of_entries() -> int:
    """Return how far reading MEMORY_ENTRIES entries raises this process's peak, in bytes."""
    before = 0
    # The first reading takes what is the same for every layer: modules, a chunk, a batch of headers.
    for count in (2 * 8192, MEMORY_ENTRIES):
        before = peak_bytes()
        reader = TarReader("layer")
        reader.read(many_entries(count))
        assert len(reader.index(Digest.of(b""))) > 0
    return peak_bytes() - before


if __name__ == "__main__":
    if sys.argv[1] == "entries":
        print(peak_of_entries())
        sys.exit()
    _, _, path, text = sys.argv
    found = Path(path)
    index(found, Descriptor("", Digest.parse(text), found.stat().st_size), None)
    print(peak_bytes())
