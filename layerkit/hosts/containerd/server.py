"""The gRPC shell around the snapshotter: bytes in, bytes out."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from layerkit.hosts.containerd import messages_pb2 as pb
from layerkit.hosts.containerd.snapshots.catalog import Row
from layerkit.hosts.containerd.snapshots.layers import Mount
from layerkit.hosts.containerd.snapshots.snapshotter import Snapshotter
from layerkit.model.errors import LayerkitError, NotFound, SnapshotError, UnmappedId, UnsupportedHost, UsageError

SERVICE = "containerd.services.snapshots.v1.Snapshots"
_INFOS_PER_MESSAGE = 100
_THREADS = 16
_log = logging.getLogger("layerkit.snapshotter")

Handler = Callable[[Snapshotter, Any], Any]


def _mounts(found: list[Mount]) -> pb.MountsReply:
    return pb.MountsReply(mounts=[pb.Mount(type=m.type, source=m.source, options=list(m.options)) for m in found])


def _info(row: Row) -> pb.Info:
    return pb.Info(
        name=row.key, parent=row.parent_key, kind=row.kind.name, labels=dict(row.labels),
        created_at=_time(row.created), updated_at=_time(row.updated),
    )  # fmt: skip


def _time(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)


def _update(s: Snapshotter, r: Any) -> pb.InfoReply:
    return pb.InfoReply(info=_info(s.update(r.info.name, dict(r.info.labels), list(r.update_mask.paths))))


_UNARY: dict[str, tuple[Any, Handler]] = {
    "Prepare": (pb.CreateRequest, lambda s, r: _mounts(s.prepare(r.key, r.parent, dict(r.labels)))),
    "View": (pb.CreateRequest, lambda s, r: _mounts(s.view(r.key, r.parent, dict(r.labels)))),
    "Mounts": (pb.KeyRequest, lambda s, r: _mounts(s.mounts(r.key))),
    "Commit": (pb.CommitRequest, lambda s, r: s.commit(r.name, r.key, dict(r.labels), r.parent)),
    "Remove": (pb.KeyRequest, lambda s, r: s.remove(r.key)),
    "Stat": (pb.KeyRequest, lambda s, r: pb.InfoReply(info=_info(s.stat(r.key)))),
    "Update": (pb.UpdateRequest, _update),
    "Usage": (pb.KeyRequest, lambda s, r: pb.UsageReply(**asdict(s.usage(r.key)))),
    "Cleanup": (pb.KeyRequest, lambda s, r: s.cleanup() and None),
}


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Return the gRPC status that containerd takes for ``error`` (its package errdefs)."""
    match error:
        case SnapshotError():
            return grpc.StatusCode[error.status.upper()], str(error)
        case NotFound():
            return grpc.StatusCode.NOT_FOUND, str(error)
        case UsageError() | UnmappedId():
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        case UnsupportedHost():
            return grpc.StatusCode.FAILED_PRECONDITION, str(error)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error.strerror}: {error.filename or 'the root'}"
        case LayerkitError() | OSError():
            return grpc.StatusCode.UNKNOWN, str(error)
    return grpc.StatusCode.INTERNAL, f"a fault of layerkit: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _told(context: grpc.ServicerContext, method: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        code, text = status_of(error)
        if code is grpc.StatusCode.INTERNAL:
            _log.exception("%s failed", method)
        elif code is not grpc.StatusCode.ALREADY_EXISTS and code is not grpc.StatusCode.NOT_FOUND:
            _log.warning("%s: %s", method, text)
        context.abort(code, text)


def _unary(snapshotter: Snapshotter, method: str, request: Any, handler: Handler) -> grpc.RpcMethodHandler:
    def call(message: Any, context: grpc.ServicerContext) -> Any:
        with _told(context, method):
            return handler(snapshotter, message) or empty_pb2.Empty()

    return grpc.unary_unary_rpc_method_handler(call, request.FromString, lambda reply: reply.SerializeToString())


def _stream(snapshotter: Snapshotter) -> grpc.RpcMethodHandler:
    def call(message: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _told(context, "List"):
            rows = list(snapshotter.walk(list(message.filters)))
            for at in range(0, len(rows), _INFOS_PER_MESSAGE):
                yield pb.ListReply(info=map(_info, rows[at : at + _INFOS_PER_MESSAGE]))

    return grpc.unary_stream_rpc_method_handler(
        call, pb.ListRequest.FromString, lambda reply: reply.SerializeToString()
    )


class Server:
    """The service on a unix socket."""

    def __init__(self, snapshotter: Snapshotter, address: Path) -> None:
        """Listen on ``address``; only root may connect.

        Raises:
            UsageError: something lives at that path, or it is too long.
        """
        self.address = Path(os.path.abspath(address))
        _free(self.address)
        handlers = {name: _unary(snapshotter, name, *rest) for name, rest in _UNARY.items()}
        handlers["List"] = _stream(snapshotter)
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, "layerkit-grpc"),
            handlers=[grpc.method_handlers_generic_handler(SERVICE, handlers)],
            options=[("grpc.max_receive_message_length", 16 << 20)],
        )
        before = os.umask(0o177)  # the socket appears with the mode that it keeps
        try:
            if not self._server.add_insecure_port(f"unix:{self.address}"):
                raise UsageError(f"{self.address}: cannot listen here")
        except RuntimeError as error:
            raise UsageError(f"{self.address}: cannot listen here: {error}") from error
        finally:
            os.umask(before)

    def start(self) -> None:
        """Answer from now on."""
        self._server.start()

    def stop(self, grace_seconds: float) -> None:
        """Take no more requests, let those that run end within the time, and remove the socket."""
        self._server.stop(grace_seconds).wait()
        self.address.unlink(missing_ok=True)


def _free(address: Path) -> None:
    if len(os.fsencode(address)) > 107:
        raise UsageError(f"{address}: a path of a socket has at most 107 bytes; choose another --address")
    address.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    try:
        mode = address.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{address}: exists and is not a socket; choose another --address")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(os.fspath(address))
        except OSError:
            address.unlink()  # left by a run that was killed
            return
    raise UsageError(f"{address}: another process answers there; stop it, or choose another --address")


def tell_systemd(state: str) -> None:
    """Send a state such as ``READY=1`` to the service manager that started us (sd_notify(3)), if one did."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in ("/", "@"):
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
            with contextlib.suppress(OSError):
                manager.connect("\0" + address[1:] if address[0] == "@" else address)
                manager.sendall(state.encode())
