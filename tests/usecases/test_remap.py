"""Mapped layers make the mapped tree, whatever the stack; a layer of stubs has every name."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from stacks import indexes, sound_stack

from layerkit.idmap import IdMap, Mapping
from layerkit.idmap import apply as apply_map
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import LossyResult, UnmappedId
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT
from layerkit.model.trees.merge import merge
from layerkit.usecases.remap import map_index, map_layers, stub_layer

EXAMPLES = 30 * int(os.environ.get("LAYERKIT_TEST_FUZZ", "1"))


def shift(*texts: str) -> Mapping:
    ids = IdMap.parse(list(texts), what="map")
    return Mapping(ids, ids)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sound_stack())
def test_mapped_layers_make_the_mapped_tree(layers: list[list[Entry]]) -> None:
    read = indexes(layers)
    mapping = shift("0:100000:65536")
    try:
        mapped, want = map_layers(read, mapping, limits=DEFAULT)
    except LossyResult as error:
        # The one case: the top layer makes a folder of a file, and links to that file by its old name.
        assert any(e.kind is Kind.HARDLINK and e.link == error.path for e in read[-1].entries())
        return
    assert want.digest() == apply_map(merge(read), mapping).digest()
    assert merge(mapped).digest() == want.digest()
    for index in mapped:
        for e in index.entries():
            assert (e.uid >= 100_000) == (e.kind < Kind.WHITEOUT)


def test_acls_and_capabilities_are_mapped_and_an_id_outside_is_named() -> None:
    acl = b"\2\0\0\0" + b"\2\0\5\0" + (1000).to_bytes(4, "little")
    capability = b"\1\0\0\2" + bytes(16)
    index = Index.of(
        [
            Entry(b"f", Kind.REG, uid=1, xattrs=((b"security.capability", capability),)),
            Entry(b"g", Kind.REG, xattrs=((b"system.posix_acl_access", acl),)),
            Entry(b"gone", Kind.WHITEOUT),
        ],
        Digest.of(b""),
    )
    out = {e.path: e for e in map_index(index, shift("0:100000:2000")).entries()}
    assert out[b"f"].uid == 100_001
    assert out[b"f"].xattrs[0][1] == b"\1\0\0\3" + bytes(16) + (100_000).to_bytes(4, "little")
    assert out[b"g"].xattrs[0][1][-4:] == (101_000).to_bytes(4, "little")
    assert out[b"gone"].uid == 0
    with pytest.raises(UnmappedId, match="f: uid 1"):
        map_index(index, shift("0:100000:1"))
    with pytest.raises(UnmappedId, match="g: uid in ACL 1000"):
        map_index(index, shift("0:100000:1000"))


def test_a_layer_of_stubs() -> None:
    sha = b"\1" * 32
    tree = merge([Index.of(
        [
            Entry(b"", Kind.DIR, 0o755),
            Entry(b"a", Kind.REG, 0o644, 5, size=10, offset=512, sha256=sha),
            Entry(b"b", Kind.HARDLINK, link=b"a"),
            Entry(b"empty", Kind.REG, sha256=sha),
        ],
        Digest.of(b""),
    )])  # fmt: skip
    rows = {e.path: e for e in stub_layer(tree).entries()}
    assert rows[b"a"].xattrs == ((b"trusted.overlay.metacopy", b"\0\4\0\0"),)
    assert rows[b"a"].sparse == () and rows[b"a"].size == 10 and rows[b"a"].uid == 5
    assert rows[b"b"].link == b"a" and rows[b"b"].xattrs == ()
    assert rows[b"empty"].xattrs == () and rows[b"empty"].sparse is None
