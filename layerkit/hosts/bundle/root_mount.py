"""TODO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.model.errors import UnsupportedHost, UsageError

if TYPE_CHECKING:
    from layerkit.hosts.bundle.folder import Bundle
    from layerkit.hosts.mounts.records import Record


def _root_mount(made: Bundle, record: Record) -> dict[str, object]:
    """Return the mount that makes the root filesystem in the container's own namespaces."""
    from layerkit.store.layout import Layout

    layout = Layout(Path(made.store))
    meta = layout.meta(record.label["meta"]) / "root"
    if not meta.is_dir() or record.label["backend"] != "objects":
        raise UnsupportedHost(
            "a rootless bundle over EROFS or FUSE", "leave out --data and --rendering: it takes folders and objects"
        )
    options = [
        f"lowerdir={_escaped(meta)}::{_escaped(layout.objects)}",
        f"upperdir={_escaped(made.upper)}",
        f"workdir={_escaped(made.work)}",
        "userxattr",
    ]
    length = sum(len(os.fsencode(option)) + 1 for option in options)
    if length >= os.sysconf("SC_PAGE_SIZE"):
        raise UsageError(f"{length} bytes of mount options; give the store and the bundle shorter paths")
    from layerkit.hosts.mounts.records import SOURCE_PREFIX

    return {"destination": "/", "type": "overlay", "source": SOURCE_PREFIX + made.id, "options": options}


def _escaped(path: Path) -> str:
    # overlayfs.rst: colons divide layers, commas divide options.
    text = str(path)
    for character in ("\\", ":", ","):
        text = text.replace(character, "\\" + character)
    return text
