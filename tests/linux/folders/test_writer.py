"""A metadata layer as a folder, judged by what the kernel says of it."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import subprocess
from pathlib import Path

import ordinary_users
import pytest
from disks import disk
from stub_trees import ACL, CAPABILITY, EVERYTHING, shown, wanted
from trees import file, folder, tree_of

from layerkit.linux.folders.writer import Written, write_directory
from layerkit.metaonly import Namespace, metadata_layer
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import Cancelled, InvalidImage, LayerkitError, LossyResult, StoreError
from layerkit.model.strings import Strings

pytestmark = pytest.mark.usefixtures("as_root")


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
from stub_trees import ACL, CAPABILITY, EVERYTHING, NOBODY, acl, shown, wanted
from trees import file, folder, tree_of
from layerkit.linux.folders.writer import write_directory
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
