"""Use case: an image, or all of a multi-platform one, with what is attached to it, from one place to another.

Manifests are copied byte for byte, so what is attached by digest stays true of what it is attached to. What is
attached to something that is not copied (to the index, where one platform is) stays behind: a signature must not
seem to speak for bytes that it does not cover. For the same reason nothing goes with an image that is written anew.

Three ways of attaching are known: a manifest with a ``subject`` (image-spec 1.1), a name made from the digest
(cosign's ``sha256-HEX.sig``, the fallback tag of referrers), and an entry of the image's own index that refers to
it (buildkit's attestations).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import images as oci_images
from layerkit.images.transfer import copy_image, put_blobs
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError
from layerkit.model.image import Image
from layerkit.model.limits import Limits
from layerkit.model.ports import ImageSink, ImageSource, Progress
from layerkit.model.reports import Report
from layerkit.model.work import Destination
from layerkit.usecases.each_platform import PassingSink, nameless


@dataclass(frozen=True, slots=True)
class CopyReport(Report):
    """What a copy brought.

    Attributes:
        name: of the image in the destination.
        manifest: digest of the manifest or index, the same as in the source.
        images: digests of the manifests of images, one for each platform.
        attached: digests of the artifacts that came along.
        left: digests of those that did not: attached to what was not copied, or not to be kept in the destination.
        blobs: that were copied; those the destination had are not.
        bytes: of these.
    """

    name: str
    manifest: str
    images: tuple[str, ...]
    attached: tuple[str, ...]
    left: tuple[str, ...]
    blobs: int
    bytes: int
    seconds: float


def copy(
    source: ImageSource, image: Image | None, dst: Destination, limits: Limits, progress: Progress | None = None
) -> CopyReport:
    """Copy ``image`` byte for byte, or all that the reference of ``source`` names, with what is attached to it.

    Raises:
        InvalidImage: a blob is missing or not what its descriptor promises.
    """
    start = time.monotonic()
    if image is None and not source.chosen():
        image = source.image()  # a docker archive has no index: there is one image to copy
    with dst.sink() as sink:
        work = _Copy(source, sink, limits, progress)
        if image is not None:
            name, top = dst.name or image.name, image.descriptor
            copy_image(source, work, image, name, progress=progress)
            work.images.append(top.digest)
        else:
            name, top = work.all_platforms(dst.name)
        if sink.keeps_attached:
            work.attached_to()
        left = work.left()
    return CopyReport(
        name=name,
        manifest=str(top.digest),
        images=tuple(map(str, work.images)),
        attached=tuple(map(str, work.attached)),
        left=tuple(str(entry.digest) for entry in left),
        blobs=work.blobs,
        bytes=work.bytes,
        seconds=time.monotonic() - start,
    )


class _Copy(PassingSink):
    """One copy: a sink that counts what passes, and what was brought so far."""

    def __init__(self, source: ImageSource, sink: ImageSink, limits: Limits, progress: Progress | None) -> None:
        super().__init__(sink)
        self._source, self._limits, self._progress = source, limits, progress
        self.images: list[Digest] = []
        self.indexes: list[Digest] = []
        self.attached: list[Digest] = []
        self.blobs = self.bytes = 0
        self._lock = threading.Lock()

    def put_blob(self, descriptor: Descriptor, chunks: Iterable[bytes | memoryview]) -> None:
        super().put_blob(descriptor, chunks)
        if descriptor.digest in self.mounted:
            return  # no byte of it was read or sent
        with self._lock:
            self.blobs += 1
            self.bytes += descriptor.size

    def all_platforms(self, dst_name: str) -> tuple[str, Descriptor]:
        """Copy what the reference names whole; return its name and descriptor."""
        chosen = list(self._source.chosen())
        name = dst_name or next((e.annotations[oci.REF_NAME] for e in chosen if oci.REF_NAME in e.annotations), "")
        if len(chosen) == 1:
            top = chosen[0]
            self._sink.put_manifest(top, self._below(top, 0), name)
            return name, top
        # Entries of one name for several platforms are an index in all but form; an index says so.
        for entry in chosen:
            data = self._below(entry, 0)
            if not self._sink.has_blob(entry.digest):
                self.put_blob(entry, [data])
        data = oci.index_json([nameless(entry) for entry in chosen])
        top = Descriptor.of(oci.INDEX, data)
        self._sink.put_manifest(top, data, name)
        return name, top

    def _below(self, entry: Descriptor, depth: int) -> bytes:
        """Copy all that a manifest or index leads to, and return its own bytes."""
        source = self._source
        self._limits.check("index_depth", depth, f"{source.where}: nesting of indexes")
        data = oci_images.Reading(source.fetch, source.where, self._limits).manifest(entry)
        what = f"{source.where}: manifest {entry.digest}"
        is_index = entry.media_type in oci.INDEX_TYPES
        if is_index:
            self.indexes.append(entry.digest)
        elif oci.is_image(entry):
            manifest = oci.parse_manifest(data, what, media_type=entry.media_type, limits=self._limits)
            if manifest.config.media_type in (oci.CONFIG, oci.DOCKER_CONFIG):
                self.images.append(entry.digest)
        blobs = []
        for part in oci.references(data, entry.media_type, what, limits=self._limits):
            if is_index and part.media_type in oci.INDEX_TYPES | oci.MANIFEST_TYPES:
                below = self._below(part, depth + 1)
                if not self._sink.has_blob(part.digest):
                    self.put_blob(part, [below])
            else:
                blobs.append(part)
        put_blobs(source, self, blobs, self._progress)
        return data

    def attached_to(self) -> None:
        """Copy what is attached to what was copied, and to that in turn."""
        todo = [*self.images, *self.indexes]
        seen = {*todo, *self.attached}
        while todo:
            for entry, name in attached(self._source, todo.pop(0), self._limits):
                if entry.digest in seen:
                    continue
                seen.add(entry.digest)
                images = list(self.images)
                data = self._below(entry, 0)
                self.images = images
                self._sink.put_manifest(entry, data, name)
                self.attached.append(entry.digest)
                todo.append(entry.digest)

    def left(self) -> list[Descriptor]:
        """Return what is attached to something that the reference names and was not copied."""
        there = {*self.images, *self.indexes, *self.attached}
        found: dict[Digest, Descriptor] = {}
        for subject in [*there, *(entry.digest for entry in self._source.chosen())]:
            found |= {entry.digest: entry for entry, _ in attached(self._source, subject, self._limits)}
        return [entry for digest, entry in found.items() if digest not in there]


def attached(source: ImageSource, subject: Digest, limits: Limits) -> list[tuple[Descriptor, str]]:
    """Return what ``source`` holds that is attached to ``subject``, with the names that it must keep."""
    found = [(entry, "") for entry, _ in source.referrers(subject)]
    # What older tools attach by a name: cosign's sha256-HEX.sig, the fallback tag of referrers.
    found += source.attached_by_name(subject)
    refers = {"vnd.docker.reference.digest": str(subject)}.items()
    for entry in _listed_in_indexes(source, limits):
        if refers <= entry.annotations.items():
            found.append((entry, ""))
    return found


def _listed_in_indexes(source: ImageSource, limits: Limits) -> Iterator[Descriptor]:
    """Yield the entries of the indexes that the reference of ``source`` names, nested ones too."""
    todo = [(entry, 0) for entry in source.chosen() if entry.media_type in oci.INDEX_TYPES]
    seen = set()
    while todo:
        index, depth = todo.pop(0)
        if index.digest in seen:
            continue
        seen.add(index.digest)
        limits.check("index_depth", depth, f"{source.where}: nesting of indexes")
        data = oci_images.Reading(source.fetch, source.where, limits).manifest(index)
        what = f"{source.where}: index {index.digest}"
        for entry in oci.parse_index(data, what, media_type=index.media_type, limits=limits).manifests:
            yield entry
            if entry.media_type in oci.INDEX_TYPES:
                todo.append((entry, depth + 1))


def left_behind(source: ImageSource, image: Image, limits: Limits) -> tuple[str, ...]:
    """Return a warning, or none, of what is attached to ``image`` or its index and no use to what is made of it."""
    try:
        subjects = [image.descriptor.digest, *(entry.digest for entry in source.chosen())]
        found = [entry for subject in subjects for entry, _ in attached(source, subject, limits)]
    except LayerkitError:  # something else that lies there is damaged: no reason to fail
        return ()
    digests = tuple(dict.fromkeys(str(entry.digest) for entry in found))
    if not digests:
        return ()
    return (
        f"{len(digests)} attached to {image.descriptor.digest} or its index (signatures, attestations, remaps) "
        f"stay there, they do not cover what was written: {', '.join(digests)}",
    )
