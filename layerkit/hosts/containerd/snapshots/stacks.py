"""How a chain of snapshots becomes the lower layers of an overlay.

Three kinds of layers meet here: folders that containerd unpacked, chains that lie in layerkit's store (META over
data), and what was committed from a snapshot with mapped owners, which is a folder of host ids over mapped layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from collections.abc import Mapping as Labels
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.containerd.snapshots.catalog import Row
from layerkit.idmap import IdMap, Mapping
from layerkit.model.digest import Digest
from layerkit.model.errors import SnapshotError, UsageError

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"
FILES = "+f"
"""The folder of a snapshot's files, in ``snapshots/ID``.

Redirects into such a folder start with this name, which images do not have at their top, so overlayfs finds no
beginning of one in META: with ``metacopy=on`` it looks there first, and a folder of that name would be EIO. No
colon in it: containerd itself puts the upper among the lower layers where it mounts a snapshot to make a diff.
"""
WORK = "work"


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers under a snapshot.

    Attributes:
        above: ids of snapshots whose folders are mounted as they are, top first.
        below: ids of snapshots whose folders are mounted with mapped owners, top first; none without ``map``.
        chain: diff_ids, bottom first, of what lies in layerkit's store beneath them.
        chain_id: of ``chain``. image: the stored image that keeps it.
        map: canonical id map of ``below`` and ``chain``, or "".
    """

    above: tuple[int, ...] = ()
    below: tuple[int, ...] = ()
    chain: tuple[str, ...] = ()
    chain_id: str = ""
    image: str = ""
    map: str = ""

    @property
    def diff_ids(self) -> list[Digest]:
        """Return the chain as digests."""
        return list(map(Digest.parse, self.chain))


def stack_of(lineage: Iterable[Row], map_text: str) -> Stack:
    """Return the layers for a snapshot over ``lineage`` (its parent first) with the map that it asks for.

    Raises:
        SnapshotError: invalid_argument, the parent was made under another map.
    """
    rows = list(lineage)
    for row in rows:
        if row.map and map_text and row.map != map_text:
            raise SnapshotError(
                "invalid_argument",
                f"its parent {row.key!r} was made under the id map {row.map}, so it cannot be mapped by {map_text}",
            )
        map_text = map_text or row.map
    above, below = list[int](), list[int]()
    for row in rows:
        if row.chain:
            return Stack(tuple(above), tuple(below), row.chain, row.ref, row.image, map_text)
        (above if row.map or not map_text else below).append(row.id)
    return Stack(tuple(above), tuple(below), map=map_text)


def mapping_of(labels: Labels[str, str]) -> Mapping | None:
    """Return the id map that labels ask for, None for none.

    The values are ``container:host:count``, several separated by commas (one from containerd before 2.3).

    Raises:
        SnapshotError: invalid_argument.
    """
    texts = {name: labels.get(name, "") for name in (UID_LABEL, GID_LABEL)}
    if not any(texts.values()):
        return None
    if not all(texts.values()):
        raise SnapshotError("invalid_argument", f"of {UID_LABEL} and {GID_LABEL} one is missing: give both")
    try:
        uid, gid = (IdMap.parse([text], what=f"label {name}") for name, text in texts.items())
    except UsageError as error:
        raise SnapshotError("invalid_argument", str(error)) from error
    return Mapping(uid, gid)


@dataclass(frozen=True, slots=True)
class Mount:
    """A call of mount(2) that containerd is to make; options as in fstab(5)."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lowers:
    """The lower layers of an overlay, by paths that are mounted now.

    Attributes:
        normal: top first. data: the data-only ones.
        metacopy: copy up only metadata on chmod and chown; needs layers in which stubs may point at data.
    """

    normal: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    metacopy: bool = False


def mounts_of(folder: Path, lowers: Lowers, *, writable: bool) -> list[Mount]:
    """Return how to mount the snapshot whose folder is ``folder``: an active one ``writable``, a view not.

    Raises:
        SnapshotError: failed_precondition, more layers than a mount can name.
    """
    files = os.fspath(folder / FILES)
    if not lowers.normal or (not writable and len(lowers.normal) == 1 and not lowers.data):
        source = os.path.realpath(lowers.normal[0]) if lowers.normal else files
        return [Mount("bind", source, ("rw" if writable else "ro", "rbind"))]
    # Without an upper an absolute redirect needs no metacopy, and must not walk META first.
    metacopy = lowers.metacopy and (writable or len(lowers.normal) > 1)
    # Each is said, because a host may have set another default for all overlays.
    said = {"index": "off", "nfs_export": "off", "metacopy": "on" if metacopy else "off"}
    if not metacopy:
        # A layer that is committed must hold its files whole, and folders under their own names.
        said["redirect_dir"] = "off"
    upper, work = (files, os.fspath(folder / WORK)) if writable else ("", "")
    options = OverlayOptions(lowers.normal, lowers.data, upper, work, tuple(said.items()))
    # containerd makes long lists of plain layers shorter itself; it cannot with data-only ones.
    if options.data and not options.fits:
        raise SnapshotError(
            "failed_precondition",
            f"its mount options take {options.size} bytes and mount(2) takes {PAGESIZE}: merge some of the image's "
            "layers (`layerkit flatten`), or choose a shorter --root and --run",
        )
    return [Mount("overlay", "overlay", options.texts)]
