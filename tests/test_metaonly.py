"""What a metadata layer must refuse, escape and name. Its effect in the kernel: test_overlay_rules.py."""

from __future__ import annotations

import ast
import hashlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import ROOT
from trees import file, folder, tree_of

from layerkit import metaonly
from layerkit.metaonly import REDIRECT_BYTES, Namespace, data_path, metadata_layer, redirects
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import InvalidImage, LossyResult, UnsafeEntry

V2 = struct.pack("<IIIII", 0x02000001, 0x3000, 1, 2, 3)
V3 = struct.pack("<IIIIII", 0x03000001, 0x3000, 1, 2, 3, 0)


def digests(*items: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(items), np.uint8).reshape(-1, 32)


@given(st.lists(st.binary(min_size=32, max_size=32)))
def test_redirects_are_the_data_paths(items: list[bytes]) -> None:
    made = redirects(digests(*items))
    assert made.shape == (len(items), REDIRECT_BYTES)
    assert [row.tobytes() for row in made] == [b"/" + data_path(item) for item in items]


def test_stubs_are_the_files_that_are_not_empty() -> None:
    tree = tree_of([file(b"empty"), file(b"full", b"x"), folder(b"d"), Entry(b"l", Kind.SYMLINK, link=b"full"),
                    Entry(b"p", Kind.FIFO), Entry(b"again", Kind.HARDLINK, link=b"full")])  # fmt: skip
    meta = metadata_layer(tree)
    shown = {node.path for node in tree.nodes() if meta.is_stub[node.inode]}
    assert shown == {b"full", b"again"}
    made = redirects(meta.tree.sha256[meta.is_stub])
    assert [r.tobytes() for r in made] == [b"/" + data_path(hashlib.sha256(b"x").digest())]


def test_equal_content_is_one_name_and_no_clash() -> None:
    tree = tree_of([file(b"%d" % i, b"%d" % (i % 7)) for i in range(100)])
    meta = metadata_layer(tree)
    assert len({r.tobytes() for r in redirects(meta.tree.sha256[meta.is_stub])}) == 7


@pytest.mark.parametrize(
    ("byte", "bit", "clash"),
    [(15, 2, False), (15, 1, True), (16, 7, True), (31, 0, True), (7, 0, False), (0, 7, False)],
)
def test_two_contents_with_one_short_name(byte: int, bit: int, clash: bool) -> None:
    # A middle digest with the same first half keeps the pair from standing next to each other by luck.
    one = bytearray(hashlib.sha256(b"x").digest())
    two = bytearray(one)
    two[byte] ^= 1 << bit
    far = bytearray(one)
    far[8] ^= 0x80
    contents = {b"a/one": one, b"b/two": two, b"c/far": far, b"c/one": one}
    entries = [Entry(path, Kind.REG, size=5, sha256=bytes(sha)) for path, sha in contents.items()]
    entries += [file(b"more/%d" % i, b"%d" % i) for i in range(50)]
    if not clash:
        metadata_layer(tree_of(entries))
        return
    with pytest.raises(InvalidImage, match=r"b/two.*first 126 bits"):
        metadata_layer(tree_of(entries))


def test_a_clash_is_found_among_many_that_share_half_a_name() -> None:
    # 64 bits can be made equal on purpose, so a crowd may stand between the two that clash.
    digest = hashlib.sha256(b"x").digest()
    shas = [digest] + [digest[:8] + bytes([i]) * 24 for i in range(100)] + [digest[:16] + bytes(16)]
    entries = [Entry(b"%03d" % i, Kind.REG, size=5, sha256=sha) for i, sha in enumerate(shas)]
    metadata_layer(tree_of(entries[:-1]))
    with pytest.raises(InvalidImage, match="000 and 101 differ"):
        metadata_layer(tree_of(entries))


