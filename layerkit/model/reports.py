"""What the commands answer, as values; ``to_dict`` is their form in ``--json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Report:
    """Base of all answers.

    Fields that have one meaning wherever they are, unless an answer says otherwise: ``name``: what the source calls
    the image. ``manifest``: digest of the manifest, of a new image its own; ``source``: that of the image that it
    was made from. ``map_text``: the id map in canonical form, "" for none. ``layers``: of the image.
    ``layers_read``: blobs that had to be read; 0 when all was in the store. ``data_bytes``: logical bytes of the
    files, hard links counted once. ``data_backend``: where the data is kept, ``tar`` or ``objects``.
    ``meta_bytes``: bytes of metadata that exist for this map alone. ``tree_digest``: of the root filesystem, the
    same before and after. ``compressor``: of the layers that were written: name, version and settings; "" for none.
    ``seconds``: wall time. ``warnings``: what the user must know, or what was odd but harmless.
    """

    FOUND_OUT: ClassVar[tuple[str, ...]] = ()
    """Properties that are told besides the fields."""

    def to_dict(self) -> dict[str, object]:
        """Return the answer as JSON-able values under the names of its fields."""
        return asdict(self) | {name: getattr(self, name) for name in self.FOUND_OUT}


@dataclass(frozen=True, slots=True)
class RemapReport(Report):
    """What a remap or mount made.

    Attributes:
        map_flags: the flags that ask for this map again.
        next_ref: the reference under which the result can be mounted.
        entries: names in the root filesystem.
        rendering: ``erofs``, ``directory`` or ``tar``.
        how: ``idmapped`` (one META for every map), ``own META``, or ``unmapped``.
        shared_meta_bytes: bytes of the META that all maps share.
        artifact: digest of the artifact's manifest, "" where none was made.
    """

    name: str
    manifest: str
    map_text: str
    map_flags: str
    next_ref: str
    entries: int
    layers: int
    layers_read: int
    data_bytes: int
    data_backend: str
    rendering: str
    how: str
    meta_bytes: int
    shared_meta_bytes: int
    seconds: float
    warnings: tuple[str, ...] = ()
    artifact: str = ""


@dataclass(frozen=True, slots=True)
class LayerRow(Report):
    """One layer in an inspection; ``number`` counts from 1, the lowest."""

    number: int
    digest: str
    diff_id: str
    media_type: str
    blob_bytes: int
    tar_bytes: int
    entries: int
    whiteouts: int


@dataclass(frozen=True, slots=True)
class IdRow(Report):
    """An owner in use: its container id, its inodes, and the host id or ``unmapped`` under the map."""

    id: int
    entries: int
    becomes: str


@dataclass(frozen=True, slots=True)
class InspectReport(Report):
    """An image looked into."""

    name: str
    manifest: str
    platform: str
    entries: int
    inodes: int
    data_bytes: int
    tree_digest: str
    layers: tuple[LayerRow, ...]
    kinds: Mapping[str, int]
    uids: tuple[IdRow, ...]
    gids: tuple[IdRow, ...]
    xattrs: Mapping[str, int]
    map_text: str = ""
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VerifyReport(Report):
    """An image read whole and found right."""

    name: str
    manifest: str
    layers: int
    entries: int
    tree_digest: str
    artifacts: tuple[str, ...]
