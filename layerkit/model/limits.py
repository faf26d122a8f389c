"""Every bound on input, with its unit in its name.

Images come from strangers. Each bound is far above what real images hold (the largest public ones have
some 2 million entries and 100 GB of data) and low enough that a bomb ends early with one clear error.
``LAYERKIT_LIMIT_<NAME>``, or the table ``[limits]`` of config.toml, raises or lowers one.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerkit.model.errors import LimitExceeded


@dataclass(frozen=True, slots=True)
class Limits:
    """One set of bounds; frozen, so that a run has the same ones from start to end."""

    manifest_bytes: int = 8 << 20
    config_bytes: int = 32 << 20
    json_depth: int = 64
    index_depth: int = 8
    manifests_per_index: int = 10_000
    layers_per_image: int = 500
    archive_members: int = 100_000
    layer_blob_bytes: int = 256 << 30
    layer_tar_bytes: int = 1 << 40
    # Real layers compress by 3 to 20; zeros in gzip by 1030. Only layers above `bomb_floor_bytes` count.
    compression_ratio: int = 400
    bomb_floor_bytes: int = 1 << 30
    entries_per_layer: int = 20_000_000
    entries_per_image: int = 50_000_000
    # A layer made of headers only is a memory bomb; this bounds names, links and xattrs together.
    metadata_bytes_per_layer: int = 8 << 30
    path_bytes: int = 4095
    name_bytes: int = 255
    link_target_bytes: int = 4095
    path_depth: int = 2048
    pax_header_bytes: int = 8 << 20
    xattr_name_bytes: int = 255
    xattr_value_bytes: int = 65536
    xattrs_per_entry: int = 1024
    sparse_extents_per_file: int = 1_000_000
    # The sha256 of a sparse file covers its holes, so a lying size would cost hours of hashing zeros.
    sparse_hole_bytes_per_layer: int = 16 << 30
    file_bytes: int = 1 << 44
    warnings_kept_per_layer: int = 100
    id_map_extents: int = 340

    def check(self, limit: str, found: int, where: str) -> None:
        """Raise :class:`LimitExceeded` if ``found`` is above the bound called ``limit``."""
        allowed: int = getattr(self, limit)
        if found > allowed:
            raise LimitExceeded(limit, found, allowed, where)


DEFAULT = Limits()
