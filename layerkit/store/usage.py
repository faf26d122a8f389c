"""What a store holds and what it takes: the answers of ``store df`` and ``store ls``."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layerkit.linux.folders.walk import ignore, walk
from layerkit.model.reports import Report
from layerkit.store.catalog import Catalog
from layerkit.store.metas import parse_info
from layerkit.store.objects import stored_objects

_SECTOR_BYTES = 512  # of st_blocks, whatever the filesystem's


@dataclass(frozen=True, slots=True)
class ClassRow(Report):
    """One class of files: how many, the bytes they take on disk, and the bytes they show."""

    what: str
    count: int
    allocated_bytes: int
    apparent_bytes: int


@dataclass(frozen=True, slots=True)
class MetaRow(Report):
    """One META.

    Attributes:
        key: its key.
        images: names (or digests) of the images it belongs to.
        map: canonical text of the id map, "" for owners as they are.
        rendering: ``erofs``, ``directory`` or ``fuse``.
        namespace: ``trusted`` or ``user``.
        entries: names in the tree.
        allocated_bytes: what it takes on disk.
        bytes_per_entry: of those.
        copy_bytes: the data that a full copy under this map would take, 0 if not known.
    """

    key: str
    images: tuple[str, ...]
    map: str
    rendering: str
    namespace: str
    entries: int
    allocated_bytes: int
    bytes_per_entry: float
    copy_bytes: int


@dataclass(frozen=True, slots=True)
class DfReport(Report):
    """What takes how much space; ``saved_bytes``: what a full copy for each META would take more."""

    classes: tuple[ClassRow, ...]
    metas: tuple[MetaRow, ...]
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class LsRow(Report):
    """One image: ``maps`` are canonical texts, "" for owners as they are (and for idmapped mounts)."""

    names: tuple[str, ...]
    manifest: str
    platform: str
    layers: int
    maps: tuple[str, ...]


def df(catalog: Catalog) -> DfReport:
    """Return what takes how much space in the store."""
    layout, metas = catalog.layout, _metas(catalog)
    folders = (("layer tars", "tar"), ("data images", "data"), ("indexes", "index"))
    classes = [_sum(what, _stats(layout.root / folder)) for what, folder in folders]
    classes.append(_sum("objects", (facts for _, facts in stored_objects(layout))))
    classes.append(
        ClassRow("metadata layers", len(metas), sum(m.allocated_bytes for m in metas), _apparent(catalog))
    )
    classes.append(_sum("catalog", [path.stat() for path in layout.root.glob("catalog.db*")]))
    classes.append(_sum("temporary", _files_below(layout.tmp)))
    saved = sum(max(0, m.copy_bytes - m.allocated_bytes) for m in metas)
    return DfReport(tuple(classes), tuple(metas), saved)


def ls(catalog: Catalog) -> list[LsRow]:
    """Return the images, oldest first."""
    maps = {key: parse_info(text, f"META {key}")["map"] for key, text in catalog.metas()}
    of_image: dict[str, set[str]] = {}
    for digest, key in catalog.image_metas():
        of_image.setdefault(digest, set()).add(maps[key])
    return [
        LsRow(
            stored.names,
            str(stored.image.descriptor.digest),
            str(stored.image.platform),
            len(stored.image.layers),
            tuple(sorted(of_image.get(str(stored.image.descriptor.digest), ()))),
        )
        for stored in catalog.images()
    ]


def _metas(catalog: Catalog) -> list[MetaRow]:
    names = catalog.names_of()
    images: dict[str, list[str]] = {}
    for digest, key in catalog.image_metas():
        images.setdefault(key, []).extend(names.get(digest, [digest]))
    data = _data_bytes(catalog)
    rows = []
    for key, text in catalog.metas():
        info = parse_info(text, f"META {key}")
        entries, allocated = int(info["names"]), int(info["allocated_bytes"])
        rows.append(
            MetaRow(
                key=key,
                images=tuple(sorted(images.get(key, ()))),
                map=str(info["map"]),
                rendering=str(info["rendering"]),
                namespace=str(info["namespace"]),
                entries=entries,
                allocated_bytes=allocated,
                bytes_per_entry=allocated / entries if entries else 0.0,
                copy_bytes=data.get(str(info["tree"]), 0),
            )
        )
    return rows


def _data_bytes(catalog: Catalog) -> dict[str, int]:
    """Return, by tree digest, the bytes of data in the trees that facts are kept of."""
    found = {}
    for _, text in catalog.all_tree_facts():
        try:
            facts = json.loads(text)
            found[str(facts["tree"])] = int(facts["data_bytes"])
        except (ValueError, TypeError, KeyError):
            continue  # facts of another version
    return found


def _apparent(catalog: Catalog) -> int:
    infos = (parse_info(text, f"META {key}") for key, text in catalog.metas())
    return sum(int(size) for info in infos for _, size in info["files"].values())


def _stats(folder: Path) -> Iterable[os.stat_result]:
    with os.scandir(folder) as entries:
        return [entry.stat(follow_symlinks=False) for entry in entries]


def _files_below(top: Path) -> Iterable[os.stat_result]:
    names = (facts for folder in walk(top, on_error=ignore) for _, facts in folder.names)
    return (facts for facts in names if not stat.S_ISDIR(facts.st_mode))


def _sum(what: str, stats: Iterable[os.stat_result]) -> ClassRow:
    count = allocated = apparent = 0
    for facts in stats:
        count += 1
        allocated += facts.st_blocks * _SECTOR_BYTES
        apparent += facts.st_size
    return ClassRow(what, count, allocated, apparent)
