"""containerd's filter syntax; cases of its own tests (pkg/filters/filter_test.go) among them, in our words."""

from __future__ import annotations

import re

import pytest

from layerkit.hosts.containerd.snapshots.catalog import Kind, Row
from layerkit.hosts.containerd.snapshots.filters import matcher
from layerkit.hosts.containerd.snapshots.layers import Stack, mapping_of, stack_of
from layerkit.model.digest import Digest
from layerkit.model.errors import SnapshotError
from layerkit.model.image import chain_ids


def info(name: str = "n", **labels: str) -> Row:
    labels = {key.replace("__", "/"): value for key, value in labels.items()}
    return Row(name, 1, Kind.ACTIVE, labels, parent_key="p")


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("name==n", True),
        ('name=="n"', True),
        (" name == n ", True),
        ("name!=n", False),
        ("kind==active,name==n", True),
        ("kind==active,name==m", False),
        ("nothing", False),
        ("nothing.at.all", False),
        ("nothing!=x", True),
        ("nothing==x", False),
        ("name.deeper", False),
        ("labels", False),
        ("labels.a", True),
        ('labels."a"', True),
        ("labels.b", False),
        ("labels.a==1", True),
        ("labels.dotted.key==2", True),
        ('labels."dotted.key"==2', True),
        ('labels."x/y"=="two words"', True),
        ('labels."x/y"~="^two"', True),
        ('labels."x/y"~=/two\\swords/', True),
        ('labels."x/y"~=|/w|', False),
        ('name~="^[m-o]$"', True),
        ('labels.quoted=="\\"\\x41\\u00e9"', True),
        ("labels.digest==sha256:ab-c_d", True),
        ("name==n==m", False),
    ],
)
def test_filters(text: str, matches: bool) -> None:
    labels = {"a": "1", "dotted.key": "2", "x/y": "two words", "quoted": '"Aé', "digest": "sha256:ab-c_d"}
    one = Row("n", 1, Kind.ACTIVE, labels, parent_key="p")
    assert matcher([text])(one.field) is matches


def test_any_of_several() -> None:
    assert matcher([])(info().field)
    assert matcher(["name==x", "name==n"])(info().field)
    assert not matcher(["name==x", "name==y"])(info().field)


@pytest.mark.parametrize(
    "text",
    ["=", "name=", "name=n", "name==", "name==n,", ",", "name==n n", 'name=="n', "name==/n/", "name~=[", "labels.",
     'name=="\\q"', "name===n", "-x", 'name~="' + "a" * 5000 + '"'],
)  # fmt: skip
def test_refusals(text: str) -> None:
    with pytest.raises(SnapshotError, match=re.escape("filter ")) as found:
        matcher([text])
    assert found.value.status == "invalid_argument"


def test_chain_ids() -> None:
    """The example of the image-spec's rule: ChainID(A|B) = Digest(ChainID(A) + " " + B)."""
    a, b = Digest.of(b"a"), Digest.of(b"b")
    assert chain_ids([]) == []
    assert chain_ids([a, b]) == [str(a), str(Digest.of(f"{a} {b}".encode()))]


def test_labels_and_stacks() -> None:
    assert mapping_of({}) is None
    found = mapping_of({
        "containerd.io/snapshot/uidmapping": "0:10:5,5:100:1", "containerd.io/snapshot/gidmapping": "0:7:9",
    })  # fmt: skip
    assert found is not None and found.canonical() == "uid=0:10:5,5:100:1;gid=0:7:9"
    assert stack_of([], "") == Stack()
