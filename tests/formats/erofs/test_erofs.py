"""EROFS without a kernel: writer, reader and patch against each other, and the reader against damage."""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_layers import written_layer
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
    squashed,
    symlink,
    user_acl,
)

from layerkit.formats.erofs import format as f
from layerkit.formats.erofs import reader
from layerkit.formats.erofs.data import build_data
from layerkit.formats.erofs.meta import build_meta
from layerkit.formats.erofs.patch import Fixups, patch_meta
from layerkit.idmap import MAX_ID, IdMap, Mapping
from layerkit.metaonly import METACOPY_VALUE, Namespace, data_path, encode_devices, metadata_layer
from layerkit.model.digest import Digest
from layerkit.model.entry import Extent
from layerkit.model.errors import InvalidImage, LayerkitError, LossyResult
from layerkit.model.limits import Limits
from layerkit.model.tree import Tree

FUZZ = int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))


def build(tree: Tree, namespace: Namespace = Namespace.TRUSTED) -> tuple[bytes, Fixups]:
    file = io.BytesIO()
    fixups = build_meta(metadata_layer(tree, namespace), file)
    return file.getvalue(), fixups


SHIFT = Mapping(IdMap.of([(0, 100_000, 1 << 31)]), IdMap.of([(0, 100_000, 1 << 31)]))
"""What ``mapped`` does."""
SQUASH = Mapping(IdMap.of([(MAX_ID, 7, 1)]), IdMap.of([(MAX_ID, 7, 1)]), overflow=7)
"""What ``squashed`` does."""


def patch(image: bytes, fixups: Fixups, mapping: Mapping, folder: Path) -> bytes:
    (folder / "old").write_bytes(image)
    with (folder / "old").open("rb") as old, (folder / "new").open("wb+") as new:
        patch_meta(old.fileno(), new.fileno(), fixups, mapping)
    return (folder / "new").read_bytes()


def assert_reads_back(tree: Tree, image: bytes, namespace: Namespace = Namespace.TRUSTED) -> None:
    shown = metadata_layer(tree, namespace).tree
    found = reader.read(image)
    assert found.block_bytes == 4096
    assert found.inodes == tree.inodes
    assert found.blocks * 4096 == len(image)
    nodes = list(shown.nodes())
    assert set(found.nodes) == {node.path for node in nodes}
    nid_of: dict[int, int] = {}
    for node in nodes:
        got = found.nodes[node.path]
        is_dir, is_stub = stat.S_ISDIR(node.mode), stat.S_ISREG(node.mode) and node.size > 0
        xattrs = dict(node.xattrs)
        if is_stub:
            xattrs[namespace.prefix + b"metacopy"] = METACOPY_VALUE
            xattrs[namespace.prefix + b"redirect"] = b"/" + data_path(node.sha256)
            assert got.extents == (reader.Extent(0, node.size, -1, 0),)
        want = (
            node.mode, node.uid, node.gid, node.nlink, got.size if is_dir else node.size, node.mtime, node.mtime_ns,
            node.major, node.minor, node.target, tuple(sorted(xattrs.items())),
        )  # fmt: skip
        assert want == (
            got.mode, got.uid, got.gid, got.nlink, got.size, got.mtime, got.mtime_ns, got.major, got.minor,
            got.target, got.xattrs,
        ), node.path  # fmt: skip
        assert nid_of.setdefault(node.inode, got.nid) == got.nid
    assert len(set(nid_of.values())) == tree.inodes