@pytest.mark.parametrize("namespace", Namespace)
def test_own_overlay_xattrs_are_escaped_and_foreign_ones_pass(namespace: Namespace) -> None:
    own = namespace.value.encode()
    other = b"user" if namespace is Namespace.TRUSTED else b"trusted"
    xattrs = tuple(sorted((n, b"v") for n in (
        own + b".overlay.metacopy", own + b".overlay.overlay.opaque", own + b".overlay", own + b".overlayx",
        other + b".overlay.redirect", other + b".overlay.", b"security.foo",
    )))  # fmt: skip
    meta = metadata_layer(tree_of([file(b"f", b"x", xattrs=xattrs)]), namespace)
    assert {n for n, _ in meta.tree.xattr_sets[1]} == {
        own + b".overlay.overlay.metacopy", own + b".overlay.overlay.overlay.opaque", own + b".overlay",
        own + b".overlayx", other + b".overlay.redirect", other + b".overlay.", b"security.foo",
    }  # fmt: skip
    assert list(meta.tree.xattr_sets[1]) == sorted(meta.tree.xattr_sets[1])


@pytest.mark.parametrize("name", [b"trusted.overlay.opaque", b"user.overlay.redirect", b"trusted.overlay."])
@pytest.mark.parametrize("namespace", Namespace)
def test_strict_refuses_overlay_xattrs_of_both_namespaces(name: bytes, namespace: Namespace) -> None:
    tree = tree_of([folder(b"a/planted", xattrs=((name, b"y"),))])
    with pytest.raises(UnsafeEntry, match=rf"a/planted.*{name.decode()}"):
        metadata_layer(tree, namespace, strict=True)


def test_strict_lets_all_else_through() -> None:
    xattrs = ((b"security.capability", V2), (b"trusted.overlay", b""), (b"user.overlayx", b""))
    metadata_layer(tree_of([file(b"f", b"x", xattrs=xattrs)]), strict=True)


def test_names_that_escaping_makes_too_long() -> None:
    longest = b"trusted.overlay." + b"n" * (255 - 16 - 8)
    metadata_layer(tree_of([file(b"f", b"x", xattrs=((longest, b""),))]))
    with pytest.raises(LossyResult, match=r"^dir/f: .*256 > 255"):
        metadata_layer(tree_of([file(b"dir/f", b"x", xattrs=((longest + b"n", b""),))]))
    metadata_layer(tree_of([file(b"f", b"x", xattrs=((longest + b"n", b""),))]), Namespace.USER)


def test_an_overlay_xattr_without_a_suffix_cannot_be_shown() -> None:
    tree = tree_of([file(b"f", b"x", xattrs=((b"user.overlay.", b""),))])
    metadata_layer(tree, Namespace.TRUSTED)
    with pytest.raises(LossyResult, match=r"user\.overlay\. cannot be read"):
        metadata_layer(tree, Namespace.USER)


V1 = b"\1\0\0\1" + V2[4:12]
V1_AS_V3 = b"\1\0\0\3" + V2[4:12] + bytes(12)


@pytest.mark.parametrize(("given_value", "kept"), [(V2, V3), (V3, V3), (V1, V1_AS_V3)])
def test_capabilities_take_the_form_whose_length_is_fixed(given_value: bytes, kept: bytes) -> None:
    tree = tree_of([file(b"f", b"x", xattrs=((b"security.capability", given_value),))])
    assert metadata_layer(tree).tree.xattr_sets[1] == ((b"security.capability", kept),)


@pytest.mark.parametrize("value", [V2[:12], bytes(20), b""])
def test_a_capability_that_no_kernel_stores_is_refused(value: bytes) -> None:
    with pytest.raises(LossyResult, match=r"^f: .*capability"):
        metadata_layer(tree_of([file(b"f", b"x", xattrs=((b"security.capability", value),))]))


def test_a_whiteout_device_is_refused() -> None:
    with pytest.raises(LossyResult, match=r"dev/w: .*whiteout"):
        metadata_layer(tree_of([Entry(b"dev/w", Kind.CHAR)]))
    metadata_layer(tree_of([Entry(b"dev/w", Kind.BLOCK), Entry(b"dev/n", Kind.CHAR, major=1, minor=3)]))


