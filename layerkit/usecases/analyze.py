"""Where the bytes of an image go: what each layer adds, repeats for a change of metadata, and hides. PURE.

The unit is the *stored* bytes of regular files in uncompressed layers, holes left out. Each stored file of
each layer falls into one class, so that the classes add up:

* **duplicated**: the next lower layer with this path holds the same content (the metadata changed), or a
  lower layer holds it under a path that is hidden in the end (it was moved);
* **hidden**: no duplicate, but neither it nor a duplicate of it is in the root filesystem in the end;
* **new**: all others. Their sum is what the image needs.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from layerkit.model.digest import Digest
from layerkit.model.entry import Kind
from layerkit.model.errors import show_path
from layerkit.model.image import Image
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.reports import Report
from layerkit.model.trees.merge import merge
from layerkit.usecases.waste import stored_bytes

MOVED, IDENTICAL = "moved", "identical"
"""Causes of a duplicate besides ``owner``, ``mode``, ``times``, ``xattr`` and their sums (``owner+mode``)."""


@dataclass(frozen=True, slots=True)
class LayerUse(Report):
    """What one layer holds, in stored bytes of regular files unless said otherwise.

    Attributes:
        number: of the layer, from 1, the lowest. digest: of the blob. diff_id: of the tar.
        history: the step that made it, "" where unknown.
        blob_bytes: of the blob. tar_bytes: of the tar. entries: its rows.
        file_bytes: ``new_bytes + duplicated_bytes + hidden_bytes``.
        new_bytes: what the image needs of this layer.
        duplicated_bytes: what a lower layer holds too, by cause in ``causes``.
        hidden_bytes: what later layers delete or replace.
        whiteouts: whiteouts and opaque markers. idle_whiteouts: those that hide nothing.
    """

    number: int
    digest: str
    diff_id: str
    history: str
    blob_bytes: int
    tar_bytes: int
    entries: int
    file_bytes: int
    new_bytes: int
    duplicated_bytes: int
    causes: dict[str, int]
    hidden_bytes: int
    whiteouts: int
    idle_whiteouts: int


@dataclass(frozen=True, slots=True)
class PathUse(Report):
    """Wasted bytes at one path, as printable text, in ``layers`` (from 1); ``causes`` may hold ``hidden``."""

    path: str
    bytes: int
    causes: dict[str, int]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnalyzeReport(Report):
    """One image looked through.

    Attributes:
        file_bytes: of all layers. wasted_bytes: duplicated and hidden ones.
        efficiency_percent: what of ``file_bytes`` is needed; 100 for an image without files.
        paths: every path that wastes bytes, the worst first.
    """

    name: str
    manifest: str
    platform: str
    blob_bytes: int
    file_bytes: int
    duplicated_bytes: int
    hidden_bytes: int
    wasted_bytes: int
    efficiency_percent: float
    causes: dict[str, int]
    layers: tuple[LayerUse, ...]
    paths: tuple[PathUse, ...]


@dataclass(frozen=True, slots=True)
class SharingReport(Report):
    """What several images have in common, in stored bytes of regular files.

    Attributes:
        file_bytes: all layers of all images, each counted as often as it is used.
        same_layer_bytes: what equal layers share already.
        same_file_bytes: what equal files in different layers could share besides.
        distinct_bytes: the rest: every content once.
        pairs: per pair of images (their places) the bytes of contents that both hold.
    """

    images: tuple[str, ...]
    file_bytes: int
    same_layer_bytes: int
    same_file_bytes: int
    distinct_bytes: int
    pairs: tuple[tuple[int, int, int], ...] = field(default=())


@dataclass(slots=True)
class _File:
    """A stored file of a layer, and the class it falls into."""

    layer: int
    row: int
    path: bytes
    content: bytes
    size: int
    cause: str = ""
    repeated: bool = False
    shown: bool = False


def analyze(
    name: str, image: Image, indexes: Sequence[Index], history: Sequence[str] = (), *, limits: Limits = DEFAULT
) -> AnalyzeReport:
    """Return where the bytes of ``image`` go, from the ``indexes`` of its layers alone.

    ``history`` says what made each layer, as text; it may be shorter.

    Raises:
        UnsafeEntry: the layers cannot be merged.
    """
    files = _classify(indexes, limits)
    idle = _idle_whiteouts(indexes)
    of_layer: list[list[_File]] = [[] for _ in indexes]
    for file in files:
        of_layer[file.layer].append(file)
    layers = []
    for place, (index, own) in enumerate(zip(indexes, of_layer, strict=True)):
        duplicated = sum(f.size for f in own if f.cause)
        hidden = sum(f.size for f in own if not f.cause and not f.shown)
        total = sum(f.size for f in own)
        layers.append(LayerUse(
            number=place + 1,
            digest=str(image.layers[place].descriptor.digest),
            diff_id=str(index.diff_id),
            history=history[place] if place < len(history) else "",
            blob_bytes=image.layers[place].descriptor.size,
            tar_bytes=index.tar_size,
            entries=len(index),
            file_bytes=total,
            new_bytes=total - duplicated - hidden,
            duplicated_bytes=duplicated,
            causes=_by_cause(f for f in own if f.cause),
            hidden_bytes=hidden,
            whiteouts=int((index.kind >= Kind.WHITEOUT).sum()),
            idle_whiteouts=idle[place],
        ))  # fmt: skip
    total = sum(layer.file_bytes for layer in layers)
    duplicated = sum(layer.duplicated_bytes for layer in layers)
    hidden = sum(layer.hidden_bytes for layer in layers)
    return AnalyzeReport(
        name=name,
        manifest=str(image.descriptor.digest),
        platform=str(image.platform),
        blob_bytes=sum(layer.blob_bytes for layer in layers),
        file_bytes=total,
        duplicated_bytes=duplicated,
        hidden_bytes=hidden,
        wasted_bytes=duplicated + hidden,
        efficiency_percent=round(100 * (total - duplicated - hidden) / total, 2) if total else 100.0,
        causes=_by_cause(f for f in files if f.cause),
        layers=tuple(layers),
        paths=tuple(_worst(files)),
    )


def layer_history(config: bytes, layers: int) -> list[str]:
    """Return what made each layer by the image's ``config``; nothing where that does not tell.

    Image-spec, config.md: an entry of ``history`` with ``empty_layer`` has no layer, each other one has the next.
    """
    found = json.loads(config).get("history")
    steps = [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []
    made = [str(s.get("created_by") or s.get("comment") or "") for s in steps if not s.get("empty_layer")]
    return made if len(made) == layers else []


def _classify(indexes: Sequence[Index], limits: Limits) -> list[_File]:
    """Return every stored file of every layer with its class, bottom layer first."""
    tree = merge(indexes, limits=limits)
    # A file's place in its tar is its identity: two names of one inode share it, two files never do.
    shown = set(zip(tree.layer.tolist(), tree.offset.tolist(), strict=True))
    files: list[_File] = []
    last: dict[bytes, _File] = {}
    spare: dict[bytes, list[_File]] = defaultdict(list)
    before: dict[int, _File] = {}
    for place, index in enumerate(indexes):
        stored = stored_bytes(index)
        names, offsets = index.path, index.offset.tolist()
        fresh = []
        for row in np.flatnonzero(stored > 0).tolist():
            file = _File(
                place, row, names[row], index.sha256[row].tobytes() + int(index.size[row]).to_bytes(8, "little"),
                int(stored[row]), shown=(place, offsets[row]) in shown,
            )  # fmt: skip
            fresh.append(file)
            lower = last.get(file.path)
            if lower is not None and lower.content == file.content:
                file.cause = _cause(indexes[lower.layer], lower.row, index, row)
                lower.repeated = True
                before[id(file)] = lower
        for file in fresh:
            if not file.cause:
                found = next(
                    (f for f in spare.get(file.content, ()) if not f.repeated and not f.shown and f is not file),
                    None,
                )
                if found is not None:
                    file.cause, found.repeated = MOVED, True
                    before[id(file)] = found
        for file in fresh:
            last[file.path] = file
            spare[file.content].append(file)
        files += fresh
    for file in reversed(files):
        # What a shown file repeats is needed, in its place: the lowest one of a chain counts as new.
        if file.shown and id(file) in before:
            before[id(file)].shown = True
    return files


def _cause(low: Index, low_row: int, high: Index, row: int) -> str:
    """Return what differs between two rows of equal content."""
    parts = {
        "owner": low.uid[low_row] != high.uid[row] or low.gid[low_row] != high.gid[row],
        "mode": low.perm[low_row] != high.perm[row],
        "xattr": low.xattr_sets[int(low.xattr[low_row])] != high.xattr_sets[int(high.xattr[row])],
        "times": low.mtime[low_row] != high.mtime[row] or low.mtime_ns[low_row] != high.mtime_ns[row],
    }
    return "+".join(name for name, differs in parts.items() if differs) or IDENTICAL


def _by_cause(files: Iterable[_File]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for file in files:
        sums[file.cause] += file.size
    return dict(sums.most_common())


def _worst(files: Iterable[_File]) -> Iterator[PathUse]:
    causes: dict[bytes, Counter[str]] = defaultdict(Counter)
    layers: dict[bytes, set[int]] = defaultdict(set)
    for file in files:
        if file.cause or not file.shown:
            causes[file.path][file.cause or "hidden"] += file.size
            layers[file.path].add(file.layer + 1)
    for path in sorted(causes, key=lambda p: (-causes[p].total(), p)):
        yield PathUse(show_path(path), causes[path].total(), dict(causes[path]), tuple(sorted(layers[path])))


def _idle_whiteouts(indexes: Sequence[Index]) -> list[int]:
    """Return for each layer how many of its markers stand where no lower layer has an entry to hide."""
    held: set[bytes] = set()
    counts = []
    for index in indexes:
        idle = 0
        for row in np.flatnonzero(index.kind >= Kind.WHITEOUT).tolist():
            # The mark of a folder that holds something stands for all that lies beneath it.
            what = index.path[row]
            beneath = (what + b"/") if what else b"/"
            idle += beneath not in held and not (index.kind[row] == Kind.WHITEOUT and what in held)
        counts.append(idle)
        for row in np.flatnonzero(index.kind <= Kind.HARDLINK).tolist():
            path = index.path[row]
            held.add(path)
            while path:
                path = path.rpartition(b"/")[0]
                mark = (path + b"/") if path else b"/"
                if mark in held:
                    break
                held.add(mark)
    return counts


def sharing(images: Sequence[tuple[str, Sequence[Index]]]) -> SharingReport:
    """Return what ``images`` (name and indexes, bottom first) share by layers, and could share by files."""
    total = 0
    by_layer: dict[Digest, int] = {}
    contents: list[dict[bytes, int]] = []
    once: dict[bytes, int] = {}
    for _, indexes in images:
        own: dict[bytes, int] = {}
        for index in indexes:
            stored = stored_bytes(index)
            size = int(stored.sum())
            total += size
            by_layer[index.diff_id] = size
            for row in np.flatnonzero(stored > 0).tolist():
                own[index.sha256[row].tobytes()] = int(stored[row])
        contents.append(own)
        once |= own
    layers, distinct = sum(by_layer.values()), sum(once.values())
    pairs = [
        (a, b, sum(size for key, size in contents[a].items() if key in contents[b]))
        for a in range(len(images))
        for b in range(a + 1, len(images))
    ]
    return SharingReport(
        images=tuple(name for name, _ in images),
        file_bytes=total,
        same_layer_bytes=total - layers,
        same_file_bytes=layers - distinct,
        distinct_bytes=distinct,
        pairs=tuple(pairs),
    )