ids = st.integers(0, 2**32 - 2)
small_ids = st.integers(0, 3)
names = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from([b"a", b"b", b"c", b"+", b"-", b".x", b".-", b"..x", b"...", b"z" * 255]),
    st.binary(min_size=1, max_size=255),
).map(lambda b: b.replace(b"\0", b"0").replace(b"/", b"+"))
names = names.filter(lambda b: b not in (b".", b".."))
paths = st.lists(names, min_size=1, max_size=4).map(b"/".join)
text_xattrs = st.dictionaries(
    st.sampled_from([b"user.a", b"user.b", b"trusted.c", b"security.d", b"user." + b"n" * 250]),
    st.binary(max_size=300),
    max_size=3,
)
id_xattrs = st.fixed_dictionaries(
    {},
    optional={
        ACL_ACCESS: st.builds(user_acl, small_ids, small_ids),
        ACL_DEFAULT: st.builds(user_acl, small_ids, small_ids),
        CAPABILITY: st.builds(capability, small_ids),
    },
)
xattrs = st.tuples(text_xattrs, id_xattrs).map(lambda both: tuple(sorted({**both[0], **both[1]}.items())))
common = {
    "uid": ids,
    "gid": ids,
    "mtime": st.integers(-(2**63), 2**63 - 1),
    "mtime_ns": st.integers(0, 999_999_999),
    "xattrs": xattrs,
}
others = {
    **common,
    # The kernel has no user xattrs on anything but files and directories.
    "xattrs": xattrs.map(lambda pairs: tuple(pair for pair in pairs if not pair[0].startswith(b"user."))),
}
perm = st.integers(0, 0o7777)
leaves = st.one_of(
    st.builds(regular, st.binary(max_size=8), perm, **common),
    st.builds(symlink, st.binary(min_size=1, max_size=4095).map(lambda b: b.replace(b"\0", b"0")), **others),
    st.builds(Spec, perm.map(lambda p: stat.S_IFIFO | p), **others),
    st.builds(
        Spec,
        perm.map(lambda p: stat.S_IFCHR | p),
        major=st.integers(1, 4095),
        minor=st.integers(0, 2**20 - 1),
        **others,
    ),
    st.builds(Spec, perm.map(lambda p: stat.S_IFBLK | p), major=st.integers(0, 4095), **others),
)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    specs: dict[bytes, Spec] = {b"": draw(st.builds(directory, perm, **common))}
    taken: set[bytes] = set()
    for path, spec in draw(st.dictionaries(paths, st.one_of(leaves, st.builds(directory, perm, **common)))).items():
        parts = path.split(b"/")
        above = [b"/".join(parts[:i]) for i in range(1, len(parts))]
        if path in taken or any(a in specs and not stat.S_ISDIR(specs[a].mode) for a in above):
            continue
        if not stat.S_ISDIR(spec.mode) and any(known.startswith(path + b"/") for known in specs):
            continue
        # Where the kernel takes no ACL, META refuses one: test_as_kept.py.
        takes = {stat.S_IFDIR: (ACL_ACCESS, ACL_DEFAULT), stat.S_IFLNK: ()}.get(
            stat.S_IFMT(spec.mode), (ACL_ACCESS,)
        )
        spec.xattrs = tuple(p for p in spec.xattrs if p[0] in takes or p[0] not in (ACL_ACCESS, ACL_DEFAULT))
        specs[path] = spec
        taken.update((path, *above))
    files = [path for path, spec in specs.items() if not stat.S_ISDIR(spec.mode)]
    for i, path in enumerate(draw(st.lists(st.sampled_from(files), max_size=3)) if files else []):
        extra = b"link-%d" % i
        if extra not in taken:
            specs[path].links.append(extra)
    return make_tree(specs)


@settings(max_examples=60 * FUZZ, deadline=None)
@given(trees(), st.sampled_from(list(Namespace)))
def test_the_reader_reads_what_the_writer_wrote(tree: Tree, namespace: Namespace) -> None:
    assert_reads_back(tree, build(tree, namespace)[0], namespace)


