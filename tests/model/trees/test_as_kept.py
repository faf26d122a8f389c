"""Modes and ACLs that an image brings: shown as a filesystem keeps them, refused where it refuses them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge import differences, snapshot, unpacked
from made_images import Layout
from needs import need_root, need_tool
from tar_blocks import END, folder, hardlink, header, member, pax, symlink
from trees import acl, file, tree_of
from trees import folder as folder_entry

import layerkit
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult
from layerkit.model.trees.as_kept import as_kept

NOBODY = 0xFFFFFFFF
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
EXTENTS = ((0, 100000, 65536),)


NAMED = acl((1, 6, NOBODY), (2, 7, 1234), (4, 4, NOBODY), (0x10, 7, NOBODY), (0x20, 4, NOBODY))
MINIMAL = acl((1, 7, NOBODY), (4, 5, NOBODY), (0x20, 0, NOBODY))
SPELLED = b"user::rw-,user:1234:rwx,group::r--,mask::rwx,other::r--"


def brings(name: str, value: bytes) -> bytes:
    return pax((b"SCHILY.xattr." + name.encode(), value))


def test_every_rendering_shows_the_mode_that_an_acl_decides(tmp_path: Path) -> None:
    need_root()
    need_tool("umoci")
    image = Layout()
    image.list(
        image.image(
            brings(DEFAULT, NAMED) + folder(b"d")
            + brings(ACCESS, NAMED) + member(b"d/named", b"1", mode=0o644)
            + brings(ACCESS, NAMED) + member(b"d/setid", b"1", mode=0o6644)
            + brings(ACCESS, MINIMAL) + member(b"d/minimal", b"1", mode=0o4644)
            + brings(ACCESS, acl()) + member(b"d/none", b"1", mode=0o4644)
            + brings(ACCESS, NAMED) + header(b"d/fifo", b"6", mode=0o600)
            + hardlink(b"d/again", b"d/named") + symlink(b"d/link", b"named") + END
        ),
        "a",
    )  # fmt: skip
    image.folder(tmp_path / "image")
    mapping = layerkit.mapping(["0:100000:65536"])
    settings = layerkit.Settings(store=tmp_path / "store")
    (tmp_path / "m").mkdir()
    with (
        unpacked(f"{tmp_path / 'image'}:a", tmp_path, EXTENTS) as judge,
        layerkit.open_image(f"oci:{tmp_path / 'image'}", settings=settings) as opened,
    ):
        want = snapshot(judge)
        assert (judge / "d/named").stat().st_mode & 0o7777 == 0o674
        for rendering, own_meta in (("erofs", False), ("erofs", True), ("directory", True)):
            with opened.mount(tmp_path / "m", mapping, rendering=rendering, own_meta=own_meta):
                assert differences(want, snapshot(tmp_path / "m")) == []
        opened.unpack(tmp_path / "r", mapping)
        assert differences(want, snapshot(tmp_path / "r")) == []
        packed = opened.pack(tmp_path / "r", f"oci:{tmp_path / 'packed'}:a", mapping, checksum=True)
        assert (packed.added, packed.changed, packed.removed) == (0, 0, 0)


def test_an_acl_as_text_decides_the_mode_too(tmp_path: Path) -> None:
    need_root()
    image = Layout()
    image.list(image.image(pax((b"SCHILY.acl.access", SPELLED)) + member(b"f", b"1", mode=0o644) + END), "a")
    image.folder(tmp_path / "image")
    (tmp_path / "m").mkdir()
    settings = layerkit.Settings(store=tmp_path / "store")
    with layerkit.open_image(f"oci:{tmp_path / 'image'}", settings=settings) as opened:
        for rendering in ("erofs", "directory"):
            with opened.mount(tmp_path / "m", rendering=rendering):
                shown = tmp_path / "m/f"
                assert (shown.stat().st_mode & 0o7777, os.getxattr(shown, ACCESS)) == (0o674, NAMED)


ENTRY = st.tuples(
    st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(0, 7), st.sampled_from([0, 1, 1234, NOBODY])
)  # fmt: skip
IDS = st.sampled_from([NOBODY, NOBODY, 0])


@st.composite
def nearly_valid(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Return what an ACL needs, and one or two things more, less or out of order."""
    found = [(1, 6, draw(IDS)), (4, 5, draw(IDS)), (32, 4, draw(IDS))]
    if draw(st.booleans()):
        found.append((16, 3, draw(IDS)))
    found = sorted([*found, *draw(st.lists(ENTRY, max_size=2))])
    return list(draw(st.permutations(found))) if draw(st.integers(0, 3)) == 0 else found


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(st.lists(ENTRY, max_size=6), nearly_valid(), nearly_valid()),
    st.booleans(),
    st.booleans(),
    st.integers(0, 0o777),
)
def test_the_kernel_keeps_and_refuses_the_same(
    tmp_path: Path, entries: list[tuple[int, int, int]], default: bool, is_folder: bool, perm: int
) -> None:
    need_root()
    name, value, victim = (DEFAULT if default else ACCESS), acl(*entries), tmp_path / "victim"
    if is_folder:
        victim.mkdir()
    else:
        victim.touch()
    try:
        victim.chmod(perm)
        refused = False
        try:
            os.setxattr(victim, name, value)
        except OSError as error:
            assert error.errno in (errno.EINVAL, errno.EACCES)
            refused = True
        made = (folder_entry if is_folder else file)(b"f", perm=perm, xattrs=((name.encode(), value),))
        try:
            kept = as_kept(tree_of([made]))
        except LossyResult:
            assert refused
            return
        assert not refused
        row = int(np.flatnonzero(kept.name.lengths > 0)[0])
        inode = int(kept.inode[row])
        there = {n: os.getxattr(victim, n) for n in os.listxattr(victim) if n.startswith("system.")}
        assert int(kept.mode[inode]) & 0o7777 == victim.stat().st_mode & 0o7777
        assert {n.decode(): v for n, v in kept.xattr_sets[int(kept.xattr[inode])]} == there
    finally:
        if is_folder:
            victim.rmdir()
        else:
            victim.unlink()


@pytest.mark.parametrize("name", [ACCESS, DEFAULT])
def test_symlinks_have_no_acl(name: str, tmp_path: Path) -> None:
    need_root()
    link = tmp_path / "l"
    link.symlink_to("x")
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(link, name, NAMED, follow_symlinks=False)
    made = Entry(b"l", Kind.SYMLINK, link=b"x", xattrs=((name.encode(), NAMED),))
    with pytest.raises(LossyResult, match=r"^l: has an ACL that the kernel does not take on a symlink"):
        as_kept(tree_of([made]))
