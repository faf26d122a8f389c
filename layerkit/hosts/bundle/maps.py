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
    found = []
    for kind, one in (("uid", mapping.uid), ("gid", mapping.gid)):
        root = [h - c for c, h, n in one.extents if c == 0]
        if not root:
            raise UsageError(f"the {kind} map {one} leaves out 0, so the container would have no root")
        found.append(root[0])
    if rootless and found != [0, 0]:
        # runc gives the container's root its pipes and its fifo, and the store is closed to every other id.
        raise UnsupportedHost(
            f"a rootless container whose root is not yourself ({mapping.uid})",
            "give 0 to 0, as in --uid-map 0:0:1,1:1000:60000; or, for any map, run both layerkit and the runtime "
            "in `podman unshare` or `unshare --map-root-user --map-auto --mount`, without --rootless",
        )
    return found[0], found[1]


def _check_mapped(mapping: Mapping | None, uid: int, gids: Sequence[int]) -> None:
    if mapping is None:
        return
    for kind, ids, one in (("uid", (uid,), mapping.uid), ("gid", gids, mapping.gid)):
        for wanted in ids:
            if not any(c <= wanted < c + n for c, _, n in one.extents):
                raise UnmappedId(b"the container's process", kind, wanted, str(one))


def _namespace_maps(mapping: Mapping | None, rootless: bool) -> tuple[rc.Extents, rc.Extents]:
    """Return the maps of the container's namespace as the runtime will see them."""
    if not rootless:
        return (mapping.uid.extents, mapping.gid.extents) if mapping else ((), ())
    from layerkit.idmap import IdMap
    from layerkit.linux.rootless import outer_maps

    outer = [IdMap.of(extents, what="the user namespace's map") for extents in outer_maps()]
    if mapping is None:
        return outer[0].extents, outer[1].extents
    return mapping.uid.compose(outer[0]).extents, mapping.gid.compose(outer[1]).extents
