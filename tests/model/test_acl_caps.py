"""ACL and capability xattrs: bytes, maps, and what the kernel and its tools write."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import need_root, need_tool

from layerkit.linux import mounts
from layerkit.linux.syscalls import closing
from layerkit.model import acl_caps
from layerkit.model.acl_caps import AclEntry, Capability
from layerkit.model.errors import InvalidImage

V1 = bytes.fromhex("010000010004000000000000")
V2 = bytes.fromhex("0100000200040000000000000000000000000000")
V3 = bytes.fromhex("0100000300040000000000000000000000000000e8030000")


def shift(kind: str, value: int) -> int:
    assert kind in ("uid in ACL", "gid in ACL", "rootid of file capability")
    return value + (200000 if kind.startswith("gid") else 100000)


ENTRIES = st.lists(
    st.builds(AclEntry, st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(0, 7), st.integers(0, 2**32 - 1)),
    max_size=6,
)


@given(ENTRIES)
def test_acl_round_trip(entries: list[AclEntry]) -> None:
    value = acl_caps.encode_acl(entries)
    assert acl_caps.decode_acl(value) == tuple(entries)
    assert acl_caps.map_acl(value, lambda kind, number: number) == value


@given(st.binary(max_size=30))
def test_any_bytes_decode_or_are_refused(value: bytes) -> None:
    with contextlib.suppress(InvalidImage):
        assert acl_caps.encode_acl(acl_caps.decode_acl(value)) == value
    with contextlib.suppress(InvalidImage):
        assert acl_caps.encode_capability(acl_caps.decode_capability(value)) == value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "0 bytes"),
        (b"\2\0\0", "3 bytes"),
        (b"\1\0\0\0", "version 1"),
        (b"\2\0\0\0" + bytes(7), "11 bytes"),
        (b"\2\0\0\0" + struct.pack("<HHI", 3, 0, 0), "unknown tag 0x3"),
        (b"\2\0\0\0" + struct.pack("<HHI", 1, 8, 0), "unknown permission bits 0x8"),
    ],
)
def test_malformed_acls(value: bytes, why: str) -> None:
    with pytest.raises(InvalidImage, match=why):
        acl_caps.decode_acl(value)


def test_only_users_and_groups_of_an_acl_are_mapped() -> None:
    value = acl_caps.encode_acl([AclEntry(tag, 5, 7) for tag in (1, 2, 4, 8, 16, 32)])
    ids = [entry.id for entry in acl_caps.decode_acl(acl_caps.map_acl(value, shift))]
    assert ids == [7, 100007, 7, 200007, 7, 7]
    # The same in an access and in a default ACL, and in no other xattr.
    mapped = [acl_caps.map_value(name, value, shift) != value for name in (*acl_caps.ACL_NAMES, b"user.x")]
    assert mapped == [True, True, False]


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (V1, Capability(1, 1, 0x400, 0)),
        (V2, Capability(2, 1, 0x400, 0)),
        (V3, Capability(3, 1, 0x400, 0, 1000)),
        (struct.pack("<5I", 2 << 24, 1, 2, 3, 4), Capability(2, 0, 1 | 3 << 32, 2 | 4 << 32)),
    ],
)
def test_capabilities(value: bytes, want: Capability) -> None:
    assert acl_caps.decode_capability(value) == want
    assert acl_caps.encode_capability(want) == value


@pytest.mark.parametrize(
    "value", [b"", b"\1\0\0", V1 + b"\0", V2[:-1], V3 + bytes(4), V2[:12], b"\0\0\0\4" + V3[4:], bytes(20)]
)
def test_malformed_capabilities(value: bytes) -> None:
    with pytest.raises(InvalidImage, match="revision"):
        acl_caps.decode_capability(value)


def test_mapped_capabilities_say_their_root() -> None:
    for value, rootid in ((V1, 100000), (V2, 100000), (V3, 101000)):
        assert acl_caps.decode_capability(acl_caps.map_capability(value, shift)) == Capability(
            3, 1, 0x400, 0, rootid
        )


def test_a_capability_of_the_hosts_root_is_shown_without_one() -> None:
    for value in (V1, V2, V3):
        assert acl_caps.map_capability(value, lambda kind, number: 0) == V2


# -- the kernel and its tools -------------------------------------------------------------------------


def test_what_setfacl_writes(tmp_path: Path) -> None:
    need_root()
    need_tool("setfacl", "getfacl")
    folder = tmp_path / "d"
    folder.mkdir()
    subprocess.run(["setfacl", "-m", "u:1000:rwx,g:2000:r-x,d:u:1001:r--", folder], check=True)
    access, default = (os.getxattr(folder, name) for name in acl_caps.ACL_NAMES)
    assert [(e.tag, e.perm, e.id) for e in acl_caps.decode_acl(access) if e.tag in (2, 8)] == [
        (2, 7, 1000),
        (8, 5, 2000),
    ]
    assert acl_caps.encode_acl(acl_caps.decode_acl(default)) == default
    for name, value in zip(acl_caps.ACL_NAMES, (access, default), strict=True):
        os.setxattr(folder, name, acl_caps.map_acl(value, shift))
    shown = subprocess.run(["getfacl", "-npE", folder], check=True, capture_output=True, text=True).stdout.split()
    assert {"user:101000:rwx", "group:202000:r-x", "default:user:101001:r--"} <= set(shown)


def test_what_setcap_writes(tmp_path: Path) -> None:
    need_root()
    need_tool("setcap", "getcap")
    file = tmp_path / "f"
    file.write_bytes(b"")
    subprocess.run(["setcap", "cap_net_raw,cap_bpf=ep", file], check=True)
    value = os.getxattr(file, "security.capability")
    assert acl_caps.decode_capability(value) == Capability(2, 1, 1 << 13 | 1 << 39, 0)
    os.setxattr(file, "security.capability", acl_caps.map_capability(value, shift))
    assert acl_caps.decode_capability(os.getxattr(file, "security.capability")).rootid == 100000
    shown = subprocess.run(["getcap", "-n", file], check=True, capture_output=True, text=True).stdout
    assert "rootid=100000" in shown and "cap_net_raw" in shown


def test_an_idmapped_mount_shows_the_same(tmp_path: Path) -> None:
    need_root()
    need_tool("setfacl", "setcap")
    file = tmp_path / "f"
    file.write_bytes(b"")
    subprocess.run(["setcap", "cap_net_raw=ep", file], check=True)
    subprocess.run(["setfacl", "-m", "u:1000:rw-,g:2000:r--", file], check=True)
    mount = mounts.idmapped_clone(tmp_path, ((0, 100000, 65536),), ((0, 200000, 65536),))
    with closing(mount):
        shown = f"/proc/self/fd/{mount}/f"
        assert os.stat(shown).st_uid == 100000
        for name in (acl_caps.ACL_NAMES[0], acl_caps.CAPABILITY_NAME):
            mapped = acl_caps.map_value(name, os.getxattr(file, name), shift)
            assert os.getxattr(shown, name) == mapped, name


def test_the_kernel_takes_no_first_revision(tmp_path: Path) -> None:
    need_root()
    file = tmp_path / "f"
    file.write_bytes(b"")
    with pytest.raises(OSError):
        os.setxattr(file, "security.capability", V1)
    os.setxattr(file, "security.capability", acl_caps.map_capability(V1, lambda kind, number: number))
