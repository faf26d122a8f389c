"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.formats.overlay_options import OverlayOptions
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
    options = OverlayOptions(
        (str(meta),), (str(layout.objects),), str(made.upper), str(made.work), (("userxattr", None),)
    )
    if not options.fits:
        raise UsageError(f"{options.size} bytes of mount options; give the store and the bundle shorter paths")
    from layerkit.hosts.mounts.records import SOURCE_PREFIX

    source = SOURCE_PREFIX + made.id
    return {"destination": "/", "type": "overlay", "source": source, "options": list(options.texts)}
