"""One metadata layer in each of its renderings, as the kernel shows them: all show the same, and it is the tree."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from needs import missing, need_root, need_tool
from stub_trees import EVERYTHING, shown, wanted
from trees import file, folder, tree_of

from layerkit.formats.erofs.meta import build_meta
from layerkit.formats.meta.fuse_tree import write_tree
from layerkit.formats.meta.tar import write_tar
from layerkit.hosts.mounts.served import served
from layerkit.idmap import Mapping
from layerkit.linux import fuse, mounts
from layerkit.linux.folders.writer import write_directory
from layerkit.linux.syscalls import closing
from layerkit.metaonly import METACOPY_VALUE, Namespace, metadata_layer
from layerkit.model.entry import Entry, Kind
from layerkit.model.tree import Tree

SHOWN = ("directory", "tar", "erofs", "fuse")
FILES = ("tar", "erofs", "fuse")
every = pytest.mark.parametrize("kind", SHOWN)
as_file = pytest.mark.parametrize("kind", FILES)


@pytest.fixture(autouse=True)
def _able(request: pytest.FixtureRequest) -> None:
    need_root()
    need_tool("tar")
    if not Path(fuse.DEVICE).exists():
        missing("needs /dev/fuse")


def written(kind: str, tree: Tree, namespace: Namespace = Namespace.TRUSTED) -> bytes:
    """Return a rendering that is one file."""
    writers: dict[str, Callable[..., object]] = {"tar": write_tar, "erofs": build_meta, "fuse": write_tree}
    out = io.BytesIO()
    writers[kind](metadata_layer(tree, namespace), out)
    return out.getvalue()


@contextmanager
def rendered(kind: str, tree: Tree, folder: Path, namespace: Namespace = Namespace.TRUSTED) -> Iterator[Path]:
    """Give a rendering of ``tree`` as a folder."""
    if kind == "directory":
        write_directory(metadata_layer(tree, namespace), folder / "meta")
        yield folder / "meta"
        return
    data = written(kind, tree, namespace)
    (folder / "file").write_bytes(data)
    if kind == "tar":
        (folder / "meta").mkdir()
        command = ["tar", "-x", "-p", "--xattrs", "--xattrs-include=*", "--numeric-owner"]
        done = subprocess.run(command, input=data, capture_output=True, check=True, cwd=folder / "meta")
        # GNU tar has no use for hdrcharset, and finds 1969 old and 2242 far.
        remarks = (b"'hdrcharset'", b"implausibly old time stamp", b"in the future")
        said = done.stderr.replace(b"\xff\n", b"").splitlines()  # a name with a line break in it
        assert [x for x in said if not any(text in x for text in remarks)] == []
        yield folder / "meta"
    elif kind == "erofs":
        with closing(mounts.erofs(folder / "file")) as fd:
            yield Path(f"/proc/self/fd/{fd}/.")
    else:
        with served(folder / "file", Mapping.identity(), folder / "lock") as fd:
            yield Path(f"/proc/self/fd/{fd}/.")


def value_of_metacopy(kind: str) -> bytes:
    return b"" if kind == "directory" else METACOPY_VALUE


@every
@pytest.mark.parametrize("namespace", Namespace)
def test_every_attribute_of_every_kind(kind: str, namespace: Namespace, tmp_path: Path) -> None:
    tree = tree_of(EVERYTHING)
    with rendered(kind, tree, tmp_path, namespace) as root:
        assert shown(root) == wanted(tree, namespace, metacopy=value_of_metacopy(kind))


@every
def test_folders_of_every_size_and_names_of_any_bytes(kind: str, tmp_path: Path) -> None:
    entries = [folder(b"empty"), file(b"n" * 255 + b"/" + b"m" * 255, b"x"), file(b"caf\xe9/\xff\x01\n", b"x")]
    for size in (1, 2, 50, 700):
        entries += [file(b"%d/%d-%s" % (size, i, b"w" * (i % 200)), b"%d" % i, uid=i) for i in range(size)]
    tree = tree_of(entries)
    with rendered(kind, tree, tmp_path) as root:
        assert shown(root) == wanted(tree, metacopy=value_of_metacopy(kind))
        for path in (b"700", b"empty", b""):
            names = os.listdir(os.path.join(os.fsencode(root), path))
            assert len(names) == len(set(names))


@every
def test_a_tree_that_is_only_a_root(kind: str, tmp_path: Path) -> None:
    tree = tree_of([folder(b"", 0o1751, uid=5, gid=6, mtime=7)])
    with rendered(kind, tree, tmp_path) as root:
        assert shown(root) == wanted(tree)


@every
def test_stubs_take_no_data(kind: str, tmp_path: Path) -> None:
    tree = tree_of([file(b"f", b"x" * (1 << 20)), Entry(b"h", Kind.HARDLINK, link=b"f")])
    with rendered(kind, tree, tmp_path) as root:
        assert (root / "f").lstat().st_size == 1 << 20
        assert (root / "f").lstat().st_ino == (root / "h").lstat().st_ino
    assert sum(path.lstat().st_blocks for path in tmp_path.rglob("*")) < 100


@as_file
def test_the_same_layer_is_the_same_bytes(kind: str) -> None:
    one = written(kind, tree_of(EVERYTHING))
    assert written(kind, tree_of(reversed(EVERYTHING))) == one
    other = [folder(b"", 0o755, uid=1), *EVERYTHING[1:]]
    assert written(kind, tree_of(other)) != one
