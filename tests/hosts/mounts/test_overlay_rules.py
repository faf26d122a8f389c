"""The kernel's rules for layers written offline, over what we write.

A number in a test's name is that of the test in xfstests, tests/overlay, which checks the same of layers that
the kernel wrote. Tests without one have no counterpart there. Where a test shows what goes wrong with a layer
that layerkit refuses to make or to mount, it says so: the refusal has its own test.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
import struct
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ordinary_users
import pytest
from fuse_counter import counting_mount
from judge import data_extents, differences, snapshot, xattrs
from needs import need_tool
from trees import file, folder, tree_of

from layerkit import idmap
from layerkit.formats.erofs.meta import build_meta
from layerkit.formats.meta.tar import write_tar
from layerkit.linux import mounts
from layerkit.linux.folders.writer import write_directory
from layerkit.linux.syscalls import closing
from layerkit.metaonly import MetadataLayer, Namespace, data_path, metadata_layer
from layerkit.model.entry import Entry, Kind
from layerkit.model.tree import Tree

pytestmark = pytest.mark.usefixtures("as_root")

NOBODY = 0xFFFFFFFF
V2 = struct.pack("<IIIII", 0x02000001, 0x3000, 0, 0, 0)
V3 = struct.pack("<IIIIII", 0x03000001, 0x3000, 0, 0, 0, 100000)

RENDERINGS = ("directory", "erofs", "tar")


@dataclass
class Bench:
    """A place for layers and mounts that clears its mounts away, the last one first."""

    path: Path
    numbers: Iterator[int]
    mounted: list[Path]

    def folder(self) -> Path:
        made = self.path / str(next(self.numbers))
        made.mkdir()
        return made

    def data(self, *contents: bytes) -> Path:
        """Make a folder of data as the object store lays it out."""
        root = self.folder()
        for content in contents:
            path = root / os.fsdecode(data_path(hashlib.sha256(content).digest()))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return root

    def meta(self, layer: MetadataLayer | Tree, rendering: str = "directory") -> Path:
        """Render a layer; return the folder that it is in, or is mounted at."""
        layer = layer if isinstance(layer, MetadataLayer) else metadata_layer(layer)
        root = self.folder()
        if rendering == "directory":
            write_directory(layer, root)
        elif rendering == "tar":
            archive = self.path / f"{root.name}.tar"
            with archive.open("wb") as out:
                write_tar(layer, out)
            command = [
                "tar",
                "-x",
                "-p",
                "--xattrs",
                "--xattrs-include=*",
                "--numeric-owner",
                "-C",
                root,
                "-f",
                archive,
            ]
            subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL)
        else:
            image = self.path / f"{root.name}.erofs"
            with image.open("wb") as out:
                build_meta(layer, out)
            self.attach(mounts.erofs(image), root)
        return root

    def attach(self, mount: int, target: Path) -> Path:
        with closing(mount):
            mounts.attach(mount, target)
        self.mounted.append(target)
        return target

    def detach(self, target: Path) -> None:
        mounts.detach(target)
        self.mounted.remove(target)

    def overlay(
        self,
        lower: Iterable[Path],
        data: Iterable[Path] = (),
        *,
        upper: Path | None = None,
        userxattr: bool = False,
        metacopy: bool = False,
    ) -> Path:
        """Mount an overlay and return where. ``upper`` brings a work folder beside it."""
        with ExitStack() as fds:

            def opened(path: Path) -> int:
                return fds.enter_context(closing(mounts.open_folder(path)))

            layers = mounts.Layers(
                [opened(p) for p in lower],
                [opened(p) for p in data],
                upper=None if upper is None else opened(upper),
                work=None if upper is None else opened(self.folder()),
            )
            mount = mounts.overlay(layers, userxattr=userxattr, metacopy=metacopy)
        return self.attach(mount, self.folder())

    def shown(self, layer: MetadataLayer | Tree, *contents: bytes, rendering: str = "directory") -> Path:
        """Return the mount of a layer over its data, as layerkit makes it."""
        user = isinstance(layer, MetadataLayer) and layer.namespace is Namespace.USER
        return self.overlay([self.meta(layer, rendering)], [self.data(*contents)], userxattr=user)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, itertools.count(), [])
    try:
        yield made
    finally:
        for target in reversed(made.mounted):
            mounts.detach(target, lazy=True)


@contextmanager
def refused(*codes: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno in codes, caught.value


each_rendering = pytest.mark.parametrize("rendering", RENDERINGS)
each_namespace = pytest.mark.parametrize("namespace", Namespace)


# --- data-only lower layers


@each_rendering
@each_namespace
def test_079_stubs_over_a_data_only_layer(bench: Bench, rendering: str, namespace: Namespace) -> None:
    tree = tree_of([file(b"d/f", b"hello", perm=0o640, uid=1, gid=2, mtime=3, mtime_ns=4), file(b"empty"),
                    Entry(b"l", Kind.HARDLINK, link=b"d/f")])  # fmt: skip
    at = bench.shown(metadata_layer(tree, namespace), b"hello", rendering=rendering)
    assert sorted(os.listdir(at)) == ["d", "empty", "l"]
    assert (at / "d/f").read_bytes() == (at / "l").read_bytes() == b"hello"
    st = (at / "d/f").stat()
    assert (st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, st.st_nlink) == (
        0o100640, 1, 2, 5, 3_000_000_004, 2,
    )  # fmt: skip
    assert xattrs(os.fsencode(at / "d/f")) == ()
    with refused(errno.ENOENT):
        (at / ":L").stat()


@each_rendering
def test_079_the_data_is_looked_up_when_it_is_opened(bench: Bench, rendering: str) -> None:
    at = bench.shown(tree_of([file(b"f", b"gone"), file(b"g", b"there")]), b"there", rendering=rendering)
    assert (at / "f").stat().st_size == 4
    assert (at / "g").read_bytes() == b"there"
    with refused(errno.ENOENT):
        (at / "f").open("rb")


def test_079_the_first_data_layer_that_has_it_wins(bench: Bench) -> None:
    first, second = bench.data(b"one"), bench.data(b"one", b"two")
    (second / os.fsdecode(data_path(hashlib.sha256(b"one").digest()))).write_bytes(b"bad")
    at = bench.overlay([bench.meta(tree_of([file(b"1", b"one"), file(b"2", b"two")]))], [first, second])
    assert ((at / "1").read_bytes(), (at / "2").read_bytes()) == (b"one", b"two")


def test_stubs_work_in_the_last_normal_layer_only(bench: Bench) -> None:
    meta, data = bench.meta(tree_of([file(b"f", b"x")])), bench.data(b"x")
    other = bench.folder()
    assert (bench.overlay([other, meta], [data]) / "f").read_bytes() == b"x"
    at = bench.overlay([meta, other], [data])
    with refused(errno.EPERM, errno.EIO):
        (at / "f").open("rb")


def test_a_wrong_size_is_not_noticed(bench: Bench) -> None:
    """So the size must come from the bytes that were hashed, never from a header alone."""
    long = Entry(b"long", Kind.REG, size=10, sha256=hashlib.sha256(b"hello").digest())
    at = bench.shown(tree_of([long]), b"hello")
    assert ((at / "long").stat().st_size, (at / "long").read_bytes()) == (10, b"hello")


@each_rendering
@each_namespace
def test_the_wrong_namespace_reads_zeros(bench: Bench, rendering: str, namespace: Namespace) -> None:
    """Nothing fails, every byte is wrong: the mounter must refuse it (hosts.mountspec.check_stubs)."""
    meta = bench.meta(metadata_layer(tree_of([file(b"f", b"hello")]), namespace), rendering)
    at = bench.overlay([meta], [bench.data(b"hello")], userxattr=namespace is Namespace.TRUSTED)
    assert (at / "f").read_bytes() == bytes(5)


def test_a_folder_that_shadows_the_object_prefix(bench: Bench) -> None:
    """Why ``metadata_layer`` refuses such a top folder: under another META it takes the data away."""
    data = bench.data(b"hello")
    prefix = data_path(hashlib.sha256(b"hello").digest()).split(b"/")[0]
    meta = bench.meta(tree_of([file(b"d/f", b"hello")]))
    innocent = bench.meta(tree_of([file(b"d/g", b"hello")]))
    shadow = bench.meta(MetadataLayer(tree_of([folder(prefix)]), Namespace.TRUSTED))
    assert (bench.overlay([meta, innocent], [data], metacopy=True) / "d/f").read_bytes() == b"hello"
    with refused(errno.EIO):
        (bench.overlay([meta, shadow], [data], metacopy=True) / "d/f").read_bytes()


def test_negative_lookups_never_reach_the_data_layer(bench: Bench) -> None:
    tree = tree_of([file(b"d/f", b"hello"), file(b"g", b"x")])
    meta, source = bench.meta(tree), bench.data(b"hello", b"x")

    def misses(at: Path, count: int) -> None:
        for i in range(count):
            for name in (at / f"no{i}", at / "d" / f"no{i}"):
                with pytest.raises(FileNotFoundError):
                    os.stat(name)

    target = bench.folder()
    with counting_mount(source, target) as server:
        at = bench.overlay([meta], [target])
        server.requests.clear()
        misses(at, 10_000)
        assert server.requests["LOOKUP"] == 0
        assert (at / "d/f").read_bytes() == b"hello"
        assert server.requests["LOOKUP"] > 0
        bench.detach(at)
        # The same folders as normal layers: each miss goes down to the second one.
        classic = bench.overlay([meta, target], metacopy=True)
        server.requests.clear()
        misses(classic, 200)
        assert server.requests["LOOKUP"] >= 200
        bench.detach(classic)


def test_data_that_the_mounter_may_not_read(bench: Bench) -> None:
    """Data files are opened with the mounter's rights: objects are world-readable for that reason."""
    data = bench.data(b"open", b"shut")
    (data / os.fsdecode(data_path(hashlib.sha256(b"shut").digest()))).chmod(0o600)
    bench.meta(metadata_layer(tree_of([file(b"open", b"open"), file(b"shut", b"shut")]), Namespace.USER))
    out = ordinary_users.python(
        bench.path,
        "",
        """
subprocess.run(["mount", "-t", "overlay", "overlay", "-o", "userxattr,lowerdir=1::0", "/mnt"], check=True)
print(open("/mnt/open").read(), os.stat("/mnt/shut").st_mode & 0o777 == 0o644)
try:
    open("/mnt/shut")
except PermissionError:
    print("refused")
""",
    )
    assert out.split() == ["open", "True", "refused"]


