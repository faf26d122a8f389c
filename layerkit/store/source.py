"""An image of the local store as a source for the use cases."""

from __future__ import annotations

from layerkit.images.oci.blobs import BytesReader, FileRange, read_all
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.errors import NotFound
from layerkit.model.image import Image
from layerkit.model.ports import BlobReader, ImageSource
from layerkit.store.local import LocalStore


class StoreSource(ImageSource):
    """A source whose store stays open when it is closed."""

    def __init__(self, store: LocalStore, name: str) -> None:
        """Read the image called ``name``, or whose manifest's digest begins so."""
        self._store, self._name, self.where = store, name, f"store:{name}"

    def image(self, platform: Platform | None = None) -> Image:
        """See the port; the image is as it was when it came."""
        image = self._store.image(self._name)
        if platform is not None and platform != image.platform:
            have = image.platform
            same = (have.os, have.architecture) == (platform.os, platform.architecture)
            if not same or (platform.variant and have.variant):
                raise NotFound(f"{self.where}: is for {have}, not for {platform}; name another image")
        return image

    def open_blob(self, descriptor: Descriptor) -> BlobReader:
        """Open the manifest, the config, or a layer whose blob is its tar.

        Raises:
            NotFound: a compressed layer: the store keeps what is in it and not the blob.
        """
        image = self.image()
        for known, data in ((image.descriptor, image.manifest), (image.config_descriptor, image.config)):
            if descriptor.digest == known.digest:
                return BytesReader(data)
        try:
            # An uncompressed layer is its own blob.
            return FileRange.whole(self._store.tar_path(descriptor.digest))
        except NotFound:
            raise NotFound(
                f"{self.where}: blob {descriptor.digest} is not kept, only what is in it; "
                "name the image where it came from; what the store keeps is checked by layerkit store verify"
            ) from None

    def fetch(self, entry: Descriptor, most: int) -> bytes:
        """See the port."""
        return read_all(self.open_blob(entry), most, f"{self.where}: blob {entry.digest}", "manifest_bytes")

    def close(self) -> None:
        """Do nothing: the store belongs to the caller."""
