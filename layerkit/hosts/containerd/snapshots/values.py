"""What the operations of a snapshotter take and give, in containerd's words (its package core/snapshots)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from layerkit.model.errors import SnapshotError

REF_LABEL = "containerd.io/snapshot.ref"
"""On a Prepare for unpacking: the chain_id that the snapshot will have once it is committed."""

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"
_LABEL_BYTES = 4096


class Kind(IntEnum):
    """What a snapshot is; the numbers are those of the service."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3

    @property
    def word(self) -> str:
        """Return the kind as filters spell it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Info:
    """What is known of a snapshot.

    Attributes:
        name: its key, or the name it was committed by. parent: likewise, "" for none.
        kind: what it is.
        created, updated: nanoseconds since 1970.
        labels: as clients set them.
    """

    name: str
    parent: str
    kind: Kind
    created: int
    updated: int
    labels: Mapping[str, str]

    def field(self, path: tuple[str, ...]) -> str | None:
        """Return a field as filters name it, None where it is not present."""
        match path:
            case ("kind",):
                return self.kind.word
            case ("name",):
                return self.name
            case ("parent",):
                return self.parent
            case ("labels", *rest) if rest:
                return self.labels.get(".".join(rest))
        return None


@dataclass(frozen=True, slots=True)
class Mount:
    """A call of mount(2) that containerd is to make; options as in fstab(5)."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot alone takes on disk: bytes and inodes."""

    size: int
    inodes: int


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse a label whose key and value together are above 4096 bytes, as containerd does.

    Raises:
        SnapshotError: invalid_argument.
    """
    for key, value in labels.items():
        if len(key.encode()) + len(value.encode()) > _LABEL_BYTES:
            raise SnapshotError(
                "invalid_argument", f"label {key[:64]!r}: key and value are above {_LABEL_BYTES} bytes"
            )