# --- classic stacking


@each_rendering
def test_060_stubs_over_a_normal_layer(bench: Bench, rendering: str) -> None:
    meta, data = bench.meta(tree_of([file(b"d/f", b"hello", uid=7)]), rendering), bench.data(b"hello")
    at = bench.overlay([meta, data], metacopy=True)
    assert ((at / "d/f").read_bytes(), (at / "d/f").stat().st_uid) == (b"hello", 7)
    with refused(errno.EPERM, errno.EIO):
        (bench.overlay([meta, data]) / "d/f").stat()


def test_060_a_dangling_stub_fails_at_once(bench: Bench) -> None:
    at = bench.overlay([bench.meta(tree_of([file(b"f", b"gone")])), bench.data()], metacopy=True)
    with refused(errno.EIO):
        (at / "f").stat()


def test_060_a_change_of_owner_copies_no_data(bench: Bench) -> None:
    content = os.urandom(1 << 20)
    meta, data, upper = bench.meta(tree_of([file(b"f", content)])), bench.data(content), bench.folder()
    at = bench.overlay([meta], [data], upper=upper, metacopy=True)
    os.chown(at / "f", 5, 5)
    assert (at / "f").read_bytes() == content
    assert (upper / "f").stat().st_blocks * 512 <= 4096
    with (at / "f").open("ab") as f:
        f.write(b"more")
    assert (at / "f").read_bytes() == content + b"more"


