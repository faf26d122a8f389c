"""Making an image of layerkit's store known to containerd, so that it neither downloads nor unpacks it.

containerd gets what is small: manifest and config as content, a name, and for each layer a snapshot. The latter by
its own road for snapshots that a snapshotter has already: a Prepare whose label ``containerd.io/snapshot.ref`` is
the chain_id, which our snapshotter answers with "already exists". Layer blobs stay out of containerd's content
store, so such an image runs, and can neither be pushed nor exported from there.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.protobuf.field_mask_pb2 import FieldMask

from layerkit.hosts.containerd import messages_pb2 as pb
from layerkit.hosts.containerd.snapshots.catalog import REF_LABEL
from layerkit.model.descriptor import Descriptor
from layerkit.model.errors import LayerkitError, UsageError
from layerkit.model.image import Image, chain_ids

_SECONDS = 30
_PIECE_BYTES = 1 << 20
_LEASE_SECONDS = 3600


class Containerd(contextlib.ExitStack):
    """A connection to containerd, for one of its namespaces; it ends with the block."""

    def __init__(self, address: Path, namespace: str) -> None:
        """Connect to the socket at ``address``.

        Raises:
            UsageError: nothing answers there.
        """
        super().__init__()
        self._address, self._namespace = address, namespace
        self._lease = ""
        self._channel = self.enter_context(grpc.insecure_channel(f"unix:{os.path.abspath(address)}"))
        try:
            grpc.channel_ready_future(self._channel).result(timeout=5)
        except grpc.FutureTimeoutError:
            self.close()
            raise UsageError(
                f"{address}: no containerd answers there; is it running, and are you root? (--containerd SOCKET)"
            ) from None

    def _call(self, method: str, *requests: Any) -> bool:
        """Ask; return False where what is to be made exists already. Of an answer no more is read.

        A stream of one message is on the wire what a method without streams gets.
        """
        metadata = [("containerd-namespace", self._namespace)]
        metadata += [("containerd-lease", self._lease)] if self._lease else []
        call = self._channel.stream_stream(
            f"/containerd.services.{method}", lambda each: each.SerializeToString(), empty_pb2.Empty.FromString
        )
        try:
            for _ in call(iter(requests), metadata=metadata, timeout=_SECONDS):
                pass
        except grpc.RpcError as error:
            if _failed(error).code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            return False
        return True

    @contextlib.contextmanager
    def _leased(self) -> Iterator[None]:
        """Keep containerd's garbage collection from what is made inside the block."""
        name = f"layerkit-{uuid.uuid4().hex}"
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=_LEASE_SECONDS)
        labels = {"containerd.io/gc.expire": end.strftime("%Y-%m-%dT%H:%M:%SZ")}
        self._call("leases.v1.Leases/Create", pb.LeaseRequest(id=name, labels=labels))
        self._lease = name
        try:
            yield
        finally:
            self._lease = ""
            self._call("leases.v1.Leases/Delete", pb.LeaseRequest(id=name))

    def _put(self, descriptor: Descriptor, data: bytes, labels: dict[str, str]) -> None:
        """Put a blob into the content store; if it is there, only its labels are added to."""
        digest = str(descriptor.digest)
        starts = range(0, len(data), _PIECE_BYTES)
        pieces = [
            pb.WriteRequest(
                action=pb.WRITE, ref=f"layerkit-{digest}", total=len(data), expected=digest, offset=at,
                data=data[at : at + _PIECE_BYTES],
            )
            for at in starts
        ]  # fmt: skip
        pieces[-1].MergeFrom(pb.WriteRequest(action=pb.COMMIT, labels=labels))
        if not self._call("content.v1.Content/Write", *pieces):
            info = pb.ContentInfo(digest=digest, labels=labels)
            mask = FieldMask(paths=[f"labels.{key}" for key in labels])
            self._call("content.v1.Content/Update", pb.ContentUpdateRequest(info=info, update_mask=mask))

    def _name(self, name: str, target: Descriptor) -> None:
        """Let ``name`` mean the image with the manifest ``target``."""
        image = pb.Image(
            name=name,
            target=pb.Descriptor(media_type=target.media_type, digest=str(target.digest), size=target.size),
        )
        if not self._call("images.v1.Images/Create", pb.ImageRequest(image=image)):
            update = pb.ImageRequest(image=image, update_mask=FieldMask(paths=["target"]))
            self._call("images.v1.Images/Update", update)

    def _adopt(self, snapshotter: str, chain: Sequence[str]) -> None:
        """Have the snapshotter take the chains, bottom first, as committed snapshots."""
        parent = ""
        for chain_id in chain:
            key = f"extract-layerkit-{uuid.uuid4().hex} {chain_id}"
            request = pb.CreateRequest(
                snapshotter=snapshotter, key=key, parent=parent, labels={REF_LABEL: chain_id}
            )
            if self._call("snapshots.v1.Snapshots/Prepare", request):
                self._call("snapshots.v1.Snapshots/Remove", pb.KeyRequest(snapshotter=snapshotter, key=key))
                raise UsageError(
                    f"the snapshotter {snapshotter!r} does not know {chain_id}: it must be `layerkit snapshotter` "
                    "with the same --store as this command"
                )
            parent = chain_id

    def add(self, image: Image, name: str, snapshotter: str) -> str:
        """Make ``image``, whose layers lie in the snapshotter's store, known as ``name``; return its chain_id.

        Raises:
            UsageError: the snapshotter does not have it: it serves another store, or is none of layerkit's.
            LayerkitError: containerd refuses something.
        """
        chain = chain_ids(image.diff_ids)
        top = chain[-1] if chain else ""
        try:
            with self._leased():
                self._adopt(snapshotter, chain)
                kept = {f"containerd.io/gc.ref.snapshot.{snapshotter}": top} if top else {}
                self._put(image.config_descriptor, image.config, kept)
                config = {"containerd.io/gc.ref.content.config": str(image.config_descriptor.digest)}
                self._put(image.descriptor, image.manifest, config)
                self._name(name, image.descriptor)
        except grpc.RpcError as error:
            raise LayerkitError(f"containerd at {self._address}: {_failed(error).details()}") from error
        return top


def _failed(error: grpc.RpcError) -> grpc.Call:
    """Return the call that failed: it is what a channel raises."""
    assert isinstance(error, grpc.Call)
    return error
