"""From an index entry to an image: nested indexes, the choice by platform, manifest and config checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import platforms
from layerkit.formats.oci.documents import (
    CONFIG,
    DOCKER_CONFIG,
    DOCKER_SCHEMA1,
    INDEX_TYPES,
    MANIFEST_TYPES,
    is_image,
    parse_config,
    parse_index,
    parse_manifest,
    verify,
)
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import (
    InvalidImage,
    NotFound,
)
from layerkit.model.image import Image, Layer
from layerkit.model.limits import DEFAULT, Limits

if TYPE_CHECKING:
    pass

Fetch = Callable[[Descriptor, int], bytes]
"""Called as (descriptor, most bytes allowed); returns the blob, NOT verified."""


def fetch_manifest(fetch: Fetch, entry: Descriptor, where: str, limits: Limits) -> bytes:
    """Return the verified manifest or index that ``entry`` points at."""
    what = f"{where}: manifest {entry.digest}"
    limits.check("manifest_bytes", entry.size, what)
    return verify(fetch(entry, limits.manifest_bytes), entry, what)


def build_image(
    name: str, manifest: bytes, entry: Descriptor, fetch: Fetch, where: str, *, limits: Limits = DEFAULT
) -> Image:
    """Return the image whose manifest is ``manifest`` (verified already), with its config read and checked.

    Raises:
        InvalidImage: an artifact, no config of an image, layers and diff_ids that differ in number.
    """
    what = f"{where}: manifest {entry.digest}"
    if entry.media_type in DOCKER_SCHEMA1:
        parse_manifest(b'{"schemaVersion":1}', what)
    parsed = parse_manifest(manifest, what, media_type=entry.media_type, limits=limits)
    if parsed.media_type != entry.media_type:
        raise InvalidImage(f"{what}: mediaType: found {parsed.media_type!r}, announced as {entry.media_type!r}")
    if parsed.config.media_type not in (CONFIG, DOCKER_CONFIG):
        kind = parsed.artifact_type or parsed.config.media_type
        raise InvalidImage(f"{what}: this is an artifact ({kind}), not an image with a root filesystem")
    config_what = f"{where}: config {parsed.config.digest}"
    limits.check("config_bytes", parsed.config.size, config_what)
    data = verify(fetch(parsed.config, limits.config_bytes), parsed.config, config_what)
    config = parse_config(data, config_what, limits=limits)
    if len(config.diff_ids) != len(parsed.layers):
        raise InvalidImage(
            f"{what}: {len(parsed.layers)} layers, but its config {parsed.config.digest} lists "
            f"{len(config.diff_ids)} rootfs.diff_ids; they must be as many"
        )
    for layer in parsed.layers:
        limits.check("layer_blob_bytes", layer.size, f"{what}: layer {layer.digest}")
    return Image(
        name=name,
        manifest=manifest,
        descriptor=replace(entry, platform=entry.platform or config.platform),
        config=data,
        config_descriptor=parsed.config,
        layers=tuple(Layer(*pair) for pair in zip(parsed.layers, config.diff_ids, strict=True)),
        platform=config.platform,
    )


def _leaves(
    fetch: Fetch,
    entries: Sequence[Descriptor],
    where: str,
    limits: Limits,
    visited: set[Digest],
    above: tuple[Digest, ...] = (),
) -> Iterator[Descriptor]:
    """Yield the image manifests that ``entries`` lead to through nested indexes, each index read once."""
    for entry in entries:
        if entry.digest in above:
            raise InvalidImage(f"{where}: index {entry.digest} contains itself")
        if not is_image(entry):
            continue
        if entry.media_type in MANIFEST_TYPES:
            yield entry
            continue
        if entry.digest in visited:  # else a few small indexes could spell out billions of entries
            continue
        visited.add(entry.digest)
        what = f"{where}: index {entry.digest}"
        limits.check("index_depth", len(above) + 1, f"{what}: nesting of indexes")
        data = fetch_manifest(fetch, entry, where, limits)
        inner = parse_index(data, what, media_type=entry.media_type, limits=limits)
        yield from _leaves(fetch, inner.manifests, where, limits, visited, (*above, entry.digest))


def every(
    fetch: Fetch, entries: Sequence[Descriptor], name: str, where: str, *, limits: Limits = DEFAULT
) -> list[Image]:
    """Return the images of all platforms among ``entries`` and the indexes they lead to, each once.

    Raises:
        InvalidImage: as for :func:`select`.
    """
    seen: dict[Digest, Descriptor] = {}
    for leaf in _leaves(fetch, entries, where, limits, set()):
        seen.setdefault(leaf.digest, leaf)
        limits.check("manifests_per_index", len(seen), f"{where}: manifests in nested indexes")
    return [
        build_image(name, fetch_manifest(fetch, entry, where, limits), entry, fetch, where, limits=limits)
        for entry in seen.values()
    ]


def select(
    fetch: Fetch,
    entries: Sequence[Descriptor],
    name: str,
    where: str,
    platform: Platform | None,
    *,
    limits: Limits = DEFAULT,
) -> Image:
    """Return the image for ``platform`` (default: this host's) among ``entries`` and the indexes they lead to.

    An image that stands alone, without an index, is taken whatever it is for, unless ``platform`` is given.

    Raises:
        NotFound: none for the platform; the message lists those that are there.
        InvalidImage: malformed, a wrong digest, an index that contains itself, nested too deep.
    """
    alone = len(entries) == 1 and entries[0].media_type not in INDEX_TYPES
    if alone:
        leaves = list(entries)  # also what is no image, for build_image to say what it is
    else:
        seen: dict[Digest, Descriptor] = {}
        for leaf in _leaves(fetch, entries, where, limits, set()):
            seen.setdefault(leaf.digest, leaf)
            limits.check("manifests_per_index", len(seen), f"{where}: manifests in nested indexes")
        leaves = list(seen.values())
    want = platform or platforms.host()

    def load(entry: Descriptor) -> Image:
        return build_image(name, fetch_manifest(fetch, entry, where, limits), entry, fetch, where, limits=limits)

    known = [leaf.platform for leaf in leaves]
    images: dict[int, Image] = {}
    place = 0 if alone and platform is None else platforms.choose(known, want)
    if place is None and None in known:
        # Entries without a platform: their configs say what they are for.
        images = {i: load(leaf) for i, leaf in enumerate(leaves) if leaf.platform is None}
        known = [images[i].platform if i in images else p for i, p in enumerate(known)]
        place = platforms.choose(known, want)
    if place is None:
        there = ", ".join(sorted({str(p) for p in known if p is not None})) or "none"
        hint = "; choose one with --platform" if known else ""
        raise NotFound(f"{where}: no image for {want}; there are images for: {there}{hint}")
    return images[place] if place in images else load(leaves[place])


_LAYER_PREFIXES = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")


def no_image(data: bytes, entry: Descriptor, limits: Limits) -> str:
    """Return why the manifest ``data`` has no root filesystem to remap, "" if it has one.

    This is what keeps the hook from working on its own output, by what a manifest is and not by how it is tagged:
    artifacts (ours, signatures, statements) have an artifactType, another config, or layers that are no tar.
    """
    manifest = oci.parse_manifest(data, str(entry.digest), media_type=entry.media_type, limits=limits)
    if manifest.artifact_type:
        return f"an artifact ({manifest.artifact_type})"
    if manifest.config.media_type not in (oci.CONFIG, oci.DOCKER_CONFIG):
        return f"an artifact ({manifest.config.media_type})"
    for layer in manifest.layers:
        if not layer.media_type.startswith(_LAYER_PREFIXES):
            return f"not an image of layers ({layer.media_type})"
    return ""


def wanted(data: bytes, entry: Descriptor, platforms: Sequence[str], limits: Limits) -> tuple[Digest, ...]:
    """Return the manifests of the index ``data`` that are to be remapped, nested indexes among them."""
    index = oci.parse_index(data, str(entry.digest), media_type=entry.media_type, limits=limits)
    asked = [Platform.parse(text) for text in platforms]
    found: dict[Digest, None] = {}
    for each in index.manifests:
        platform = each.platform
        if not oci.is_image(each):
            continue
        if platform is not None and (platform.os != "linux" if not asked else platform not in asked):
            continue
        found[each.digest] = None
    return tuple(found)