@pytest.mark.parametrize(("major", "minor", "fits"), [(4095, 1048575, True), (4096, 0, False), (0, 1048576, False)])
def test_device_numbers_the_kernel_would_cut_off(major: int, minor: int, fits: bool) -> None:
    tree = tree_of([Entry(b"dev/x", Kind.BLOCK, major=major, minor=minor)])
    if fits:
        metadata_layer(tree)
        return
    with pytest.raises(LossyResult, match=f"dev/x: .*{major}:{minor}"):
        metadata_layer(tree)


@pytest.mark.parametrize("kind", [Kind.SYMLINK, Kind.FIFO, Kind.BLOCK])
def test_user_xattrs_where_the_kernel_has_none(kind: Kind) -> None:
    link = b"t" if kind is Kind.SYMLINK else b""
    with pytest.raises(LossyResult, match=r"^x: .*user xattrs"):
        metadata_layer(tree_of([Entry(b"x", kind, link=link, xattrs=((b"user.a", b""),))]))
    metadata_layer(tree_of([Entry(b"x", kind, link=link, xattrs=((b"trusted.a", b""),))]))


@pytest.mark.parametrize("name", [b":A", b":z", b":0", b":-", b":_"])
def test_top_folders_reserved_for_data(name: bytes) -> None:
    with pytest.raises(LossyResult, match="reserved"):
        metadata_layer(tree_of([file(name + b"/f", b"x")]))
    metadata_layer(tree_of([file(b"sub/" + name + b"/f", b"x")]))


@pytest.mark.parametrize("name", [b":", b":AA", b":.", b":+", b":\xff", b"A:"])
def test_names_that_only_look_reserved(name: bytes) -> None:
    metadata_layer(tree_of([file(name, b"x")]))


def test_the_tree_is_left_alone() -> None:
    xattrs = ((b"security.capability", V2), (b"trusted.overlay.opaque", b"y"))
    tree = tree_of([file(b"f", b"x", xattrs=xattrs)])
    before = tree.digest()
    metadata_layer(tree)
    assert tree.digest() == before


def test_no_other_module_writes_overlay_xattrs() -> None:
    marks = {b"metacopy", b"redirect", b"opaque", b"origin", b"impure", b"whiteout"}
    found = []
    for path in sorted((ROOT / "layerkit").rglob("*.py")):
        if path.name == "metaonly.py":
            continue
        module = ast.parse(path.read_text("utf-8"))
        texts = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(module):
            if not isinstance(node, ast.Constant) or id(node) in texts:
                continue
            value = node.value
            if (isinstance(value, bytes) and (value in marks or b"overlay." in value)) or (
                isinstance(value, str) and re.search(r"(trusted|user|^)\.overlay\.", value)
            ):
                found.append(f"{path}:{node.lineno}: {value!r}")
    assert found == []


def test_names_of_overlay_xattrs() -> None:
    trusted, user = Namespace.TRUSTED, Namespace.USER
    assert trusted.xattr(metaonly.OPAQUE) == b"trusted.overlay.opaque"
    assert user.stub(b"/d") == {b"user.overlay.metacopy": b"\0\4\0\0", b"user.overlay.redirect": b"/d"}
    assert list(user.stub()) == [b"user.overlay.metacopy"]
    for name in (b"user.overlay.x", b"user.overlay.overlay.x"):
        assert (metaonly.own_mark(user.escaped(name)), metaonly.unescaped(user.escaped(name))) == (None, name)
        assert (trusted.escaped(name), metaonly.unescaped(trusted.escaped(name))) == (
            name, metaonly.unescaped(name),
        )  # fmt: skip
    assert metaonly.own_mark(b"user.overlay.origin") == metaonly.ORIGIN
    assert metaonly.own_mark(b"user.overlay.origin", trusted) is None
    assert metaonly.own_mark(b"user.other") is None and metaonly.unescaped(b"user.other") == b"user.other"


def test_names_come_without_numpy() -> None:
    program = "import sys, layerkit.metaonly, layerkit.linux.fuse; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