@settings(max_examples=40 * FUZZ, deadline=None)
@given(tree=trees())
def test_a_patched_image_is_the_image_of_the_mapped_tree(
    tree: Tree, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("patch")
    tree = replace(tree, uid=tree.uid // 4, gid=tree.gid // 4)
    image, fixups = build(tree)
    fixups = Fixups.decode(fixups.encode())
    for change, mapping in ((mapped, SHIFT), (squashed, SQUASH)):
        built, other_fixups = build(change(tree))
        assert patch(image, fixups, mapping, folder) == built
        assert other_fixups.encode() == fixups.encode()
    assert patch(image, fixups, Mapping.identity(), folder) == image


def test_the_same_tree_gives_the_same_bytes_and_another_one_another_uuid() -> None:
    tree = big_columns(3000)
    image = build(tree)[0]
    assert image == build(tree)[0]
    assert reader.read(image).uuid == reader.read(build(mapped(tree))[0]).uuid
    other = replace(tree, mtime=tree.mtime + 1)
    assert reader.read(image).uuid != reader.read(build(other)[0]).uuid != bytes(16)


def test_a_large_tree_reads_back_and_stays_small(tmp_path: Path) -> None:
    tree = big_columns(20_000, per_dir=9)
    image, fixups = build(tree)
    assert_reads_back(tree, image)
    assert len(image) <= 230 * len(tree)
    assert patch(image, fixups, SHIFT, tmp_path) == build(mapped(tree))[0]


@pytest.mark.parametrize("per_dir", [1, 100, 130, 200, 19_998])
def test_directories_of_every_size(per_dir: int) -> None:
    tree = big_columns(20_000, per_dir=per_dir, links=0)
    image = build(tree)[0]
    assert len(image) <= 230 * len(tree) + 8192
    if per_dir > 100:
        assert_reads_back(tree, image)


@pytest.mark.parametrize("size", [1, 1 << 43, (1 << 43) + 1, 1 << 44])
@pytest.mark.parametrize("count", [0, 300])
def test_stubs_of_any_size_are_one_hole(size: int, count: int) -> None:
    pairs = tuple(sorted((b"user.%d" % i, b"v") for i in range(count)))
    tree = make_tree({b"f": replace(regular(b"x", xattrs=pairs), size=size)})
    assert_reads_back(tree, build(tree)[0])


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (regular(b"x", xattrs=((b"user.v", bytes(65536)),)), "65536 bytes"),
        (regular(b"x", xattrs=((b"user." + b"n" * 251, b""),)), "names of up to 255"),
        (regular(b"x", xattrs=((b"btrfs.compression", b"zstd"),)), "btrfs.compression"),
        (directory(xattrs=((b"user.", b""),)), "user."),
        (regular(b"x", xattrs=tuple((b"user.%d" % i + b"k" * 200, b"") for i in range(320))), "listxattr"),
        (regular(b"x", xattrs=tuple(sorted((b"user.%d" % i, bytes(60_000)) for i in range(300)))), "256 KiB"),
        (Spec(stat.S_IFCHR, major=4096), "4096:0"),
        (Spec(stat.S_IFBLK, minor=1 << 20), "1048576"),
        (symlink(b"t" * 4096), "beyond 4095"),
    ],
)
def test_what_erofs_cannot_hold_is_an_error_that_names_it(spec: Spec, why: str) -> None:
    tree = make_tree({b"some/where": spec})
    with pytest.raises(LossyResult, match=f"^some/where: .*{why}"):
        build(tree)


def test_a_kind_of_file_that_erofs_does_not_have_is_an_error_that_names_it() -> None:
    tree = make_tree({b"some/where": Spec(stat.S_IFIFO | 0o600)})
    socket = np.where(tree.mode == stat.S_IFIFO | 0o600, stat.S_IFSOCK | 0o600, tree.mode).astype(np.uint32)
    with pytest.raises(LossyResult, match=r"^some/where: .*kind of file"):
        build(replace(tree, mode=socket))


def test_a_long_name_is_an_error_that_names_it() -> None:
    with pytest.raises(LossyResult, match="a name of 256 bytes"):
        build(make_tree({b"d/" + b"n" * 256: regular()}))


def test_xxh32_and_crc32c_of_known_values() -> None:
    assert f.xxh32(b"", 0) == 0x02CC5D05
    assert f.xxh32(b"abc", 0) == 0x32D153FF
    assert f.xxh32(b"Nobody inspects the spammish repetition", 0) == 0xE2293B2F
    assert f.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283


@given(st.integers(0, 4095), st.integers(0, 2**20 - 1))
def test_device_numbers_round_trip(major: int, minor: int) -> None:
    (number,) = encode_devices(np.array([major], np.uint32), np.array([minor], np.uint32)).tolist()
    assert f.decode_device(number) == (major, minor)


# --- patching what does not fit


def test_patching_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    image, fixups = build(make_tree({b"a": regular(b"a", xattrs=((CAPABILITY, capability(5)),))}))
    with pytest.raises(InvalidImage, match="its fixups are for"):
        patch(image + bytes(4096), fixups, SHIFT, tmp_path)
    for uids in ((1, 100_000, 10), (0, 100_000, 5)):  # without the owner, without the capability's root
        with pytest.raises(InvalidImage, match="build it again"):
            patch(image, fixups, Mapping(IdMap.of([uids]), SHIFT.gid), tmp_path)


def test_damaged_fixups_are_refused() -> None:
    tree = make_tree({b"a": regular(b"a", xattrs=((ACL_ACCESS, user_acl(1)),))})
    raw = build(tree)[1].encode()
    assert Fixups.decode(raw).encode() == raw
    for at in range(len(raw)):
        bad = bytearray(raw)
        bad[at] ^= 0x10
        with pytest.raises(InvalidImage, match="build the metadata image again"):
            Fixups.decode(bytes(bad))
        with pytest.raises(InvalidImage, match="build the metadata image again"):
            Fixups.decode(raw[:at])


# --- DATA


