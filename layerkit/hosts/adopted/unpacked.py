"""An image as a runtime has unpacked it: its layers as folders, and how references to such images begin."""

from __future__ import annotations

from dataclasses import dataclass

from layerkit.linux.folders.reader import LayerFolder

SCHEMES = ("containers-storage", "containerd", "docker-storage", "folders")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An image as a runtime has it unpacked.

    Attributes:
        name: as the runtime calls it.
        runtime: one of :data:`SCHEMES`.
        folders: its layers, bottom first.
        digest: of its manifest or config, "" for plain folders.
        diff_ids: of the layers' tars, "" where the runtime does not say; as many as folders.
        blobs: digests of the layers' blobs, likewise.
    """

    name: str
    runtime: str
    folders: tuple[LayerFolder, ...]
    digest: str = ""
    diff_ids: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()


def is_unpacked_reference(text: str) -> bool:
    """Return whether ``text`` names layers that a runtime unpacked."""
    return text.partition(":")[0] in SCHEMES and ":" in text
