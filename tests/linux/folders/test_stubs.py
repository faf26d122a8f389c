"""A metadata layer as a folder, judged by what the kernel says of it."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import struct
import subprocess
from pathlib import Path

import ordinary_users
import pytest
from disks import disk
from judge import xattrs
from trees import acl, file, folder, tree_of

from layerkit.linux.folders.stubs import write_directory
from layerkit.linux.folders.writer import Written
from layerkit.metaonly import Namespace, data_path, metadata_layer
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import Cancelled, InvalidImage, LayerkitError, LossyResult, StoreError
from layerkit.model.strings import Strings
from layerkit.model.tree import Tree

pytestmark = pytest.mark.usefixtures("as_root")

CAPABILITY = struct.pack("<IIIIII", 0x03000001, 0x3000, 0, 0, 0, 0)


NOBODY = 0xFFFFFFFF
ACL = acl((1, 7, NOBODY), (2, 5, 1234), (4, 5, NOBODY), (0x10, 5, NOBODY), (0x20, 0, NOBODY))

EVERYTHING = [
    folder(b"", 0o755, uid=100000, gid=100000, mtime=1_700_000_000, mtime_ns=999_999_999),
    folder(b"d", 0o3751, uid=7, gid=8, mtime=-2, mtime_ns=500_000_000),
    file(b"d/f", b"hello", perm=0o640, uid=100001, gid=4294967294, mtime=1, mtime_ns=1),
    file(b"d/\xff\nx", b"hello", perm=0o000, mtime=-1, mtime_ns=999_999_999),
    file(b"d/empty", b"", perm=0o444, uid=5),
    file(b"d/setuid", b"s", perm=0o6755, uid=9, gid=9, xattrs=((b"security.capability", CAPABILITY),)),
    file(b"d/xattrs", b"s", xattrs=((b"trusted.t", b"\0\1"), (b"user.empty", b""), (b"user.u", b"x" * 300))),
    Entry(b"d/link", Kind.SYMLINK, 0o777, uid=3, gid=4, mtime=9, mtime_ns=9, link=b"../" * 30 + b"nowhere"),
    Entry(b"d/trusted", Kind.SYMLINK, 0o777, link=b"f", xattrs=((b"trusted.on.link", b"1"),)),
    Entry(b"a-link", Kind.HARDLINK, link=b"d/f"),
    Entry(b"z/far/link", Kind.HARDLINK, link=b"d/f"),
    Entry(b"z/far/again", Kind.HARDLINK, link=b"d/trusted"),
    Entry(b"dev/null", Kind.CHAR, 0o666, gid=5, major=1, minor=3, mtime=5),
    Entry(b"dev/disk", Kind.BLOCK, 0o660, uid=5, major=259, minor=70000, xattrs=((b"trusted.d", b"v"),)),
    Entry(b"dev/fifo", Kind.FIFO, 0o1622, uid=1),
    folder(b"acl", 0o750, xattrs=((b"system.posix_acl_access", ACL), (b"system.posix_acl_default", ACL))),
    file(b"acl/plain", b"p", perm=0o604),
    folder(b"acl/plainer", 0o700),
    file(b"acl/own", b"p", perm=0o750, xattrs=((b"system.posix_acl_access", ACL),)),
    Entry(b"huge", Kind.REG, size=(1 << 42) + 1, sha256=bytes(range(32))),
]


def shown(root: Path) -> dict[bytes, dict[str, object]]:
    """Return what lstat and listxattr say, in the form of :func:`wanted`; data is not read."""
    found: dict[bytes, dict[str, object]] = {}
    first: dict[int, bytes] = {}
    stack = [b""]
    while stack:
        path = stack.pop()
        full = os.path.join(os.fsencode(root), path)
        st = os.lstat(full)
        if stat.S_ISDIR(st.st_mode):
            stack += [os.path.join(path, name) for name in os.listdir(full)]
        found[path] = {
            "mode": st.st_mode, "uid": st.st_uid, "gid": st.st_gid, "mtime": st.st_mtime_ns,
            "size": 0 if stat.S_ISDIR(st.st_mode) else st.st_size, "ino": st.st_ino,
            "dev": (os.major(st.st_rdev), os.minor(st.st_rdev)), "xattrs": xattrs(full),
            "target": os.readlink(full) if stat.S_ISLNK(st.st_mode) else b"",
        }  # fmt: skip
    for path in sorted(found):
        found[path]["ino"] = first.setdefault(int(str(found[path]["ino"])), path)
    return found


def wanted(tree: Tree, namespace: Namespace = Namespace.TRUSTED) -> dict[bytes, dict[str, object]]:
    """Return what a folder of ``tree`` must show. Hard links are told by the least path of the inode."""
    want: dict[bytes, dict[str, object]] = {}
    first: dict[int, bytes] = {}
    for node in sorted(tree.nodes(), key=lambda n: n.path):
        pairs = dict(node.xattrs)
        if stat.S_ISREG(node.mode) and node.size:
            pairs[namespace.prefix + b"redirect"] = b"/" + data_path(node.sha256)
            pairs[namespace.prefix + b"metacopy"] = b""
        if b"security.capability" in pairs:
            pairs[b"security.capability"] = struct.pack("<I", 0x02000001) + CAPABILITY[4:20]
        want[node.path] = {
            "mode": node.mode, "uid": node.uid, "gid": node.gid, "mtime": node.mtime * 10**9 + node.mtime_ns,
            "size": node.size, "ino": first.setdefault(node.inode, node.path), "dev": (node.major, node.minor),
            "xattrs": tuple(sorted(pairs.items())), "target": node.target,
        }  # fmt: skip
    return want


@pytest.mark.parametrize("threads", [1, 3])
def test_every_attribute_of_every_kind(tmp_path: Path, threads: int) -> None:
    tree = tree_of(EVERYTHING)
    written = write_directory(metadata_layer(tree), tmp_path / "meta", threads=threads)
    assert shown(tmp_path / "meta") == wanted(tree)
    used = subprocess.run(["du", "-s", "-B1", tmp_path / "meta"], capture_output=True, check=True).stdout
    assert written == Written(len(tree), int(used.split()[0]))


def test_many_folders_in_many_pieces(tmp_path: Path) -> None:
    entries = [file(b"%02d/%03d/f%d" % (i % 89, i % 211, i), b"%d" % i) for i in range(5000)]
    entries += [Entry(b"%02d/l%d" % (i % 83, i), Kind.HARDLINK, link=entries[i * 7].path) for i in range(600)]
    tree = tree_of(entries)
    done: list[int] = []
    write_directory(metadata_layer(tree), tmp_path, progress=lambda what, at, of: done.append(at))
    assert shown(tmp_path) == wanted(tree)
    assert done == sorted(done)
    assert done[-1] == len(tree)


def test_a_descriptor_will_do_and_stays_open(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        write_directory(metadata_layer(tree_of([file(b"f", b"x")])), fd)
        assert os.listdir(fd) == ["f"]
    finally:
        os.close(fd)


@pytest.mark.parametrize("namespace", Namespace)
def test_a_stub_takes_no_block(tmp_path: Path, namespace: Namespace) -> None:
    with disk(tmp_path, "ext4", "-I", "256", size=16 << 20) as small:
        write_directory(metadata_layer(tree_of([file(b"f", b"x" * 5000)]), namespace), small / "meta")
        assert os.stat(small / "meta/f").st_blocks == 0
        # This is what the choice of an empty metacopy value buys: 4 bytes and the xattrs move to a block.
        os.setxattr(small / "meta/f", namespace.prefix + b"metacopy", b"\0\4\0\0")
        assert os.stat(small / "meta/f").st_blocks > 0


@pytest.mark.parametrize("seconds", [-(1 << 31), (1 << 34) - (1 << 31) - 1])
def test_the_first_and_last_time_of_ext4(tmp_path: Path, seconds: int) -> None:
    tree = tree_of([file(b"f", b"x", mtime=seconds, mtime_ns=0)])
    write_directory(metadata_layer(tree), tmp_path / "meta")
    assert shown(tmp_path / "meta") == wanted(tree)


@pytest.mark.parametrize("seconds", [-(1 << 31) - 1, (1 << 34) - (1 << 31), 1 << 62, -(1 << 62)])
def test_a_time_beyond_the_filesystem_is_an_error(tmp_path: Path, seconds: int) -> None:
    tree = tree_of([file(b"fine", b"x"), file(b"d/odd", b"x", mtime=seconds)])
    with pytest.raises(LossyResult, match=r"^d/odd: .*modification time"):
        write_directory(metadata_layer(tree), tmp_path / "meta")


def test_a_filesystem_of_whole_seconds(tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", "-I", "128", size=16 << 20) as small:
        write_directory(metadata_layer(tree_of([file(b"f", b"x", mtime=5)])), small / "whole")
        for ns in (1, 500_000_000):
            with pytest.raises(LossyResult, match=r"^f: .*modification time"):
                write_directory(metadata_layer(tree_of([file(b"f", b"x", mtime_ns=ns)])), small / f"{ns}")


def test_deeper_than_descriptors_and_paths_go(tmp_path: Path) -> None:
    deep = b"/".join([b"ab"] * 1500)
    entries = [file(deep + b"/f", b"x"), Entry(b"z", Kind.HARDLINK, link=deep + b"/f")]
    entries += [file(b"/".join([b"ab"] * k) + b"/z", b"x") for k in range(1, 1500, 50)]
    tree = tree_of(entries)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 300, hard))
    try:
        write_directory(metadata_layer(tree), tmp_path / "meta", threads=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.stat(tmp_path / "meta/z").st_nlink == 2
        count = subprocess.run(["find", tmp_path / "meta", "-printf", "x"], capture_output=True, check=True)
        assert len(count.stdout) == len(tree)
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "meta"], check=True)


def test_modes_are_exact_under_any_umask_which_stays(tmp_path: Path) -> None:
    tree = tree_of(EVERYTHING)
    old = os.umask(0o077)
    try:
        write_directory(metadata_layer(tree), tmp_path / "meta", threads=2)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(old)
    assert shown(tmp_path / "meta") == wanted(tree)


def test_nothing_is_inherited_from_the_folder_around(tmp_path: Path) -> None:
    root = tmp_path / "meta"
    root.mkdir()
    os.chown(root, 55, 66)
    root.chmod(0o2777)
    os.setxattr(root, "system.posix_acl_default", ACL)
    os.setxattr(root, "system.posix_acl_access", ACL)
    tree = tree_of(EVERYTHING)
    write_directory(metadata_layer(tree), root)
    assert shown(root) == wanted(tree)


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(StoreError, match="not empty"):
        write_directory(metadata_layer(tree_of([file(b"g", b"x")])), tmp_path)
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"../../x", b"/etc", b"n\0l"])
def test_names_that_are_no_component(tmp_path: Path, name: bytes) -> None:
    meta = metadata_layer(tree_of([file(b"first", b"x"), file(b"second", b"x")]))
    object.__setattr__(meta.tree, "name", Strings.of([b"", name, b"second"]))
    with pytest.raises(InvalidImage, match="no path component"):
        write_directory(meta, tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_a_symlink_planted_while_writing_is_not_followed(tmp_path: Path) -> None:
    # The folder is private, so only a bug or root itself could plant one; O_NOFOLLOW answers both.
    outside = tmp_path / "outside"
    outside.mkdir()
    meta = metadata_layer(tree_of([file(b"a/%d" % i, b"x") for i in range(3000)] + [file(b"b/f", b"x")]))

    def swap(what: str, done: int, total: int) -> None:
        if (tmp_path / "meta/b").is_dir() and not (tmp_path / "meta/b").is_symlink():
            (tmp_path / "meta/b/f").unlink(missing_ok=True)
            (tmp_path / "meta/b").rmdir()
            (tmp_path / "meta/b").symlink_to(outside)

    with pytest.raises(LayerkitError, match=r"^b"):
        write_directory(meta, tmp_path / "meta", progress=swap, threads=1)
    assert os.listdir(outside) == []


def test_the_caller_can_stop_it(tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise Cancelled("stopped")

    tree = tree_of([file(b"%d" % i, b"x") for i in range(9000)])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Cancelled):
        write_directory(metadata_layer(tree), tmp_path / "meta", progress=stop, threads=2)
    assert len(os.listdir(tmp_path / "meta")) < 9000
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_said_with_the_path(tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", "-N", "64", size=2 << 20) as small:
        tree = tree_of([file(b"f%03d" % i, b"x") for i in range(100)])
        with pytest.raises(StoreError, match=r"^f\d+: cannot create it: No space left"):
            write_directory(metadata_layer(tree), small / "meta", threads=1)


def test_xattrs_larger_than_the_filesystem_takes(tmp_path: Path) -> None:
    tree = tree_of([file(b"f", b"x", xattrs=((b"user.big", b"v" * 5000),))])
    with (
        disk(tmp_path, "ext4", size=16 << 20) as small,
        pytest.raises(LossyResult, match=r"^f: cannot set the xattr user\.big"),
    ):
        write_directory(metadata_layer(tree), small / "meta")


@pytest.mark.parametrize("name", [b"nonsense", b"foo.bar", b"user."])
def test_xattrs_the_kernel_has_no_place_for(tmp_path: Path, name: bytes) -> None:
    tree = tree_of([file(b"f", b"x", xattrs=((name, b"v"),))])
    with pytest.raises(LossyResult, match=r"^f: cannot set the xattr"):
        write_directory(metadata_layer(tree), tmp_path / "meta")


_IMPORTS = """
from trees import file, folder, tree_of
from layerkit.linux.folders.stubs import write_directory
from layerkit.metaonly import Namespace, data_path, metadata_layer
from layerkit.model.entry import Entry, Kind
"""


def test_a_user_without_a_namespace_writes_what_is_his_own(tmp_path: Path) -> None:
    own = {"uid": 4242, "gid": 4242}
    tree = tree_of([
        folder(b"", 0o555, **own), folder(b"shut", 0, **own), folder(b"shut/in", 0o300, **own),
        file(b"shut/in/f", b"x", perm=0, xattrs=((b"user.x", b"1"),), **own), file(b"r", b"x", perm=0o444, **own),
    ])  # fmt: skip
    root = tmp_path / "meta"
    root.mkdir()
    os.chown(root, 4242, 4242)
    fd = os.open(root, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(4242, 4242, 4242)
            os.setresuid(4242, 4242, 4242)
            write_directory(metadata_layer(tree, Namespace.USER), fd, threads=1)
            status = 0
        finally:
            os._exit(status)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert shown(root) == wanted(tree, Namespace.USER)


def test_rootless_owners_and_data(tmp_path: Path) -> None:
    tree = tree_of([
        file(b"d/f", b"hello", perm=0o4711, uid=1000, gid=100), folder(b"closed", 0, uid=7),
        file(b"closed/f", b"", perm=0), Entry(b"l", Kind.SYMLINK, 0o777, uid=9, link=b"d/f"),
    ])  # fmt: skip
    out = ordinary_users.python(tmp_path, _IMPORTS, """