def read_data(folder: Path, index: object, tar: Path) -> dict[bytes, bytes]:
    file = io.BytesIO()
    with tar.open("rb") as source:
        build_data(index, source, file)  # type: ignore[arg-type]
    found = reader.read(file.getvalue())
    assert found.block_bytes == 512
    assert found.blocks * 512 == len(file.getvalue())
    raw = tar.read_bytes()
    out = {}
    for path, node in found.nodes.items():
        if stat.S_ISREG(node.mode):
            assert (node.mode, node.uid, node.gid, node.nlink) == (stat.S_IFREG | 0o444, 0, 0, 1)
            out[path] = found.content(path, raw)
        else:
            assert node.mode == stat.S_IFDIR | 0o555
    return out


runs_and_size = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3000)), max_size=6).flatmap(
    lambda gaps: st.tuples(st.just(gaps), st.integers(0, 5000), st.sampled_from([1, 512]))
)


@settings(max_examples=60 * FUZZ, deadline=None)
@given(st.lists(runs_and_size, max_size=4), st.lists(st.integers(0, 2000), max_size=8))
def test_data_maps_every_content(
    tmp_path_factory: pytest.TempPathFactory, sparse: list[tuple[list[tuple[int, int]], int, int]], sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    files = {b"f%d" % i: random.Random(i).randbytes(size) for i, size in enumerate(sizes)}
    holed: dict[bytes, tuple[Sequence[Extent], bytes]] = {}
    for i, (gaps, end, unit) in enumerate(sparse):
        runs, content = [], bytearray()
        for gap, length in gaps:
            content += bytes(gap * unit)
            runs.append((len(content), length * unit))
            content += random.Random(gap).randbytes(length * unit)
        holed[b"s%d" % i] = (tuple(runs), bytes(content) + bytes(end * unit))
    holed = {path: pair for path, pair in holed.items() if pair[1]}
    index, tar = written_layer(folder, files, holed)
    want = {
        data_path(hashlib.sha256(c).digest()): c for c in [*files.values(), *(c for _, c in holed.values())] if c
    }
    assert read_data(folder, index, tar) == want


def test_equal_contents_are_mapped_once(tmp_path: Path) -> None:
    content = bytes(4096) + b"end"
    index, tar = written_layer(tmp_path, {b"x": content, b"y": content}, {b"a": ([(4096, 3)], content)})
    assert read_data(tmp_path, index, tar) == {data_path(hashlib.sha256(content).digest()): content}


def test_two_contents_of_one_name_are_an_error(tmp_path: Path) -> None:
    index, tar = written_layer(tmp_path, {b"x": b"1", b"y": b"2"})
    sha256 = index.sha256.copy()
    sha256[1, :15] = sha256[0, :15]
    sha256[1, 15] = sha256[0, 15] ^ 3
    with tar.open("rb") as source, pytest.raises(InvalidImage, match="b'x' and b'y' differ"):
        build_data(replace(index, sha256=sha256), source, io.BytesIO())
    sha256[1, 15] = sha256[0, 15] ^ 4
    with tar.open("rb") as source:
        build_data(replace(index, sha256=sha256), source, io.BytesIO())


def test_a_tar_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    index, tar = written_layer(tmp_path, {b"x": b"1", b"y": bytes(5000)})
    tar.write_bytes(tar.read_bytes()[:5000])
    with tar.open("rb") as source, pytest.raises(InvalidImage, match="b'y' lies beyond the end"):
        build_data(index, source, io.BytesIO())


# --- a reader that meets hostile images


def an_image() -> bytes:
    return build(
        make_tree(
            {
                b"a": regular(b"a", xattrs=((b"user.x", b"y"), (ACL_ACCESS, user_acl(1)))),
                b"b/c/d": symlink(b"e"),
                b"b/f": Spec(stat.S_IFCHR | 0o600, major=1, minor=2),
                b"g": directory(xattrs=tuple(sorted((b"user.%d" % i, b"v") for i in range(260)))),
                **{b"many/%d" % i + b"n" * 100: regular(b"%d" % i) for i in range(60)},
            }
        )
    )[0]


def without_checksum(image: bytes) -> bytearray:
    out = bytearray(image)
    out[f.SUPER_OFFSET + 8] &= ~f.Compat.SB_CHKSUM & 0xFF
    return out


def test_flipped_bytes_give_an_error_or_an_image_never_a_crash() -> None:
    image, rng = without_checksum(an_image()), random.Random(7)
    used = [at for at in range(len(image)) if image[at]]
    refused = 0
    for _ in range(1500 * FUZZ):
        bad = bytearray(image)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.choice(used) if rng.random() < 0.8 else rng.randrange(f.SUPER_OFFSET, len(bad))
            bad[at] = rng.choice((0, 0xFF, bad[at] ^ 1 << rng.randrange(8)))
        try:
            for node in reader.read(bad).nodes.values():
                assert node.size >= 0
        except LayerkitError:
            refused += 1
    assert refused > 100


def test_an_image_cut_anywhere_is_refused() -> None:
    image = an_image()
    for length in range(0, len(image), 512):
        with pytest.raises(InvalidImage):
            reader.read(image[:length])


def test_a_damaged_superblock_fails_its_checksum() -> None:
    image = bytearray(an_image())
    image[f.SUPER_OFFSET + 60] ^= 1
    with pytest.raises(InvalidImage, match="checksum"):
        reader.read(image)


@pytest.mark.parametrize("target", [b"", b"b", b"b/c"])
def test_a_directory_that_leads_back_is_refused(target: bytes) -> None:
    image = without_checksum(build(make_tree({b"b/c/d": directory()}))[0])
    nodes = reader.read(image).nodes
    old, new = nodes[b"b/c/d"].nid, nodes[target].nid
    at = bytes(image).index(old.to_bytes(8, "little"))
    while at >= 0:
        image[at : at + 8] = new.to_bytes(8, "little")
        at = bytes(image).find(old.to_bytes(8, "little"))
    with pytest.raises(InvalidImage, match=r"reached twice|leads elsewhere"):
        reader.read(image)


def test_a_directory_with_two_names_is_refused() -> None:
    image, fixups = build(make_tree({b"a": directory(), b"b": directory()}))
    a, b = (int(nid).to_bytes(8, "little") for nid in fixups.nids[np.argsort(fixups.rows)][1:])
    bad = without_checksum(image)
    at = image.index(b)
    bad[at : at + 8] = a
    with pytest.raises(InvalidImage, match="reached twice"):
        reader.read(bad)


def test_inodes_that_share_their_xattrs_do_not_cost_more_than_the_image() -> None:
    """Every inode claims 64 KiB of xattrs, which begin in the next inode: each alone is well formed."""
    tree = make_tree({b"f%04d" % i: Spec(stat.S_IFIFO | 0o400) for i in range(2000)})
    image, fixups = build(tree)
    bad = without_checksum(image)
    inodes = np.frombuffer(bad, f.EXTENDED, 2000, fixups.meta_bytes + int(fixups.nids[1]) * f.SLOT_BYTES)
    inodes["xattr_icount"] = f.xattr_icount(f.XATTR_BODY_BYTES + f.align(f.XATTR_ENTRY_BYTES + 1 + 65535, 4))
    # Bytes 12 to 15 of the next inode are the entry: one byte of name, index 1 (user.), 65535 of value.
    inodes["size"] = (1 | 1 << 8 | 0xFFFF << 16) << 32
    # Its first four bytes are the name filter, which may not hide the name (one letter).
    seen = int(inodes[0]["format"]) | int(inodes[0]["xattr_icount"]) << 16
    inodes["u"] = next(c for c in range(1, 256) if c != ord("/") and not seen & ~filter_of(c))
    with pytest.raises(InvalidImage, match="xattrs overlap"):
        reader.read(bad, limits=Limits(file_bytes=1 << 64))


def filter_of(letter: int) -> int:
    return f.name_filter([(1, bytes((letter,)))])


@pytest.mark.parametrize("junk", [b"", bytes(1024), bytes(5000), b"\xff" * 9000])
def test_what_is_no_erofs_is_refused(junk: bytes) -> None:
    with pytest.raises(InvalidImage):
        reader.read(junk)


def test_a_chunk_list_of_a_huge_file_is_bounded() -> None:
    raw, fixups = build(make_tree({b"f": regular(b"x")}))
    image = without_checksum(raw)
    inode = np.frombuffer(image, f.EXTENDED, 1, fixups.meta_bytes + int(fixups.nids[-1]) * f.SLOT_BYTES)
    inode["size"] = 1 << 44
    inode["u"] = 0
    with pytest.raises(InvalidImage, match="chunk"):
        reader.read(image)


def test_digest_of_the_format_is_pinned() -> None:
    """A change of the layout changes every META's bytes: it must be meant, and bump ``layerkit.erofs.v1``."""
    image = build(make_tree({b"a": regular(b"a"), b"b/c": symlink(b"d"), b"e": regular()}))[0]
    assert str(Digest.of(image)) == "sha256:91097850b2215903c5fb9eec1cd0e2d2ff4e43e46a5502480a6393d78b931310"
