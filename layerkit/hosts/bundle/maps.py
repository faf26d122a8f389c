"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerkit.formats.runtime import config as rc
from layerkit.model.errors import UnmappedId, UnsupportedHost, UsageError

if TYPE_CHECKING:
    from layerkit.idmap import Mapping


def _root_of(mapping: Mapping | None, rootless: bool) -> tuple[int, int]:
    """Return the host ids of the container's root; refuse maps that no container can run under."""
    from layerkit.linux import userns

    if rootless and userns.in_initial_userns():
        raise UsageError("--rootless is for an ordinary user; root of the host leaves it out")
    if mapping is None:
        return 0, 0
    if not mapping.fits_kernel:
        raise UsageError("a user namespace takes neither --squash nor --overflow-id, and at most 340 ranges")
    uid, gid = mapping.uid.host_of(0), mapping.gid.host_of(0)
    if uid is None or gid is None:
        kind, one = ("uid", mapping.uid) if uid is None else ("gid", mapping.gid)
        raise UsageError(f"the {kind} map {one} leaves out 0, so the container would have no root")
    if rootless and (uid, gid) != (0, 0):
        # runc gives the container's root its pipes and its fifo, and the store is closed to every other id.
        raise UnsupportedHost(
            f"a rootless container whose root is not yourself ({mapping.uid})",
            "give 0 to 0, as in --uid-map 0:0:1,1:1000:60000; or, for any map, run both layerkit and the runtime "
            "in `podman unshare` or `unshare --map-root-user --map-auto --mount`, without --rootless",
        )
    return uid, gid


def _check_mapped(mapping: Mapping | None, uid: int, gids: Sequence[int]) -> None:
    if mapping is None:
        return
    for kind, ids in (("uid", (uid,)), ("gid", gids)):
        for wanted in ids:
            if mapping.of(kind).host_of(wanted) is None:
                raise UnmappedId(b"the container's process", kind, wanted, str(mapping.of(kind)))


def _namespace_maps(mapping: Mapping | None, rootless: bool) -> tuple[rc.Extents, rc.Extents]:
    """Return the maps of the container's namespace as the runtime will see them."""
    if not rootless:
        return (mapping.uid.extents, mapping.gid.extents) if mapping else ((), ())
    from layerkit.linux.rootless import outer_maps

    uid, gid = outer_maps()
    if mapping is None:
        return uid.extents, gid.extents
    return mapping.uid.compose(uid).extents, mapping.gid.compose(gid).extents
