"""From an index entry to an image: nested indexes, the choice by platform, manifest and config checked."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from layerkit.formats.oci import documents as oci
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound
from layerkit.model.image import Image, Layer
from layerkit.model.limits import DEFAULT, Limits

Fetch = Callable[[Descriptor, int], bytes]
"""Called as (descriptor, most bytes allowed); returns the blob, NOT verified."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the manifests, indexes and configs of a place are read.

    Attributes:
        fetch: reads a blob. where: names the place in errors. limits: bounds.
    """

    fetch: Fetch
    where: str
    limits: Limits = DEFAULT

    def manifest(self, entry: Descriptor) -> bytes:
        """Return the verified manifest or index that ``entry`` points at."""
        what = f"{self.where}: manifest {entry.digest}"
        self.limits.check("manifest_bytes", entry.size, what)
        return oci.verify(self.fetch(entry, self.limits.manifest_bytes), entry, what)

    def build(self, name: str, entry: Descriptor) -> Image:
        """Return the image whose manifest ``entry`` points at, with its config read and checked.

        Raises:
            InvalidImage: an artifact, no config of an image, layers and diff_ids that differ in number.
        """
        where, limits = self.where, self.limits
        manifest = self.manifest(entry)
        what = f"{where}: manifest {entry.digest}"
        if entry.media_type in oci.DOCKER_SCHEMA1:
            oci.parse_manifest(b'{"schemaVersion":1}', what)
        parsed = oci.parse_manifest(manifest, what, media_type=entry.media_type, limits=limits)
        if parsed.media_type != entry.media_type:
            raise InvalidImage(f"{what}: mediaType: found {parsed.media_type!r}, announced as {entry.media_type!r}")
        if parsed.config.media_type not in (oci.CONFIG, oci.DOCKER_CONFIG):
            kind = parsed.artifact_type or parsed.config.media_type
            raise InvalidImage(f"{what}: this is an artifact ({kind}), not an image with a root filesystem")
        config_what = f"{where}: config {parsed.config.digest}"
        limits.check("config_bytes", parsed.config.size, config_what)
        data = oci.verify(self.fetch(parsed.config, limits.config_bytes), parsed.config, config_what)
        config = oci.parse_config(data, config_what, limits=limits)
        if len(config.diff_ids) != len(parsed.layers):
            raise InvalidImage(
                f"{what}: {len(parsed.layers)} layers, but its config {parsed.config.digest} lists "
                f"{len(config.diff_ids)} rootfs.diff_ids; the two numbers must be equal"
            )
        for layer in parsed.layers:
            limits.check("layer_blob_bytes", layer.size, f"{what}: layer {layer.digest}")
        descriptor = replace(entry, platform=entry.platform or config.platform)
        layers = tuple(map(Layer, parsed.layers, config.diff_ids))
        return Image(name, manifest, descriptor, data, parsed.config, layers, config.platform)

    def every(self, entries: Sequence[Descriptor], name: str) -> list[Image]:
        """Return the images of all platforms among ``entries`` and the indexes they lead to, each once.

        Raises:
            InvalidImage: as for :meth:`select`.
        """
        return [self.build(name, entry) for entry in self._leaves(entries)]

    def select(self, entries: Sequence[Descriptor], name: str, platform: Platform | None) -> Image:
        """Return the image for ``platform`` (default: this host's) among ``entries`` and the indexes they lead to.

        An image that stands alone, without an index, is taken whatever it is for, unless ``platform`` is given.

        Raises:
            NotFound: none for the platform; the message lists those that are there.
            InvalidImage: malformed, a wrong digest, an index that contains itself, nested too deep.
        """
        alone = len(entries) == 1 and entries[0].media_type not in oci.INDEX_TYPES
        # Alone also what is no image, for build to say what it is.
        leaves = list(entries) if alone else self._leaves(entries)
        want = platform or host_platform()

        known = [leaf.platform for leaf in leaves]
        images: dict[int, Image] = {}
        place = 0 if alone and platform is None else choose_platform(known, want)
        if place is None and None in known:
            # Entries without a platform: their configs say what they are for.
            images = {i: self.build(name, leaf) for i, leaf in enumerate(leaves) if leaf.platform is None}
            known = [images[i].platform if i in images else p for i, p in enumerate(known)]
            place = choose_platform(known, want)
        if place is None:
            there = ", ".join(sorted({str(p) for p in known if p is not None})) or "none"
            hint = "; choose one with --platform" if known else ""
            raise NotFound(f"{self.where}: no image for {want}; there are images for: {there}{hint}")
        return images[place] if place in images else self.build(name, leaves[place])

    def _leaves(self, entries: Sequence[Descriptor]) -> list[Descriptor]:
        """Return the image manifests that ``entries`` lead to, each once."""
        seen: dict[Digest, Descriptor] = {}
        for leaf in self._below(entries, set()):
            seen.setdefault(leaf.digest, leaf)
            self.limits.check("manifests_per_index", len(seen), f"{self.where}: manifests in nested indexes")
        return list(seen.values())

    def _below(
        self, entries: Sequence[Descriptor], visited: set[Digest], above: tuple[Digest, ...] = ()
    ) -> Iterator[Descriptor]:
        """Yield the image manifests that ``entries`` lead to through nested indexes, each index read once."""
        for entry in entries:
            if entry.digest in above:
                raise InvalidImage(f"{self.where}: index {entry.digest} contains itself")
            if not oci.is_image(entry):
                continue
            if entry.media_type in oci.MANIFEST_TYPES:
                yield entry
                continue
            if entry.digest in visited:  # else a few small indexes could spell out billions of entries
                continue
            visited.add(entry.digest)
            what = f"{self.where}: index {entry.digest}"
            self.limits.check("index_depth", len(above) + 1, f"{what}: nesting of indexes")
            inner = oci.parse_index(self.manifest(entry), what, media_type=entry.media_type, limits=self.limits)
            yield from self._below(inner.manifests, visited, (*above, entry.digest))


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

    def fits(platform: Platform | None) -> bool:
        return platform is None or (platform in asked if asked else platform.os == "linux")

    chosen = (each.digest for each in index.manifests if oci.is_image(each) and fits(each.platform))
    return tuple(dict.fromkeys(chosen))


# Which entry of an index fits a platform (image-spec, image-index.md, "platform").

_MACHINES = {
    "x86_64": ("amd64", ""), "i386": ("386", ""), "i486": ("386", ""), "i586": ("386", ""), "i686": ("386", ""),
    "aarch64": ("arm64", "v8"), "armv8l": ("arm", "v8"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"), "ppc64le": ("ppc64le", ""), "s390x": ("s390x", ""), "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""), "mips64": ("mips64le", ""),
}  # fmt: skip
# What an absent variant means.
_BASELINE = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


@functools.cache
def host_platform() -> Platform:
    """Return the platform of this machine."""
    machine = os.uname().machine
    return Platform("linux", *_MACHINES.get(machine, (machine, "")))


def _rank(have: Platform, want: Platform) -> tuple[int, int] | None:
    """Return how well ``have`` serves ``want``, lower is better, or None where it does not."""
    if (have.os, have.architecture) != (want.os, want.architecture):
        return None
    baseline = _BASELINE.get(want.architecture, "")
    if have.variant == want.variant:
        return 0, 0
    have_level, want_level = (_level(p.variant or baseline) for p in (have, want))
    if have_level == want_level and (have_level is not None or not (have.variant and want.variant)):
        return 1, 0
    if have_level is not None and want_level is not None and have_level < want_level:
        return 2, want_level - have_level  # a newer processor runs what was built for an older one
    # Nothing was said about the variant: any is better than none, the lowest first.
    return None if want.variant else (3, have_level or 0)


def _level(variant: str) -> int | None:
    digits = variant.removeprefix("v").partition(".")[0]
    return int(digits) if variant.startswith("v") and digits.isascii() and digits.isdigit() else None


def choose_platform(platforms: Iterable[Platform | None], want: Platform) -> int | None:
    """Return the place of the platform that serves ``want`` best, the first of equals.

    The exact variant wins, then the same one under another spelling (``arm64`` is ``arm64/v8``), then the
    highest lower one; where ``want`` has no variant at last any. None in ``platforms`` is passed over.
    """
    ranked = [
        (rank, place)
        for place, have in enumerate(platforms)
        if have is not None and (rank := _rank(have, want)) is not None
    ]
    return min(ranked)[1] if ranked else None
