"""What containers-storage passes to a mount program, read as it writes it."""

from __future__ import annotations

import pytest

from layerkit.hosts.podman.layers import parse_shift, shift_text, shifted_back
from layerkit.hosts.podman.mount_program import parse
from layerkit.model.errors import UnmappedId, UsageError

KEEP_ID = "uidmapping=:0:1:4242:4242:0:1:4243:4243:61294,gidmapping=:0:1:100:"


def test_what_podman_writes() -> None:
    options = parse(f"lowerdir=/s/l/A:/s/l/B,upperdir=/s/c/diff,workdir=/s/c/work,,volatile,{KEEP_ID}")
    assert options.lower == ("/s/l/A", "/s/l/B")
    assert (options.upper, options.work, options.read_only) == ("/s/c/diff", "/s/c/work", False)
    assert options.mapping.uid.extents == ((0, 1, 4242), (4242, 0, 1), (4243, 4243, 61294))
    assert options.mapping.gid.extents == ((0, 1, 100),)
    assert options.overlay == (("volatile", None),)
    assert shift_text(options.mapping) == "uid=0:1:4242,4242:0:1,4243:4243:61294;gid=0:1:100"
    assert options.notes == ()


def test_reads_only_and_without_maps() -> None:
    options = parse("lowerdir=/a,ro,noexec")
    assert options.read_only and shift_text(options.mapping) == ""
    assert options.attributes == ("ro", "noexec")


def test_maps_that_shift_nothing_have_no_name() -> None:
    assert shift_text(parse("lowerdir=/a,uidmapping=0:0:65536,gidmapping=0:0:65536").mapping) == ""


def test_squash() -> None:
    root = parse("lowerdir=/a,squash_to_root").mapping
    assert (root.host_of("uid", 0), root.host_of("uid", 5), shift_text(root)) == (0, 0, "uid=all:0;gid=all:0")
    one = parse("lowerdir=/a,squash_to_uid=7,squash_to_gid=8").mapping
    assert (one.host_of("rootid of file capability", 3), one.host_of("gid in ACL", 3)) == (7, 8)
    assert parse_shift(shift_text(one)) == one


def test_what_has_no_effect_is_said() -> None:
    notes = parse("lowerdir=/a,metacopy=on,brand_new=1,noacl,threaded=1").notes
    assert notes == ("metacopy=on: chosen by layerkit itself; ignored", "brand_new=1: unknown option, ignored")


def test_an_id_outside_the_map_is_an_error_or_the_overflow_id() -> None:
    with pytest.raises(UnmappedId, match=r"uid 10 is outside the map \(0:1:10\)"):
        parse("lowerdir=/a,uidmapping=0:1:10").mapping.host_of("uid", 10)
    maps = parse("lowerdir=/a,uidmapping=0:1:10,overflow_id=65534").mapping
    assert (maps.host_of("uid", 9), maps.host_of("uid", 10)) == (10, 65534)


def test_maps_go_back() -> None:
    maps = parse(f"lowerdir=/a,{KEEP_ID}").mapping
    back = shifted_back(maps)
    for number in (0, 1, 4241, 4242, 4243, 65536):
        assert back.host_of("uid", maps.host_of("uid", number)) == number
    # 0 is in the map of the users, and not in that of the groups: podman's own work.
    assert (back.host_of("uid", 0), back.host_of("gid", 0), back.host_of("gid", 900)) == (4242, 0, 65534)
    assert parse_shift(shift_text(maps)) == maps
    # As versions before wrote it: neighbours that continue each other were not one.
    assert shift_text(parse_shift("uid=0:100000:1,1:100001:9")) == "uid=0:100000:10"


@pytest.mark.parametrize(
    "text",
    [
        "upperdir=/u,workdir=/w", "lowerdir=/a,upperdir=/u", "lowerdir=/a,uidmapping=0:1",
        "lowerdir=/a,uidmapping=0:1:0", "lowerdir=/a,uidmapping=0:1:10:5:100:10",
        "lowerdir=/a,uidmapping=0:1:10:20:5:10", "lowerdir=/a,uidmapping=0:1:x",
        "lowerdir=/a,uidmapping=0:4294967290:10", "lowerdir=/a,squash_to_uid=-1", "lowerdir=/a,xattr_permissions=2",
        "lowerdir=/a,rendering=erofs", "lowerdir=/a,uidmapping=٣:1:1", "",
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_separators() -> None:
    assert parse(r"lowerdir=/a\:b:/c").lower == ("/a:b", "/c")
    assert parse('lowerdir=/a,context="s:o:c:s0,c1"').overlay == (("context", "s:o:c:s0,c1"),)
    assert shift_text(parse("lowerdir=/a,uidmapping=,gidmapping=:").mapping) == ""