def test_057_a_stub_below_an_opaque_folder(bench: Bench) -> None:
    """An absolute redirect is followed past an opaque folder in the stubs' own layer."""
    meta, data = bench.meta(tree_of([file(b"d/f", b"hello")])), bench.data(b"hello")
    os.setxattr(meta / "d", "trusted.overlay.opaque", b"y")
    assert (bench.overlay([meta], [data]) / "d/f").read_bytes() == b"hello"
    assert (bench.overlay([meta, data], metacopy=True) / "d/f").read_bytes() == b"hello"


# --- whiteouts, opaque folders, escapes


def test_031_a_whiteout_leaks_into_a_single_layer(bench: Bench) -> None:
    """Why ``metadata_layer`` refuses the device 0:0: listed, and not there."""
    meta = bench.meta(tree_of([file(b"d/f", b"x")]))
    os.mknod(meta / "d/gone", stat.S_IFCHR, os.makedev(0, 0))
    at = bench.overlay([meta], [bench.data(b"x")])
    assert sorted(os.listdir(at / "d")) == ["f", "gone"]
    with refused(errno.ENOENT):
        (at / "d/gone").stat()


def _planted(namespace: Namespace) -> Tree:
    """Return a tree whose image carries all that overlayfs would act on, in both namespaces."""

    def overlay(*pairs: tuple[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        return tuple(sorted((ns.prefix + name, value) for ns in Namespace for name, value in pairs))

    secret = b"/" + data_path(hashlib.sha256(b"secret").digest())
    return tree_of([
        file(b"stub", b"hello", xattrs=overlay((b"metacopy", b""), (b"redirect", secret))),
        file(b"empty", b"", xattrs=overlay((b"metacopy", b""), (b"redirect", secret))),
        folder(b"moved", xattrs=overlay((b"redirect", b"/other"))),
        folder(b"opaque", xattrs=overlay((b"opaque", b"y"))),
        folder(b"holes", xattrs=overlay((b"opaque", b"x"))),
        file(b"holes/gone", b"", xattrs=overlay((b"whiteout", b"y"))),
        file(b"odd", b"hello", xattrs=overlay(
            (b"origin", b"\0\xfb\x1d\0"), (b"impure", b"y"), (b"nlink", b"U+1"), (b"upper", b"u"), (b"uuid", b"i"),
            (b"protattr", b"i"), (b"overlay.opaque", b"twice"), (b"overlay.overlay.x", b"thrice"), (b"new", b"n"),
        ) + tuple((ns.value.encode() + name, b"v") for ns in Namespace for name in (b".overlay", b".overlayx"))),
    ])  # fmt: skip


@each_rendering
@each_namespace
def test_084_planted_overlay_xattrs_are_shown_and_do_nothing(
    bench: Bench, rendering: str, namespace: Namespace
) -> None:
    tree = _planted(namespace)
    meta, data = bench.meta(metadata_layer(tree, namespace), rendering), bench.data(b"hello", b"secret")
    below = bench.meta(metadata_layer(tree_of([file(b"other/f", b""), file(b"opaque/f", b""), file(b"moved/f", b""),
                                               file(b"holes/gone", b"")]), namespace))  # fmt: skip
    user = namespace is Namespace.USER
    for at in (
        bench.overlay([meta], [data], userxattr=user),
        bench.overlay([bench.folder(), meta], [data], userxattr=user),
    ):
        for node in tree.nodes():
            assert xattrs(os.path.join(os.fsencode(at), node.path)) == tuple(sorted(node.xattrs)), node.path
        assert ((at / "stub").read_bytes(), (at / "odd").read_bytes()) == (b"hello", b"hello")
        assert ((at / "empty").read_bytes(), os.listdir(at / "moved")) == (b"", [])
        assert os.listdir(at / "holes") == ["gone"]
        assert (at / "holes/gone").stat().st_size == 0
    # A lower layer below it shows whether a planted opaque or redirect is acted on.
    stacked = bench.overlay([meta, below], userxattr=user)
    assert os.listdir(stacked / "opaque") == ["f"]
    assert os.listdir(stacked / "moved") == ["f"]


@pytest.mark.parametrize("outer", Namespace)
def test_084_a_mount_in_the_mount_sees_them_as_its_own(bench: Bench, outer: Namespace) -> None:
    """What an image with overlay layers of its own is for (docker in docker): escaping must not break it."""
    tree = _planted(outer)
    at = bench.overlay(
        [bench.meta(metadata_layer(tree, outer))], [bench.data(b"hello")], userxattr=outer is Namespace.USER
    )
    below = bench.meta(tree_of([file(b"other/f", b""), file(b"opaque/f", b"")]))
    nested = bench.overlay([at, below])
    assert os.listdir(nested / "opaque") == []
    assert os.listdir(nested / "moved") == ["f"]


@each_namespace
def test_a_listed_xattr_without_a_suffix_cannot_be_read(bench: Bench, namespace: Namespace) -> None:
    """Why ``metadata_layer`` refuses ``trusted.overlay.``: the escaped name is listed, and reading it fails."""
    own = namespace.value
    tree = tree_of([file(b"f", xattrs=((f"{own}.overlay.overlay.".encode(), b"v"),))])
    meta = bench.meta(MetadataLayer(tree, namespace))
    at = bench.overlay([meta], [bench.data()], userxattr=namespace is Namespace.USER)
    assert f"{own}.overlay." in os.listxattr(at / "f")
    with refused(errno.EINVAL):
        os.getxattr(at / "f", f"{own}.overlay.")


def test_011_026_the_stubs_own_xattrs_are_private(bench: Bench) -> None:
    at = bench.shown(tree_of([file(b"f", b"hello")]), b"hello")
    assert os.listxattr(at / "f") == []
    with refused(errno.ENODATA):
        os.getxattr(at / "f", "trusted.overlay.redirect")


def test_014_a_folder_made_anew_hides_the_layer(bench: Bench) -> None:
    meta, data, upper = bench.meta(tree_of([file(b"d/f", b"x"), file(b"d/g")])), bench.data(b"x"), bench.folder()
    at = bench.overlay([meta], [data], upper=upper, metacopy=True)
    for name in ("f", "g"):
        (at / "d" / name).unlink()
    (at / "d").rmdir()
    (at / "d").mkdir()
    assert os.listdir(at / "d") == []
    bench.detach(at)
    again = bench.overlay([meta], [data], upper=upper, metacopy=True)
    assert os.listdir(again / "d") == []


# --- names, inodes, hard links


@each_rendering
def test_083_special_characters_in_names(bench: Bench, rendering: str) -> None:
    names = [
        b"a:b",
        b"c,d",
        b"e\\f",
        b"g\nh",
        b" ",
        b"%s",
        b"\xff\xfe",
        b"lower=x",
        b"::",
        b"...",
        b"\\054",
        b"\x01",
    ]
    tree = tree_of([file(name + b"/" + name, b"content of " + name) for name in names])
    at = os.fsencode(bench.shown(tree, *(b"content of " + name for name in names), rendering=rendering))
    assert sorted(os.listdir(at)) == sorted(names)
    for name in names:
        assert Path(os.fsdecode(os.path.join(at, name, name))).read_bytes() == b"content of " + name


@each_rendering
def test_017_043_inode_numbers_stay(bench: Bench, rendering: str) -> None:
    tree = tree_of([file(b"d/f", b"x"), file(b"g"), Entry(b"l", Kind.SYMLINK, link=b"g")])
    meta, data = bench.meta(tree, rendering), bench.data(b"x")

    def numbers(at: Path) -> dict[bytes, int]:
        return {node.path: os.lstat(os.path.join(os.fsencode(at), node.path)).st_ino for node in tree.nodes()}

    first = numbers(bench.overlay([meta], [data]))
    assert numbers(bench.overlay([meta], [data])) == first
    assert len(set(first.values())) == len(tree)
    if rendering == "erofs":
        mapped = replace(tree, uid=tree.uid + np.uint32(5))
        assert numbers(bench.shown(mapped, b"x", rendering=rendering)) == first


@each_rendering
def test_038_041_readdir_and_stat_agree_on_inode_numbers(bench: Bench, rendering: str) -> None:
    at = bench.shown(tree_of([file(b"d/f", b"x"), file(b"d/g"), folder(b"d/e")]), b"x", rendering=rendering)
    for entry in os.scandir(at / "d"):
        assert entry.inode() == entry.stat(follow_symlinks=False).st_ino


@each_rendering
def test_018_033_042_hard_links_written_offline(bench: Bench, rendering: str) -> None:
    links = [Entry(b"d/%d" % i, Kind.HARDLINK, link=b"f") for i in range(3)]
    at = bench.shown(tree_of([file(b"f", b"x"), *links]), b"x", rendering=rendering)
    shown = [(at / name).stat() for name in ("f", "d/0", "d/1", "d/2")]
    assert len({st.st_ino for st in shown}) == 1
    assert {st.st_nlink for st in shown} == {4}
    assert (at / "d/2").read_bytes() == b"x"


def test_070_an_overlay_over_the_mount(bench: Bench) -> None:
    at = bench.shown(tree_of([file(b"d/f", b"hello", uid=5)]), b"hello")
    nested = bench.overlay([at, bench.folder()])
    assert ((nested / "d/f").read_bytes(), (nested / "d/f").stat().st_uid) == (b"hello", 5)


# --- attributes


@each_rendering
def test_066_holes_are_seen(bench: Bench, rendering: str) -> None:
    content = bytes(1 << 20) + b"x" * 4096 + bytes(1 << 20)
    data = bench.data(content)
    stored = data / os.fsdecode(data_path(hashlib.sha256(content).digest()))
    with stored.open("wb") as f:
        f.seek(1 << 20)
        f.write(b"x" * 4096)
        f.truncate(len(content))
    at = bench.overlay([bench.meta(tree_of([file(b"f", content)]), rendering)], [data])
    assert (at / "f").read_bytes() == content
    assert data_extents(at / "f") == data_extents(stored)


@each_rendering
def test_064_capabilities_of_the_host_are_shown_in_the_form_they_had(bench: Bench, rendering: str) -> None:
    """META holds v3 with rootid 0, whose length no map changes; the kernel shows it as v2 to the host's root."""
    tree = tree_of([file(b"two", b"x", perm=0o755, xattrs=((b"security.capability", V2),)),
                    file(b"three", b"x", perm=0o755, xattrs=((b"security.capability", V3),))])  # fmt: skip
    meta = bench.meta(tree, rendering)
    at = bench.overlay([meta], [bench.data(b"x")])
    for root in (meta, at):
        assert os.getxattr(root / "two", "security.capability") == V2
        assert os.getxattr(root / "three", "security.capability") == V3


def test_064_a_capability_takes_effect(bench: Bench) -> None:
    need_tool("capsh")
    program = (
        Path("/usr/sbin/capsh").resolve() if Path("/usr/sbin/capsh").exists() else Path("/sbin/capsh").resolve()
    )
    content = program.read_bytes()
    permitted = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # CAP_NET_BIND_SERVICE, effective
    tree = tree_of([file(b"capsh", content, perm=0o755, xattrs=((b"security.capability", permitted),))])
    at = bench.shown(tree, content)
    for above in at.parents:
        above.chmod(above.stat().st_mode | 0o011)
    result = subprocess.run([at / "capsh", "--print"], user=4242, group=4242, extra_groups=[], capture_output=True,
                            text=True, check=True)  # fmt: skip
    assert "cap_net_bind_service=ep" in result.stdout


def test_025_ids_in_acls_and_capabilities_as_an_idmapped_mount_shows_them(bench: Bench) -> None:
    """The kernel maps a plain folder by mount_setattr; we map the tree. Every attribute must be the same."""

    def acl(*named: tuple[int, int]) -> bytes:
        entries = [(1, 7, NOBODY), *((2, 5, uid) for uid, _ in named), (4, 5, NOBODY)]
        entries += [*((8, 1, gid) for _, gid in named), (0x10, 7, NOBODY), (0x20, 0, NOBODY)]
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)

    tree = tree_of([
        folder(b"d", 0o2770, uid=1000, gid=50, xattrs=(
            (b"system.posix_acl_access", acl((33, 44))), (b"system.posix_acl_default", acl((0, 0), (1000, 50))))),
        file(b"d/no", b"", perm=0o4770, gid=65535, xattrs=((b"system.posix_acl_access", acl((65535, 1))),)),
        file(b"caps", b"", perm=0o755, xattrs=((b"security.capability", V2),)),
        Entry(b"l", Kind.SYMLINK, 0o777, uid=12, gid=13, link=b"caps"),
    ])  # fmt: skip
    plain = bench.meta(tree)
    extents = ((0, 100000, 65536),)
    kernel = bench.attach(mounts.idmapped_clone(plain, extents, extents), bench.folder())
    mapping = idmap.Mapping(idmap.IdMap.parse(["0:100000:65536"]), idmap.IdMap.parse(["0:100000:65536"]))
    mapped = idmap.apply(tree, mapping)
    want = snapshot(kernel)
    assert want[b"./caps"].xattrs[0][1][-4:] == struct.pack("<I", 100000)
    for rendering in RENDERINGS:
        assert differences(snapshot(bench.shown(mapped, rendering=rendering)), want) == [], rendering
