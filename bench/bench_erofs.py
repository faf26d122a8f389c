"""META as EROFS: built from a tree, and patched for another id map; and DATA for a layer.

Trees are synthetic columns (16 files to a directory, names of 15 to 17 bytes, 5 % symlinks). The peer is
mkcomposefs, from its dump file of the same tree; Debian 12 does not have it: put it on PATH, or name it in
MKCOMPOSEFS. mkfs.erofs makes no stubs, so it gets empty files of the same names. Each build runs in a child of
its own, so that its peak memory is its own; that of the tree itself is taken off, for a caller has it anyway.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerkit.model.tree import Tree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
ROUNDS = 5


def _resident(what: str, *, restart: bool = False) -> int:
    """Return a line of /proc/self/status in bytes; ``restart`` forgets the peak so far (proc(5), clear_refs)."""
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) << 10


def measure(n: int, folder: Path) -> dict[str, Any]:
    """Build META of ``n`` names and patch it; return seconds and bytes."""
    from trees import big_columns, mapped

    from layerkit.formats.erofs.meta import build_meta
    from layerkit.formats.erofs.patch import patch_meta
    from layerkit.idmap import IdMap, Mapping
    from layerkit.metaonly import metadata_layer

    tree = big_columns(n)
    meta = metadata_layer(tree)
    before = _resident("VmRSS", restart=True)
    image, patched = folder / "meta", folder / "patched"
    build = []
    for _ in range(ROUNDS):
        image.unlink(missing_ok=True)
        start = time.perf_counter()
        with image.open("xb") as file:
            fixups = build_meta(meta, file)
        build.append(time.perf_counter() - start)
    peak = _resident("VmHWM")
    encoded = fixups.encode()
    other, shift = mapped(meta.tree), IdMap.of([(0, 100_000, 1 << 31)])
    patch = []
    for _ in range(ROUNDS):
        patched.unlink(missing_ok=True)
        start = time.perf_counter()
        with image.open("rb") as old, patched.open("xb") as new:
            patch_meta(old.fileno(), new.fileno(), fixups, Mapping(shift, shift))
        patch.append(time.perf_counter() - start)
    with (folder / "rebuilt").open("xb") as file:
        build_meta(metadata_layer(other), file)
    theirs = composefs(tree, folder)
    same = subprocess.run(["cmp", folder / "rebuilt", patched], check=False).returncode == 0
    return {
        "build": sorted(build)[ROUNDS // 2], "patch": sorted(patch)[ROUNDS // 2], "bytes": image.stat().st_size / n,
        "fixups": len(encoded) / n, "rss": peak - before, "peak": peak, "same": same,
        "composefs": theirs,
    }  # fmt: skip


def composefs(tree: Tree, folder: Path) -> float | None:
    """Return the median seconds that mkcomposefs takes for ``tree``, None where it is not installed.

    Its dump is one line for each name: path, size, mode, nlink, uid, gid, device, mtime, payload, content, digest.
    Capabilities and ACLs, on one name of a thousand, are left out.
    """
    tool = os.environ.get("MKCOMPOSEFS") or shutil.which("mkcomposefs")
    if tool is None:
        return None
    dump = folder / "dump"
    with dump.open("wb") as file:
        paths = [b""]
        for row in range(len(tree.parent)):
            if row:
                paths.append(paths[tree.parent[row]] + b"/" + tree.name[row])
            sha256 = tree.sha256[row].tobytes().hex().encode()
            payload = b"-"
            if tree.mode[row] >> 12 == 8 and tree.size[row]:
                payload = sha256[:2] + b"/" + sha256[2:]
            elif tree.target[row] >= 0:
                payload = tree.targets[tree.target[row]]
            file.write(b"%s %d %o %d %d %d 0 %d.%d %s - -\n" % (
                paths[row] or b"/", tree.size[row], tree.mode[row], tree.nlink[row], tree.uid[row], tree.gid[row],
                tree.mtime[row], tree.mtime_ns[row], payload,
            ))  # fmt: skip
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run([tool, "--from-file", dump, folder / "composefs"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[ROUNDS // 2]


def peer(n: int, folder: Path) -> float | None:
    """Return the seconds that mkfs.erofs takes for ``n`` empty files, None where it is not installed."""
    if shutil.which("mkfs.erofs") is None:
        return None
    source = folder / "source"
    for row in range(n):
        if row % 17 == 0:
            above = source / f"name-{row:07}.py"
            above.mkdir(parents=True)
        else:
            os.close(os.open(above / f"name-{row:07}.py", os.O_CREAT | os.O_WRONLY))
    start = time.perf_counter()
    subprocess.run(["mkfs.erofs", "--quiet", "-T0", folder / "peer", source], check=True, capture_output=True)
    return time.perf_counter() - start


def data(files: int, folder: Path) -> float:
    """Return the seconds to map the files of a layer onto its tar."""
    import numpy as np
    from made_layers import written_layer

    from layerkit.formats.erofs.data import build_data

    rng = np.random.default_rng(1)
    folder.mkdir()
    index, tar = written_layer(folder, {b"f%d" % i: rng.bytes(16) for i in range(files)})
    start = time.perf_counter()
    with tar.open("rb") as source, (folder / "data").open("xb") as file:
        build_data(index, source, file)
    return time.perf_counter() - start


def rows(work: Path) -> list[dict[str, Any]]:
    """Return the measurements, in ``work``, an empty folder."""
    out: list[dict[str, Any]] = []

    def row(
        what: str, ours: float | None, peer_name: str, theirs: float | None, target: str, memory: int | None = None
    ) -> None:
        ratio = theirs / ours if ours and theirs else None
        out.append(
            {"what": what, "ours_s": ours, "peer": peer_name, "peer_s": theirs, "ratio": ratio, "target": target,
             "memory": memory}
        )  # fmt: skip

    for n in (50_000, 200_000, 1_000_000):
        folder = work / str(n)
        folder.mkdir()
        command = [sys.executable, __file__, "measure", str(n), str(folder)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        found = json.loads(done.stdout)
        assert found["same"], "a patched META is not the META of the mapped tree"
        label = f"{n:,}"
        what = f"META build, {label} entries ({found['bytes']:.0f} B/entry; target 230)"
        composed = found["composefs"]
        row(what, found["build"], "mkcomposefs, from a dump" if composed else "", composed,
            ">= 3" if composed else "<= 2 s" if n == 1_000_000 else "", found["peak"])  # fmt: skip
        theirs = peer(n, folder) if n == 50_000 else None
        if theirs:
            row(what, found["build"], "mkfs.erofs, empty files", theirs, "")
        if n > 50_000:  # of less, what numpy takes once is too large a part
            row(f"META build, {label}: memory beyond the tree, {found['rss'] / n:.0f} B/entry", None, "", None,
                "<= 350 B/entry", found["rss"])  # fmt: skip
        what = f"META patch, {label} ids, image copied ({found['fixups']:.1f} B/entry of fixups)"
        row(what, found["patch"], "", None, "<= 0.1 s" if n == 1_000_000 else "")
        shutil.rmtree(folder)
    row("DATA of a layer of 100,000 files", data(100_000, work / "data"), "", None, "")
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True)
        for line in rows(folder):
            print(json.dumps(line))
