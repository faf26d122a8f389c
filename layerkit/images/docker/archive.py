"""Docker archives (``docker save``, ``podman save``), current and legacy, read where they lie."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable
from typing import TYPE_CHECKING

from layerkit.formats.oci import docker
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci.images import choose_platform
from layerkit.images.oci.blobs import BytesReader, compression, inflated, read_all
from layerkit.images.oci.outer_tar import Member, OuterTar
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound
from layerkit.model.image import Image
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import ImageSource

if TYPE_CHECKING:
    from layerkit.model.ports import BlobReader

_LAYER_TYPES = {"": oci.LAYER_TAR, "gzip": oci.LAYER_GZIP, "zstd": oci.LAYER_ZSTD}


class DockerArchiveSource(ImageSource):
    """A source over a docker archive.

    The archive has neither a manifest nor blob digests: an OCI manifest is made from what is there, and the
    blobs are what the archive holds, compressed layers as they are.
    """

    def __init__(self, archive: OuterTar, name: str = "", *, limits: Limits = DEFAULT) -> None:
        """Read the list of images in ``archive``, which is closed with this.

        ``name`` is an image's name, or ``@N`` for the image at place N; "" means the only one.

        Raises:
            InvalidImage: no docker archive, or a malformed one.
        """
        self.where, self._archive, self._name, self._limits = archive.what, archive, name, limits
        self._blobs: dict[Digest, Member | bytes] = {}
        self._images: list[tuple[tuple[str, ...], Callable[[str], Image]]] = []
        try:
            self._read_list()
        except BaseException:
            archive.close()
            raise

    def _read_list(self) -> None:
        listed = self._archive.find("manifest.json")
        if listed is not None:
            what = f"{self.where}: manifest.json"
            data = self._archive.read(listed, "manifest_bytes", what)
            for saved in docker.parse_manifest(data, what, limits=self._limits):
                self._images.append((saved.tags, lambda name, saved=saved: self._current(name, saved)))  # type: ignore[misc]
            return
        legacy = self._archive.find("repositories")
        if legacy is None:
            raise InvalidImage(
                f"{self.where}: no docker archive: it has neither 'manifest.json' nor 'repositories'"
            )
        what = f"{self.where}: repositories"
        data = self._archive.read(legacy, "manifest_bytes", what)
        by_top: dict[str, list[str]] = {}
        for tag, top in docker.parse_repositories(data, what, limits=self._limits).items():
            by_top.setdefault(top, []).append(tag)
        for top, tags in by_top.items():
            self._images.append((tuple(tags), lambda name, top=top: self._legacy(name, top)))  # type: ignore[misc]

    def image(self, platform: Platform | None = None) -> Image:
        """See the port."""
        tags, load = self._chosen()
        image = load(self._name if self._name and not self._name.startswith("@") else (tags or ("",))[0])
        if platform is not None and choose_platform([image.platform], platform) is None:
            raise NotFound(f"{self.where}: no image for {platform}; this one is for {image.platform}")
        return image

    def _chosen(self) -> tuple[tuple[str, ...], Callable[[str], Image]]:
        images, name = self._images, self._name
        if not images:
            raise NotFound(f"{self.where}: holds no image")
        if name.startswith("@") and name[1:].isascii() and name[1:].isdigit() and int(name[1:]) < len(images):
            return images[int(name[1:])]
        want = docker.normal_name(name)
        found = [i for i in images if not name or want in map(docker.normal_name, i[0])]
        if len(found) == 1:
            return found[0]
        shown = ", ".join(", ".join(tags) or f"@{place} (no name)" for place, (tags, _) in enumerate(images[:20]))
        if not found:
            raise NotFound(f"{self.where}: no image named {name!r}; there are: {shown}")
        raise NotFound(f"{self.where}: {len(found)} images, so one must be chosen; there are: {shown}")

    def _current(self, name: str, saved: docker.SavedImage) -> Image:
        what = f"{self.where}: manifest.json"
        member = self._archive.member(posixpath.normpath(saved.config), what)
        config = self._archive.read(member, "config_bytes", f"{self.where}: {saved.config}")
        stem = posixpath.basename(saved.config).removesuffix(".json")
        if len(stem) == 64 and stem != hashlib.sha256(config).hexdigest():
            # The file's name is the image id; who wrote it there meant exactly these bytes.
            raise DigestMismatch(f"{self.where}: {saved.config}", str(Digest.of(config)), f"sha256:{stem}")
        diff_ids = oci.parse_config(config, f"{self.where}: {saved.config}", limits=self._limits).diff_ids
        members = [self._archive.member(posixpath.normpath(layer), what) for layer in saved.layers]
        if len(members) != len(diff_ids):
            raise InvalidImage(
                f"{what}: {len(members)} layers, but {saved.config} lists {len(diff_ids)} rootfs.diff_ids; "
                "the two numbers must be equal"
            )
        layers = [self._layer(m, diff_id) for m, diff_id in zip(members, diff_ids, strict=True)]
        return self._finish(name, config, layers)

    def _legacy(self, name: str, top: str) -> Image:
        chain: list[docker.LegacyLayer] = []
        seen: set[str] = set()
        layer_id = top
        while layer_id:
            if layer_id in seen:
                raise InvalidImage(f"{self.where}: {layer_id}/json: parents that lead in a circle")
            seen.add(layer_id)
            self._limits.check("layers_per_image", len(seen), f"{self.where}: parents of {top}")
            what = f"{self.where}: {layer_id}/json"
            member = self._archive.member(
                f"{layer_id}/json", "repositories" if layer_id == top else "a child layer"
            )
            data = self._archive.read(member, "config_bytes", what)
            chain.append(docker.parse_legacy_layer(data, layer_id, what, limits=self._limits))
            layer_id = chain[-1].parent
        chain.reverse()
        members = [self._archive.member(f"{layer.id}/layer.tar", "repositories") for layer in chain]
        diff_ids = [self._hash(m, inflate=True) for m in members]
        layers = [self._layer(m, diff_id) for m, diff_id in zip(members, diff_ids, strict=True)]
        return self._finish(name, docker.legacy_config(chain, diff_ids), layers)

    def _finish(self, name: str, config: bytes, layers: list[Descriptor]) -> Image:
        image = docker.to_image(name, config, layers, self.where, limits=self._limits)
        self._blobs[image.config_descriptor.digest] = config
        self._blobs[image.descriptor.digest] = image.manifest
        return image

    def _layer(self, member: Member, diff_id: Digest) -> Descriptor:
        self._limits.check("layer_blob_bytes", member.size, f"{self.where}: a layer")
        kind = compression(self._archive.head(member))
        if kind not in _LAYER_TYPES:
            raise InvalidImage(f"{self.where}: a layer is compressed with {kind}, which no image format knows")
        # An uncompressed blob is its own tar: whoever reads it finds out whether it is the one promised.
        digest = self._hash(member, inflate=False) if kind else diff_id
        self._blobs[digest] = member
        return Descriptor(_LAYER_TYPES[kind], digest, member.size)

    def _hash(self, member: Member, *, inflate: bool) -> Digest:
        kind, hasher = compression(self._archive.head(member)) if inflate else "", hashlib.sha256()
        for chunk in inflated(self._archive.open(member), kind, f"{self.where}: a layer", self._limits):
            hasher.update(chunk)
        return Digest("sha256", hasher.hexdigest())

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """See the port: a blob of an image that :meth:`image` returned."""
        found = self._blobs.get(descriptor.digest)
        if found is None:
            raise NotFound(f"{self.where}: no blob {descriptor.digest} in the images read from it")
        size = len(found) if isinstance(found, bytes) else found.size
        if size != descriptor.size:
            raise DigestMismatch(
                f"{self.where}: blob {descriptor.digest}", f"{size} bytes", f"{descriptor.size} bytes"
            )
        return BytesReader(found) if isinstance(found, bytes) else self._archive.open(found)

    def fetch(self, entry: Descriptor, most: int) -> bytes:
        """See the port."""
        return read_all(self.open_blob(entry), most, f"{self.where}: blob {entry.digest}", "manifest_bytes")

    def close(self) -> None:
        """Close the archive."""
        self._archive.close()


def is_docker(archive: OuterTar) -> bool:
    """Return whether ``archive`` holds what ``docker save`` writes."""
    return archive.find("manifest.json") is not None or archive.find("repositories") is not None
