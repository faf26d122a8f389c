"""Id maps: how they are written, the laws they keep, and what they do to a tree."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import file, folder, tree_of
from work import steps

from layerkit import idmap
from layerkit.idmap import MAX_ID, IdMap, Mapping
from layerkit.model import acl_caps
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import UnmappedId, UnsafeEntry, UsageError
from layerkit.model.index import Index
from layerkit.model.tree import Tree

EXAMPLES = 200 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))
MAP = IdMap.parse(["0:100000:65536"])
TO_ROOT = Mapping(MAP, MAP)


def acl(*entries: tuple[int, int, int]) -> bytes:
    return acl_caps.encode_acl(acl_caps.AclEntry(*e) for e in entries)


def acl_of_user(uid: int, gid: int = 0) -> bytes:
    return acl(
        (1, 6, acl_caps.NO_ID), (2, 4, uid), (4, 4, acl_caps.NO_ID), (8, 4, gid), (16, 6, acl_caps.NO_ID),
        (32, 4, acl_caps.NO_ID),
    )  # fmt: skip


# -- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "extents"),
    [
        (["0:100000:65536"], ((0, 100000, 65536),)),
        (["1:100000:5", "0:1000:1"], ((0, 1000, 1), (1, 100000, 5))),
        (["0:1000:1,1:100000:5"], ((0, 1000, 1), (1, 100000, 5))),
        (["0:1000:1:1:100000:5:"], ((0, 1000, 1), (1, 100000, 5))),
        (["0:1000:1:"], ((0, 1000, 1),)),
        (["10:20:5,0:10:10"], ((0, 10, 15),)),
        (["0:0:4294967295"], ((0, 0, 2**32 - 1),)),
        (["4294967294:0:1"], ((2**32 - 2, 0, 1),)),
    ],
)
def test_parse(texts: list[str], extents: object) -> None:
    assert IdMap.parse(texts).extents == extents


@pytest.mark.parametrize(
    "text",
    [
        "", ",", ":", "0", "0:1", "0:1:", "0:1:2:3", "0:1:2::", "a:1:2", "0:-1:2", "+0:1:2", " 0:1:2", "0:1:1_0",
        "٠:١:٢", "0:1:2,", "0x0:1:2", "0:1:99999999999", "0:1.0:2", "0:1:2\n",
    ],
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--gid-map"):
        IdMap.parse([text], what="--gid-map")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0:0:0", "at least 1"),
        ("0:4294967295:1", "beyond 4294967294"),
        ("4294967295:0:1", "beyond 4294967294"),
        ("0:4294967290:6", "beyond"),
        ("1:0:4294967295", "beyond"),
        ("0:0:4294967296", "beyond"),
        ("0:10:5,4:100:5", "overlap in the container"),
        ("0:10:5,5:14:5", "overlap on the host.*--squash"),
        ("0:10:5,0:10:5", "overlap in the container"),
    ],
)
def test_extents_that_cannot_be(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        IdMap.parse([text])


def test_squash_allows_hosts_to_overlap_and_nothing_else() -> None:
    squashed = IdMap.parse(["0:1000:1,1:1000:1"], squash=True)
    assert squashed.apply(np.array([0, 1], np.uint32)).tolist() == [1000, 1000]
    assert not squashed.is_injective and not squashed.fits_kernel
    with pytest.raises(UsageError, match="no inverse"):
        squashed.inverse()
    with pytest.raises(UsageError, match="in the container"):
        IdMap.parse(["0:1:2,1:5:2"], squash=True)


def test_what_the_kernel_takes() -> None:
    many = [(2 * i, 2 * i, 1) for i in range(341)]
    assert IdMap.of(many[:340]).fits_kernel
    assert not IdMap.of(many).fits_kernel
    assert MAP.extents == ((0, 100000, 65536),)
    assert TO_ROOT.fits_kernel
    assert not Mapping(MAP, MAP, 65534).fits_kernel


def test_canonical_text_of_mappings() -> None:
    gid = IdMap.parse(["1:5:1,0:5:1"], squash=True)
    for mapping, text, flags in (
        (TO_ROOT, "uid=0:100000:65536;gid=0:100000:65536", "--uid-map 0:100000:65536"),
        (
            Mapping(MAP, gid, 0),
            "uid=0:100000:65536;gid=0:5:1,1:5:1;overflow=0",
            "--uid-map 0:100000:65536 --gid-map 0:5:1,1:5:1 --overflow-id 0 --squash",
        ),
    ):
        assert (mapping.canonical(), mapping.flags()) == (text, flags)
        assert Mapping.parse_canonical(text) == mapping


@pytest.mark.parametrize(
    "text",
    ["", "uid=0:0:1", "uid=0:0:1;gid=0:0:1;x=1", "uid=0:0:1,1:1:1;gid=0:0:1", "uid=0:0:1;gid=0:0:1;overflow=x",
     "gid=0:0:1;uid=0:0:1", "uid=0:0:1;gid=0:0:1;overflow=4294967295", "uid=0:0:1;gid=0:0:1;overflow="],
)  # fmt: skip
def test_text_that_is_not_canonical(text: str) -> None:
    with pytest.raises(UsageError):
        Mapping.parse_canonical(text)


# -- laws ---------------------------------------------------------------------------------------------

EDGES = [0, 1, 2, 5, 999, 1000, 65535, 65536, 2**31, MAX_ID - 1, MAX_ID]


@st.composite
def maps(draw: st.DrawFn, squash: bool = False) -> IdMap:
    """Draw maps of up to five extents among small and extreme ids."""
    points = st.lists(st.one_of(st.integers(0, 60), st.sampled_from(EDGES)), min_size=2, max_size=10, unique=True)
    cuts = sorted(draw(points))
    ranges = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    hosts = draw(st.permutations(range(len(ranges))))
    extents, at = [], draw(st.integers(0, 20))
    for i in hosts:
        c, n = ranges[i]
        n = min(n, 40)
        at = draw(st.integers(0, 30)) if squash else at + draw(st.integers(0, 3))
        extents.append((c, at, n))
        at += n
    return IdMap.of(extents, squash=squash)


IDS = st.lists(
    st.one_of(st.integers(0, 120), st.sampled_from(EDGES), st.just(2**32 - 1)), min_size=1, max_size=30
).map(lambda ids: np.array(ids, np.uint32))


def naive(extents: object, value: int) -> int | None:
    return next((h + value - c for c, h, n in extents if c <= value < c + n), None)  # type: ignore[attr-defined]


@settings(max_examples=EXAMPLES, deadline=None)
@given(maps(squash=True), IDS)
def test_lookup_is_what_a_loop_does(id_map: IdMap, ids: np.ndarray) -> None:
    mapped, inside = id_map.lookup(ids)
    want = [naive(id_map.extents, value) for value in ids.tolist()]
    assert inside.tolist() == [w is not None for w in want]
    assert mapped.tolist() == [w or 0 for w in want]
    assert mapped.dtype == np.uint32


@settings(max_examples=EXAMPLES, deadline=None)
@given(maps(), IDS)
def test_inverse(id_map: IdMap, ids: np.ndarray) -> None:
    covered = ids[id_map.lookup(ids)[1]]
    back = id_map.inverse()
    assert back.apply(id_map.apply(covered)).tolist() == covered.tolist()
    assert back.inverse() == id_map


@settings(max_examples=EXAMPLES, deadline=None)
@given(maps(squash=True), maps(squash=True), IDS)
def test_composition(first: IdMap, then: IdMap, ids: np.ndarray) -> None:
    both, inside = first.compose(then).lookup(ids)
    middle, reached = first.lookup(ids)
    last, arrived = then.lookup(middle)
    assert inside.tolist() == (reached & arrived).tolist()
    assert both[inside].tolist() == last[inside].tolist()


@settings(max_examples=EXAMPLES, deadline=None)
@given(maps())
def test_neutral_and_opposite(id_map: IdMap) -> None:
    assert id_map.compose(IdMap.identity()) == id_map == IdMap.identity().compose(id_map)
    there_and_back = id_map.compose(id_map.inverse())
    assert all(c == h for c, h, _ in there_and_back.extents)
    assert sum(n for _, _, n in there_and_back.extents) == sum(n for _, _, n in id_map.extents)


@settings(max_examples=EXAMPLES, deadline=None)
@given(maps(squash=True), st.randoms())
def test_text_is_canonical(id_map: IdMap, random: object) -> None:
    pieces = [(c + i, h + i, 1) for c, h, n in id_map.extents for i in range(n)]
    random.shuffle(pieces)  # type: ignore[attr-defined]
    again = IdMap.of(pieces, squash=True)
    assert again == id_map == IdMap.parse([id_map.canonical()], squash=True)


@settings(max_examples=EXAMPLES, deadline=None)
@given(maps(), IDS)
def test_total_or_error(id_map: IdMap, ids: np.ndarray) -> None:
    inside = id_map.lookup(ids)[1]
    with_overflow = id_map.apply(ids, overflow=77)
    assert (with_overflow[~inside] == 77).all()
    if inside.all():
        assert id_map.apply(ids).tolist() == with_overflow.tolist()
    else:
        with pytest.raises(UnmappedId, match=str(int(ids[~inside][0]))):
            id_map.apply(ids)


def test_no_map_covers_minus_one() -> None:
    assert not IdMap.identity().lookup(np.array([2**32 - 1], np.uint32))[1].any()


# -- trees --------------------------------------------------------------------------------------------


def owners(tree: Tree) -> dict[bytes, tuple[int, int]]:
    return {node.path: (node.uid, node.gid) for node in tree.nodes()}


def test_apply_maps_every_owner_and_nothing_else() -> None:
    tree = tree_of([file(b"a", b"x", uid=1, gid=2), folder(b"d", uid=65535), Entry(b"l", Kind.HARDLINK, link=b"a")])
    mapped = idmap.apply(tree, Mapping(MAP, IdMap.parse(["0:200000:65536"])))
    assert owners(mapped) == {
        b"": (100000, 200000), b"a": (100001, 200002), b"d": (165535, 200000), b"l": (100001, 200002),
    }  # fmt: skip
    back = Mapping(MAP.inverse(), IdMap.parse(["200000:0:65536"]))
    assert idmap.apply(mapped, back).digest() == tree.digest()
    assert idmap.apply(tree, Mapping.identity()).digest() == tree.digest()
    # Setuid bits do not get lost, as they do with chown.
    assert mapped.mode.tolist() == tree.mode.tolist()


@pytest.mark.parametrize(
    ("entries", "path", "kind", "value"),
    [
        ([file(b"b", uid=70000), file(b"a/x", gid=70001)], b"a/x", "gid", 70001),
        ([file(b"b", uid=70000), file(b"c", gid=70001)], b"b", "uid", 70000),
        ([file(b"b", uid=70000, gid=70001)], b"b", "uid", 70000),
        ([file(b"b", uid=70000), file(b"a", xattrs=((acl_caps.ACL_NAMES[0], acl_of_user(70002)),))],
         b"a", "uid in ACL", 70002),
        ([folder(b"b", xattrs=((acl_caps.ACL_NAMES[1], acl_of_user(1, 70003)),))], b"b", "gid in ACL", 70003),
        ([file(b"b", xattrs=((b"security.capability", acl_caps.encode_capability(
            acl_caps.Capability(3, 0, 1, 0, 70004))),))], b"b", "rootid of file capability", 70004),
    ],
)  # fmt: skip
def test_unmapped_ids_name_the_first_path(entries: list[Entry], path: bytes, kind: str, value: int) -> None:
    tree = tree_of(entries)
    with pytest.raises(UnmappedId) as caught:
        idmap.apply(tree, TO_ROOT)
    assert (caught.value.path, caught.value.kind, caught.value.value) == (path, kind, value)
    assert caught.value.ranges == "0:100000:65536"


def test_overflow_stands_for_ids_in_xattrs_too() -> None:
    xattrs = (
        (b"security.capability", acl_caps.encode_capability(acl_caps.Capability(3, 1, 1, 0, 70000))),
        (acl_caps.ACL_NAMES[0], acl_of_user(70000, 5)),
    )
    tree = tree_of([file(b"a", uid=70000, xattrs=xattrs)])
    mapped = idmap.apply(tree, Mapping(MAP, MAP, 42))
    assert owners(mapped)[b"a"] == (42, 100000)
    (_, capability), (_, access) = mapped.xattr_sets[1]
    assert acl_caps.decode_capability(capability).rootid == 42
    assert access == acl_of_user(42, 100005)


def test_capability_of_a_map_without_root() -> None:
    value = acl_caps.encode_capability(acl_caps.Capability(2, 1, 1, 0))
    tree = tree_of(
        [folder(b"", uid=5, gid=5), file(b"ping", uid=5, gid=5, xattrs=((b"security.capability", value),))]
    )
    five = IdMap.parse(["5:100000:1"])
    with pytest.raises(UnmappedId, match="ping: rootid of file capability 0 is outside the map"):
        idmap.apply(tree, Mapping(five, five))


def test_sets_that_become_equal_keep_their_rows_and_a_canonical_digest() -> None:
    def tree(first: int, second: int) -> Tree:
        return tree_of([file(b"%d" % i, xattrs=((acl_caps.ACL_NAMES[0], acl_of_user(u)),))
                        for i, u in enumerate((first, second))])  # fmt: skip

    squash = IdMap.parse(["0:0:1,1:9:1,2:9:1"], squash=True)
    before = tree(1, 2)
    after = idmap.apply(before, Mapping(squash, IdMap.identity()))
    assert len(after.xattr_sets) == len(before.xattr_sets) == 3
    assert after.xattr_sets[1] == after.xattr_sets[2]
    assert after.digest() == tree(9, 9).digest()
    assert before.digest() != tree(1, 1).digest()


def test_malformed_values_name_path_and_xattr() -> None:
    for name in sorted(acl_caps.ID_NAMES):
        tree = tree_of([file(b"ok"), file(b"d/bad", xattrs=((name, b"junk!"),))])
        for call in (lambda t: idmap.apply(t, TO_ROOT), idmap.reach):
            with pytest.raises(UnsafeEntry, match=f"d/bad: {name.decode()}: "):
                call(tree)


def test_reach() -> None:
    xattrs = ((b"security.capability", acl_caps.encode_capability(acl_caps.Capability(2, 1, 1, 0))),
              (acl_caps.ACL_NAMES[0], acl_of_user(12, 13)))  # fmt: skip
    tree = tree_of([file(b"a", uid=7), file(b"b", uid=7, gid=8, xattrs=xattrs)])
    found = idmap.reach(tree)
    assert (found.uid.tolist(), found.uid_inodes.tolist()) == ([0, 7], [1, 2])
    assert (found.gid.tolist(), found.gid_inodes.tolist()) == ([0, 8], [2, 1])
    assert (found.xattr_uids, found.xattr_gids) == ((0, 12), (13,))


def test_a_million_ids_in_a_moment() -> None:
    id_map = IdMap.parse(["0:100000:500,500:200500:500,1000:300000:64536"])
    ids = np.arange(1_000_000, dtype=np.uint32) % 65536
    assert steps(lambda: id_map.apply(ids)) < 1000, "a loop of Python would take a step for each"


@pytest.mark.parametrize("overflow", [-1, 2**32 - 1])
def test_overflow_is_an_id(overflow: int) -> None:
    with pytest.raises(UsageError, match="overflow-id"):
        Mapping(MAP, MAP, overflow)


def test_everything_becomes_one() -> None:
    one = IdMap.everything(7)
    assert (one.host_of(2**32 - 1), one.canonical(), one.is_injective, one.fits_kernel) == (
        7,
        "all:7",
        False,
        False,
    )
    mapped, inside = one.lookup(np.array([0, 5, 2**32 - 1], np.uint32))
    assert (mapped.tolist(), bool(inside.all())) == ([7, 7, 7], True)
    with pytest.raises(UsageError, match="no inverse"):
        one.inverse()
    # Each side has its own; an overflow id is for what neither covers.
    both = Mapping(one, MAP, 9)
    assert (both.host_of("uid", 70000), both.host_of("gid in ACL", 70000)) == (7, 9)


@settings(max_examples=EXAMPLES, deadline=None)
@given(maps(squash=True), IDS)
def test_one_id_is_as_many(id_map: IdMap, ids: np.ndarray) -> None:
    mapped, inside = id_map.lookup(ids)
    one_by_one = [id_map.host_of(value) for value in ids.tolist()]
    assert one_by_one == [m if ok else None for m, ok in zip(mapped.tolist(), inside.tolist(), strict=True)]


def test_apply_to_an_index() -> None:
    entries = [file(b"a", uid=1, gid=2), folder(b"d", xattrs=((acl_caps.ACL_NAMES[1], acl_of_user(3, 4)),))]
    mapped = idmap.apply(Index.of(entries, Digest.of(b"")), TO_ROOT)
    assert [(entry.path, entry.uid, entry.gid) for entry in mapped.entries()] == [
        (b"a", 100001, 100002), (b"d", 100000, 100000),
    ]  # fmt: skip
    assert mapped.entry(1).xattrs == ((acl_caps.ACL_NAMES[1], acl_of_user(100003, 100004)),)
    with pytest.raises(UnmappedId, match="b: uid 70000"):
        idmap.apply(Index.of([file(b"a"), file(b"b", uid=70000)], Digest.of(b"")), TO_ROOT)


def test_a_map_is_parsed_and_asked_without_numpy() -> None:
    program = (
        "import sys\n"
        "from layerkit.idmap import IdMap, Mapping\n"
        "from layerkit.hosts.podman.mount_program import parse\n"
        "one = IdMap.parse(['0:100000:65536'])\n"
        "both = Mapping.parse_canonical(str(Mapping(one, one.compose(one.inverse()), 5)))\n"
        "assert (both.host_of('uid', 1), both.fits_kernel) == (100001, False)\n"
        "parse('lowerdir=/a,uidmapping=0:1:10')\n"
        "sys.exit('numpy' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
