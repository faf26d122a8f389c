"""EROFS images before their judges: the kernel that mounts them, and fsck.erofs."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_layers import written_layer
from needs import need_tool
from trees import (
    ACL_ACCESS,
    ACL_DEFAULT,
    CAPABILITY,
    Spec,
    big_columns,
    capability,
    directory,
    make_tree,
    mapped,
    regular,
    symlink,
    user_acl,
)

from layerkit.formats.erofs.data import build_data
from layerkit.formats.erofs.meta import build_meta
from layerkit.formats.erofs.patch import Fixups, patch_meta
from layerkit.idmap import IdMap, Mapping
from layerkit.linux import mounts
from layerkit.metaonly import METACOPY_VALUE, Namespace, data_path, metadata_layer
from layerkit.model.entry import Extent
from layerkit.model.tree import Node, Tree

pytestmark = pytest.mark.usefixtures("as_root")


@contextmanager
def mounted(fd: int) -> Iterator[str]:
    """Yield the folder of a detached mount; it is gone at the end, whatever happens."""
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def everything() -> dict[bytes, Spec]:
    """Return an entry of every kind, and the corners of each."""
    rng = random.Random(1)
    specs: dict[bytes, Spec] = {
        b"": directory(0o1777, uid=3, gid=4, mtime=-1, mtime_ns=999_999_999),
        b"plain": regular(b"hello", 0o640, uid=1000, gid=70000, mtime=1 << 33, mtime_ns=1),
        b"empty": regular(b"", 0o4755, uid=4_294_967_294, gid=4_294_967_294, mtime=-(1 << 40)),
        b"hard": regular(b"shared by three", mtime=-2, mtime_ns=500_000_000, links=[b"dir/hard2", b"z/hard3"]),
        b"empty-hard": regular(links=[b"z/empty-hard2"]),
        b"fifo": Spec(stat.S_IFIFO | 0o622, uid=9),
        b"char": Spec(stat.S_IFCHR | 0o666, major=1, minor=3),
        b"block": Spec(stat.S_IFBLK | 0o660, major=4095, minor=1_048_575),
        b"block2": Spec(stat.S_IFBLK | 0o660, major=259, minor=257),
        b"link": symlink(b"plain", uid=1, gid=2, mtime=-5),
        b"link-odd": symlink(b"\xff\xfe not utf-8 \n"),
        b"link-4095": symlink(b"/" + b"x" * 4094),
        b"link-4032": symlink(b"y" * 4032),
        b"link-4033": symlink(b"y" * 4033),
        b"caf\xe9/\xff\x01\n": regular(b"odd name"),
        b"n" * 255 + b"/" + b"m" * 255: regular(b"long names"),
        b"empty-dir": directory(0o700),
        b"acl-dir": directory(0o775, xattrs=((ACL_ACCESS, user_acl(1000)), (ACL_DEFAULT, user_acl(1001)))),
        b"acl-file": regular(b"a", 0o775, xattrs=((ACL_ACCESS, user_acl(1000)),)),
        b"cap": regular(b"c", xattrs=((CAPABILITY, capability(5)),)),
        b"cap-empty": regular(xattrs=((CAPABILITY, capability(5)), (b"trusted.t", b""), (b"user.u", b"\0\1"))),
        b"xattr-link": symlink(b"q", xattrs=((b"security.selinux", b"label\0"), (b"trusted.l", b"1"))),
        b"big-xattr": regular(b"b", xattrs=((b"user.big", rng.randbytes(65_000)), (b"user.n" + b"k" * 249, b"v"))),
        b"many-xattrs": regular(
            b"m", xattrs=tuple(sorted((b"user.k%d" % i, b"value %d" % i * 9) for i in range(600)))
        ),
        b"many-xattrs-dir": directory(
            xattrs=tuple(sorted((b"user.k%d" % i, b"value %d" % i * 9) for i in range(300)))
        ),
        b"huge": replace(regular(b"h"), size=(1 << 43) + 5),
    }  # fmt: skip
    for i, name in enumerate((b"!", b"+a", b"-", b".-", b".a", b"..a", b"...", b"...-", b".\x01", b"a", b"-z")):
        specs[b"dots/" + name] = regular(b"%d" % i)
    for i in range(700):
        specs[b"middle/%d-%s" % (i, b"w" * (i % 200))] = regular(b"%d" % i) if i % 5 else symlink(b"t%d" % i * 20)
    for i in range(300):
        specs[b"many/dir%03d/%s" % (i, b"e" * (i % 255 + 1))] = directory(mtime=i)
        for j in range(i % 40):
            specs[b"many/dir%03d/sub/%d" % (i, j)] = regular(b"%d" % (i * j), uid=i, gid=j)
    return specs


def expected_xattrs(node: Node, namespace: Namespace, raw: bool) -> dict[bytes, bytes]:
    found = dict(node.xattrs)
    if raw and stat.S_ISREG(node.mode) and node.size:
        found[namespace.prefix + b"metacopy"] = METACOPY_VALUE
        found[namespace.prefix + b"redirect"] = b"/" + data_path(node.sha256)
    return found


def compare(
    root: str, tree: Tree, namespace: Namespace = Namespace.TRUSTED, *, raw: bool = True
) -> dict[bytes, int]:
    """Compare everything that lstat, readlink, listxattr and readdir show with ``tree``; return st_ino by path."""
    inos, children = {}, dict[bytes, list[bytes]]()
    for node in tree.nodes():
        path = os.path.join(os.fsencode(root), b"." if not node.path else node.path)
        found = os.lstat(path)
        want = (node.mode, node.uid, node.gid, node.mtime * 10**9 + node.mtime_ns)
        assert (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns) == want, node.path
        inos[node.path] = found.st_ino
        if node.path:
            above, _, name = node.path.rpartition(b"/")
            children.setdefault(above, []).append(name)
        if stat.S_ISDIR(node.mode):
            children.setdefault(node.path, [])
            if raw:
                assert found.st_nlink == node.nlink, node.path
        else:
            assert (found.st_nlink, found.st_size) == (node.nlink, node.size), node.path
        if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
            assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (node.major, node.minor), node.path
        if stat.S_ISLNK(node.mode):
            assert os.readlink(path) == node.target, node.path
        names = [os.fsencode(n) for n in os.listxattr(path, follow_symlinks=False)]
        assert len(set(names)) == len(names), node.path
        shown = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
        assert shown == expected_xattrs(node, namespace, raw), node.path
    for path, names in children.items():
        folder = os.path.join(os.fsencode(root), path or b".")
        assert sorted(os.listdir(folder)) == sorted(names), path
        with os.scandir(folder) as entries:
            for entry in entries:
                whole = path + b"/" + entry.name if path else entry.name
                assert entry.inode() == inos[whole]
    return inos


def build(tree: Tree, path: Path, namespace: Namespace = Namespace.TRUSTED) -> Fixups:
    with path.open("xb") as file:
        return build_meta(metadata_layer(tree, namespace), file)


@pytest.mark.parametrize("namespace", list(Namespace))
def test_a_mounted_meta_shows_the_tree(tmp_path: Path, namespace: Namespace) -> None:
    tree = make_tree(everything())
    fixups = build(tree, tmp_path / "meta", namespace)
    with mounted(mounts.erofs(tmp_path / "meta")) as root:
        inos = compare(root, tree, namespace)
    numbers = fixups.nids[np.argsort(fixups.rows)]
    assert inos == {node.path: int(numbers[node.inode]) for node in tree.nodes()}
    assert inos[b"hard"] == inos[b"dir/hard2"] == inos[b"z/hard3"]


def test_the_name_filter_lets_every_xattr_through_that_is_there(tmp_path: Path) -> None:
    names = [b"user." + b"x" * n for n in range(1, 60)] + [b"trusted.k%d" % n for n in range(100)]
    tree = make_tree({b"f%d" % i: regular(b"%d" % i, xattrs=((name, b"v%d" % i),)) for i, name in enumerate(names)})
    build(tree, tmp_path / "meta")
    with mounted(mounts.erofs(tmp_path / "meta")) as root:
        compare(root, tree)
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(f"{root}/f0", "user.not-there")


def test_fsck_accepts_meta(tmp_path: Path) -> None:
    need_tool("fsck.erofs")
    build(make_tree(everything()), tmp_path / "everything")
    build(make_tree({}), tmp_path / "root-only")
    build(big_columns(30_000), tmp_path / "big")
    for name in ("everything", "root-only", "big"):
        done = subprocess.run(["fsck.erofs", tmp_path / name], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "<E>" not in done.stdout + done.stderr, (name, done)
    damaged = bytearray((tmp_path / "big").read_bytes())
    damaged[1030] ^= 1
    (tmp_path / "big").write_bytes(damaged)
    done = subprocess.run(["fsck.erofs", tmp_path / "big"], capture_output=True, text=True, check=False)
    assert "checksum" in done.stderr


def test_a_patched_meta_shows_the_mapped_tree_with_the_same_inode_numbers(tmp_path: Path) -> None:
    specs = everything()
    specs[b"empty"].uid = specs[b"empty"].gid = 65534
    tree = make_tree(specs)
    fixups = build(tree, tmp_path / "meta")
    other, shift = mapped(tree), IdMap.of([(0, 100_000, 1 << 31)])
    with (tmp_path / "meta").open("rb") as old, (tmp_path / "patched").open("xb") as new:
        patch_meta(old.fileno(), new.fileno(), fixups, Mapping(shift, shift))
    with mounted(mounts.erofs(tmp_path / "meta")) as root:
        before = compare(root, tree)
    with mounted(mounts.erofs(tmp_path / "patched")) as root:
        assert compare(root, other) == before


def test_a_directory_of_100_000_entries(tmp_path: Path) -> None:
    specs = {b"d/%d" % i: regular(b"%d" % i if i % 3 else b"") for i in range(100_000)}
    tree = make_tree(specs)
    build(tree, tmp_path / "meta")
    with mounted(mounts.erofs(tmp_path / "meta")) as root:
        assert sorted(os.listdir(f"{root}/d".encode())) == sorted(path[2:] for path in specs)
        for i in random.Random(2).sample(range(100_000), 2000):
            assert stat.S_ISREG(os.lstat(f"{root}/d/{i}").st_mode)
            assert not os.path.lexists(f"{root}/d/{i}x")


LAYER_FILES: list[dict[bytes, bytes]] = [
    {b"a": b"lowest", b"usr/b": random.Random(3).randbytes(70_000), b"same": b"equal content", b"empty": b""},
    {b"c": random.Random(4).randbytes(512), b"d": random.Random(5).randbytes(513), b"same2": b"equal content"},
    {b"dir/%d" % i: random.Random(i).randbytes(i * 37 + 1) for i in range(500)},
    {},
]


def test_overlay_of_meta_over_the_tars_reads_every_byte(tmp_path: Path) -> None:
    contents: dict[bytes, bytes] = {}
    data = []
    for number, files in enumerate(LAYER_FILES):
        index, tar = written_layer(tmp_path, files, name=f"{number}.tar")
        with tar.open("rb") as source, (tmp_path / f"{number}.data").open("xb") as file:
            build_data(index, source, file)
        data.append(mounts.erofs(tmp_path / f"{number}.data", tar, directio=True))
        contents |= files
    tree = make_tree({path: regular(content, uid=1000 + len(path)) for path, content in contents.items()})
    for namespace in Namespace:
        build(tree, tmp_path / namespace, namespace)
        lower = mounts.erofs(tmp_path / namespace)
        try:
            both = mounts.overlay(mounts.Layers([lower], data), userxattr=namespace is Namespace.USER)
        finally:
            os.close(lower)
        with mounted(both) as root:
            compare(root, tree, namespace, raw=False)
            for path, content in contents.items():
                assert Path(root, os.fsdecode(path)).read_bytes() == content, path
    for fd in data:
        os.close(fd)


def data_mount_shows(tmp_path: Path, contents: dict[bytes, bytes], tar: Path) -> None:
    """Compare the DATA image ``tmp_path / "data"`` over ``tar`` with ``contents``, names and modes included."""
    want = {data_path(hashlib.sha256(c).digest()): c for c in contents.values() if c}
    with mounted(mounts.erofs(tmp_path / "data", tar, directio=True)) as root:
        found = {}
        assert stat.S_IMODE(os.lstat(root + "/.").st_mode) == 0o555
        for above, folders, names in os.walk(root.encode() + b"/."):
            for folder in folders:
                assert stat.S_IMODE(os.lstat(os.path.join(above, folder)).st_mode) == 0o555
            for name in names:
                path = os.path.join(above, name)
                shown = os.lstat(path)
                assert (shown.st_mode, shown.st_uid, shown.st_gid) == (stat.S_IFREG | 0o444, 0, 0)
                found[path[len(root) + 3 :]] = Path(os.fsdecode(path)).read_bytes()
        assert found == want


def holed(size: int, *runs: tuple[int, int]) -> tuple[tuple[tuple[int, int], ...], bytes]:
    content = bytearray(size)
    for at, length in runs:
        content[at : at + length] = random.Random(at).randbytes(length)
    return runs, bytes(content)


SPARSE: dict[bytes, tuple[Sequence[Extent], bytes]] = {
    b"aligned": holed(1 << 20, (0, 4096), (65536, 8192), ((1 << 20) - 4096, 4096)),
    b"aligned-512": holed(40_000, (512, 1024), (4096, 512), (39936, 64)),
    b"odd-start": holed(300_000, (1000, 5000), (100_001, 77)),
    b"odd-length": holed(300_000, (4096, 5000), (100_352, 512)),
    b"all-hole": holed(12_345),
    b"hole-at-end": holed(1_000_000, (0, 512)),
    b"hole-at-start": holed(1_000_001, (999_936, 65)),
    b"adjacent": holed(9000, (0, 100), (100, 412), (512, 8488)),
    b"large-odd": holed(5 << 20, (3, 3 << 20)),
}


@pytest.mark.parametrize("name", list(SPARSE))
def test_sparse_files_read_as_they_are(tmp_path: Path, name: str | bytes) -> None:
    key = name if isinstance(name, bytes) else name.encode()
    contents = {b"x": b"before", key: SPARSE[key][1], b"y": b"after"}
    index, tar = written_layer(tmp_path, {b"x": b"before", b"y": b"after"}, {key: SPARSE[key]})
    with tar.open("rb") as source, (tmp_path / "data").open("xb") as file:
        build_data(index, source, file)
    data_mount_shows(tmp_path, contents, tar)
    copied = key in (b"odd-start", b"odd-length", b"large-odd")
    stored = sum(length for _, length in SPARSE[key][0])
    assert ((tmp_path / "data").stat().st_size > stored) >= copied


def test_all_sparse_files_in_one_layer(tmp_path: Path) -> None:
    index, tar = written_layer(tmp_path, {b"x": b"x"}, SPARSE)
    with tar.open("rb") as source, (tmp_path / "data").open("xb") as file:
        build_data(index, source, file)
    data_mount_shows(tmp_path, {b"x": b"x"} | {path: content for path, (_, content) in SPARSE.items()}, tar)


def test_a_layer_without_files_mounts(tmp_path: Path) -> None:
    index, tar = written_layer(tmp_path, {b"empty": b""})
    with tar.open("rb") as source, (tmp_path / "data").open("xb") as file:
        build_data(index, source, file)
    data_mount_shows(tmp_path, {}, tar)


@pytest.mark.parametrize("bytes_left", [5, 511, 512])
def test_a_tar_that_ends_with_its_last_file(tmp_path: Path, bytes_left: int) -> None:
    index, tar = written_layer(tmp_path, {b"w": bytes(9000), b"x": b"12345"})
    raw = tar.read_bytes()[: int(index.offset[1]) + bytes_left]
    tar.write_bytes(raw)
    with tar.open("rb") as source, (tmp_path / "data").open("xb") as file:
        build_data(index, source, file)
    data_mount_shows(tmp_path, {b"w": bytes(9000), b"x": b"12345"}, tar)


def test_contents_that_do_not_keep_to_blocks_are_copied(tmp_path: Path) -> None:
    files = {b"x": b"12345", b"y": random.Random(9).randbytes(100_000)}
    index, tar = written_layer(tmp_path, files)
    tar.write_bytes(bytes(7) + tar.read_bytes())
    index = replace(index, offset=np.where(index.offset < 0, -1, index.offset + 7), tar_size=index.tar_size + 7)
    with tar.open("rb") as source, (tmp_path / "data").open("xb") as file:
        build_data(index, source, file)
    assert (tmp_path / "data").stat().st_size > 100_000
    data_mount_shows(tmp_path, files, tar)


def test_20_000_files_of_a_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    files = {b"f%d" % i: rng.bytes(int(n)) for i, n in enumerate(rng.integers(1, 1500, 20_000))}
    index, tar = written_layer(tmp_path, files)
    with tar.open("rb") as source, (tmp_path / "data").open("xb") as file:
        build_data(index, source, file)
    data_mount_shows(tmp_path, files, tar)