tree = tree_of([file(b"d/f", b"hello", perm=0o4711, uid=1000, gid=100), folder(b"closed", 0, uid=7),
                file(b"closed/f", b"", perm=0), Entry(b"l", Kind.SYMLINK, 0o777, uid=9, link=b"d/f")])
meta = metadata_layer(tree, Namespace.USER)
write_directory(meta, Path("meta"))
import hashlib
at = "data/" + data_path(hashlib.sha256(b"hello").digest()).decode()
os.makedirs(os.path.dirname(at)); open(at, "w").write("hello")
os.mkdir("mnt")
subprocess.run(["mount", "-t", "overlay", "overlay", "-o", "userxattr,lowerdir=meta::data", "mnt"], check=True)
st = os.stat("mnt/d/f")
print(json.dumps([st.st_uid, st.st_gid, st.st_mode & 0o7777, open("mnt/l").read(), os.listxattr("mnt/d/f")]))
""")  # fmt: skip
    assert json.loads(out) == [1000, 100, 0o4711, "hello", []]

    def outside(container: int) -> int:
        return 4242 if container == 0 else 200000 + container - 1

    want = wanted(tree, Namespace.USER)
    for attributes in want.values():
        attributes["uid"] = outside(int(str(attributes["uid"])))
        attributes["gid"] = outside(int(str(attributes["gid"])))
    assert shown(tmp_path / "meta") == want


@pytest.mark.parametrize(
    ("entry", "namespace", "says"),
    [
        ('Entry(b"dev/null", Kind.CHAR, 0o666, major=1, minor=3)', "USER", r"LossyResult dev/null: .*device nodes"),
        ('file(b"f", b"x", uid=70000)', "USER", r"LossyResult f: .*70000:0.*user namespace"),
        ('folder(b"g", gid=70000)', "USER", r"LossyResult g: .*0:70000"),
        ('file(b"f", b"x", xattrs=((b"trusted.x", b""),))', "USER", r"LossyResult f: .*trusted\.x.*privileged"),
        ('file(b"f", b"x")', "TRUSTED", r"UnsupportedHost .*trusted xattrs.*user namespace"),
    ],
)  # fmt: skip
def test_rootless_says_what_it_cannot(tmp_path: Path, entry: str, namespace: str, says: str) -> None:
    out = ordinary_users.python(tmp_path, _IMPORTS, f"""
try:
    write_directory(metadata_layer(tree_of([{entry}]), Namespace.{namespace}), Path("meta"))
except Exception as error:
    print(type(error).__name__, error)
""")  # fmt: skip
    assert re.search(says, out), out


def test_rootless_capabilities_of_the_namespace(tmp_path: Path) -> None:
    ordinary_users.python(tmp_path, _IMPORTS, f"""
tree = tree_of([file(b"f", b"x", xattrs=((b"security.capability", {CAPABILITY!r}),))])
write_directory(metadata_layer(tree, Namespace.USER), Path("meta"))
""")  # fmt: skip
    assert os.getxattr(tmp_path / "meta/f", "security.capability")[-4:] == struct.pack("<I", 4242)
