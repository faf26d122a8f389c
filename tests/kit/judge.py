"""The judge of our mounts: umoci's tree of an image, its owners mapped by the kernel, and two trees compared."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from needs import need_tool
from programs import run


def umoci(image: str, bundle: Path) -> Path:
    """Unpack ``image`` (``LAYOUT:TAG``) to the new folder ``bundle`` and return its root folder."""
    need_tool("umoci")
    run("umoci", "unpack", "--image", image, bundle)
    return bundle / "rootfs"


@contextmanager
def unpacked(image: str, work: Path, extents: tuple[tuple[int, int, int], ...]) -> Iterator[Path]:
    """Give umoci's tree of ``image`` (``LAYOUT:TAG``) through an idmapped mount; ``work`` takes some folders."""
    with mapped(umoci(image, work / "bundle"), work / "shown", extents) as shown:
        yield shown


@contextmanager
def mapped(folder: Path, shown: Path, extents: tuple[tuple[int, int, int], ...]) -> Iterator[Path]:
    """Give ``folder`` with its owners mapped by the kernel, at the new folder ``shown``."""
    from layerkit.linux import mounts, userns
    from layerkit.linux import syscalls as sc

    shown.mkdir()
    namespace = userns.userns_fd(extents, extents)
    try:
        tree = sc.open_tree(folder)
        try:
            mounts.idmap(tree, namespace)
            mounts.attach(tree, shown)
        finally:
            os.close(tree)
    finally:
        os.close(namespace)
    try:
        yield shown
    finally:
        run("umount", "--lazy", shown)


class Shown(NamedTuple):
    """What the kernel shows of one path; inode numbers and nlink of folders are left out on purpose."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int
    target: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    sha256: str
    links: tuple[bytes, ...]


def snapshot(root: Path) -> dict[bytes, Shown]:
    """Return every path below ``root`` (itself as ``b"."``) with all that lstat, xattrs and reads show."""
    found: dict[bytes, tuple[os.stat_result, bytes, tuple[tuple[bytes, bytes], ...], str]] = {}
    groups: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    hashes: dict[tuple[int, int], str] = {}
    top = os.fsencode(root)
    stack = [b"."]
    while stack:
        path = stack.pop()
        full = os.path.join(top, path)
        st = os.lstat(full)
        target = os.readlink(full) if stat.S_ISLNK(st.st_mode) else b""
        key = (st.st_dev, st.st_ino)
        if stat.S_ISREG(st.st_mode) and key not in hashes:
            with Path(os.fsdecode(full)).open("rb") as f:
                hashes[key] = hashlib.file_digest(f, "sha256").hexdigest()
        if stat.S_ISDIR(st.st_mode):
            stack.extend(os.path.join(path, name) for name in os.listdir(full))
        else:
            groups[key].append(path)
        found[path] = (st, target, xattrs(full), hashes.get(key, "") if stat.S_ISREG(st.st_mode) else "")
    return {
        path: Shown(
            mode=st.st_mode,
            uid=st.st_uid,
            gid=st.st_gid,
            size=0 if stat.S_ISDIR(st.st_mode) else st.st_size,
            mtime_ns=st.st_mtime_ns,
            rdev=st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0,
            target=target,
            xattrs=pairs,
            sha256=sha,
            links=() if stat.S_ISDIR(st.st_mode) else tuple(sorted(groups[st.st_dev, st.st_ino])),
        )
        for path, (st, target, pairs, sha) in found.items()
    }


def xattrs(path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Return the xattrs of ``path`` itself as sorted pairs."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        raise
    return tuple(sorted((os.fsencode(n), os.getxattr(path, n, follow_symlinks=False)) for n in names))


def differences(
    got: dict[bytes, Shown], want: dict[bytes, Shown], *, skip: frozenset[bytes] = frozenset()
) -> list[str]:
    """Return a line for each path and attribute that is not equal; paths in ``skip`` keep out."""
    lines = [f"missing {p!r}" for p in sorted(want.keys() - got.keys() - skip)]
    lines += [f"unexpected {p!r}" for p in sorted(got.keys() - want.keys() - skip)]
    for path in sorted(got.keys() & want.keys() - skip):
        lines += [
            f"{path!r} {field}: got {a!r}, want {b!r}"
            for field, a, b in zip(Shown._fields, got[path], want[path], strict=True)
            if a != b
        ]
    return lines


def data_extents(path: Path) -> list[tuple[int, int]]:
    """Return the (start, end) runs of data of a file as SEEK_DATA and SEEK_HOLE report them."""
    runs, end = [], 0
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        while end < size:
            try:
                start = os.lseek(f.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            end = os.lseek(f.fileno(), start, os.SEEK_HOLE)
            runs.append((start, end))
    return runs
