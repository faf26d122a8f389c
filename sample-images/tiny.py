"""A tiny multi-layer image that holds every kind of entry a layer can hold; no tool, no network.

``build`` writes it as an OCI layout, an OCI archive or a docker archive. The bytes depend on nothing but
this file: the tar headers are made by hand and compression is *stored* (gzip and zstd frames without an
entropy stage), because the output of zlib and libzstd differs from version to version. The digests are
pinned in ``tiny.digests.json``.

    python sample-images/tiny.py OUT.tar [--kind oci|oci-archive|docker-archive]
        [--compression gzip|zstd|none] [--no-devices]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

BLOCK = 512
EPOCH = 1_700_000_000
NAME = "layerkit.example/tiny:latest"

FILE, HARDLINK, SYMLINK, CHAR, DIR, FIFO = b"0", b"1", b"2", b"3", b"5", b"6"


# --- tar ---------------------------------------------------------------------------------------------


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def _header(name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, flag: bytes, link: bytes,
            device: tuple[int, int]) -> bytes:  # fmt: skip
    def octal(value: int, width: int) -> bytes:
        return b"%0*o\0" % (width - 1, value)

    fields = (
        name.ljust(100, b"\0") + octal(mode, 8) + octal(uid, 8) + octal(gid, 8) + octal(size, 12)
        + octal(mtime, 12) + b" " * 8 + flag + link.ljust(100, b"\0") + b"ustar\x0000" + bytes(64)
        + octal(device[0], 8) + octal(device[1], 8) + bytes(155 + 12)
    )  # fmt: skip
    assert len(fields) == BLOCK
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    size = len(body) + 1
    while size != len(body) + len(str(size)):
        size = len(body) + len(str(size))
    return str(size).encode() + body


def entry(
    name: bytes,
    flag: bytes = FILE,
    *,
    data: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: str = str(EPOCH),
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    xattrs: dict[bytes, bytes] | None = None,
    extra: dict[bytes, bytes] | None = None,
) -> bytes:
    """Return one tar member; ``mtime`` is decimal text, as PAX has it."""
    pax = {b"SCHILY.xattr." + key: value for key, value in (xattrs or {}).items()} | (extra or {})
    if len(name) > 100:
        pax[b"path"] = name
    if len(link) > 100:
        pax[b"linkpath"] = link
    if not mtime.isdigit():
        pax[b"mtime"] = mtime.encode()
    whole = max(0, int(float(mtime)))
    out = b""
    if pax:
        records = b"".join(_pax_record(key, pax[key]) for key in sorted(pax))
        out += _header(b"PaxHeaders/" + name[:80], 0o644, 0, 0, len(records), 0, b"x", b"", (0, 0))
        out += _pad(records)
    out += _header(name[:100], mode, uid, gid, len(data), whole, flag, link[:100], device)
    return out + _pad(data)


def sparse_entry(name: bytes, size: int, pieces: list[tuple[int, bytes]], **more: object) -> bytes:
    """Return a sparse file in the PAX 1.0 form of GNU tar: the map stands before the data."""
    listed = [*pieces, (size, b"")]
    numbers = [len(listed)] + [n for offset, data in listed for n in (offset, len(data))]
    body = _pad(b"".join(b"%d\n" % n for n in numbers)) + b"".join(data for _, data in pieces)
    folder, _, base = name.rpartition(b"/")
    extra = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": name,
        b"GNU.sparse.realsize": b"%d" % size,
    }
    return entry(folder + b"/GNUSparseFile.0/" + base, data=body, extra=extra, **more)  # type: ignore[arg-type]


# --- xattr values ------------------------------------------------------------------------------------


def capability(permitted: int) -> bytes:
    """Return ``security.capability`` version 2, effective (capabilities(7))."""
    return struct.pack("<5I", 0x02000001, permitted, 0, 0, 0)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Return a POSIX ACL xattr of (tag, permissions, id), id 0xffffffff where it has none."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *item) for item in entries)


NO_ID = 0xFFFFFFFF
ACCESS_ACL = acl((1, 6, NO_ID), (2, 4, 1000), (4, 4, NO_ID), (8, 6, 33), (16, 6, NO_ID), (32, 4, NO_ID))
DEFAULT_ACL = acl((1, 7, NO_ID), (2, 7, 1), (4, 5, NO_ID), (16, 7, NO_ID), (32, 0, NO_ID))


def _content(seed: bytes, size: int) -> bytes:
    """Return ``size`` bytes that look random and are the same everywhere."""
    return hashlib.shake_128(seed).digest(size)


# --- the layers --------------------------------------------------------------------------------------


def layers(*, devices: bool = True) -> list[bytes]:
    """Return the uncompressed layer tars, bottom first."""
    return [bytes(_pad(tar) + bytes(2 * BLOCK)) for tar in (_base(devices), _app(), _chown(), _edits())]


def _base(devices: bool) -> bytes:
    long_path = b"usr/share/" + b"/".join((b"d" * 120, b"e" * 120, b"f" * 60))
    parts = [
        *(
            entry(name + b"/", DIR, mode=0o755)
            for name in (b"bin", b"dev", b"etc", b"etc/keep", b"etc/gone", b"home", b"opt", b"usr", b"usr/bin",
                         b"usr/lib", b"usr/share", b"var", b"var/log")
        ),
        entry(b"tmp/", DIR, mode=0o1777),
        entry(b"root/", DIR, mode=0o700),
        entry(b"home/user/", DIR, mode=0o750, uid=1000, gid=1000),
        entry(b"var/mail/", DIR, mode=0o2775, gid=33),
        entry(b"etc/passwd", data=b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"),
        entry(b"etc/shadow", data=b"root:*:19700:0:99999:7:::\n", mode=0o640, gid=33),
        entry(b"etc/empty"),
        entry(b"etc/hostname", data=b"tiny\n"),
        entry(b"etc/gone/one", data=b"hidden by an opaque directory\n"),
        entry(b"etc/gone/two", data=b"hidden as well\n", uid=33, gid=33),
        entry(b"etc/removed", data=b"removed by a whiteout\n"),
        entry(b"etc/again", data=b"removed and added again in one layer\n"),
        entry(b"etc/keep/.wh", data=b"a name that only looks like a whiteout\n"),
        entry(b"usr/bin/su", data=b"#!/bin/sh\necho setuid\n", mode=0o4755),
        entry(b"usr/bin/wall", data=b"#!/bin/sh\necho setgid\n", mode=0o2755, gid=1),
        entry(b"usr/bin/hello", data=b"#!/bin/sh\necho hello from the tiny image\n", mode=0o755),
        entry(b"usr/bin/ping", data=_content(b"ping", 3000), mode=0o755,
              xattrs={b"security.capability": capability(1 << 13)}),
        entry(b"usr/lib/lib.so.1.0", data=_content(b"lib", 70_000), mode=0o644),
        entry(b"usr/lib/lib.so.1", SYMLINK, link=b"lib.so.1.0", mode=0o777),
        entry(b"usr/lib/lib.so", SYMLINK, link=b"/usr/lib/lib.so.1", mode=0o777, uid=1000, gid=1000),
        entry(b"usr/lib/dangling", SYMLINK, link=b"../no/such/file", mode=0o777),
        entry(b"usr/lib/far", SYMLINK, link=b"/" + b"far/" * 40 + b"away", mode=0o777),
        entry(b"usr/lib/twin", data=_content(b"lib", 70_000), mode=0o600, uid=1, gid=1),
        entry(b"usr/share/link-a", data=b"one inode, three names\n", mode=0o664, uid=1000, gid=33),
        entry(b"usr/share/link-b", HARDLINK, link=b"usr/share/link-a", mode=0o664, uid=1000, gid=33),
        entry(b"usr/share/link-c", HARDLINK, link=b"usr/share/link-a", mode=0o664, uid=1000, gid=33),
        entry(b"usr/share/caf\xe9", data=b"a name in Latin-1\n"),
        entry(b"usr/share/\xff\xfe", DIR, mode=0o755),
        entry(b"usr/share/\xff\xfe/sp ace\ttab\nnewline", data=b"odd bytes\n"),
        entry("usr/share/日本語".encode(), data=b"a name in UTF-8\n"),
        entry(b"usr/share/" + b"d" * 120 + b"/", DIR, mode=0o755),
        entry(b"usr/share/" + b"/".join((b"d" * 120, b"e" * 120)) + b"/", DIR, mode=0o755),
        entry(long_path, data=b"a long path\n"),
        entry(b"usr/share/" + b"n" * 255, data=b"the longest name\n"),
        entry(b"usr/share/old", data=b"before 1970\n", mtime="-1.5"),
        entry(b"usr/share/precise", data=b"to the nanosecond\n", mtime=f"{EPOCH}.123456789"),
        entry(b"usr/share/epoch", data=b"zero\n", mtime="0"),
        sparse_entry(b"var/sparse", 1 << 20, [(0, _content(b"s0", 4096)), (512 << 10, _content(b"s1", 8192))]),
        sparse_entry(b"var/hole", 300_000, [], uid=33, gid=33, mode=0o600),
        entry(b"var/pipe", FIFO, mode=0o620, uid=1, gid=33),
        entry(b"var/nobody", data=b"65534\n", uid=65534, gid=65534),
    ]  # fmt: skip
    if devices:
        parts.append(entry(b"dev/null", CHAR, mode=0o666, device=(1, 3)))
    return b"".join(parts)


def _app() -> bytes:
    """Return the application's layer; its names begin with ``./``, as those of many builders do."""
    folder = {b"user.note": b"a directory"}
    return b"".join([
        entry(b"./", DIR, mode=0o755),
        entry(b"./opt/app/", DIR, mode=0o755, xattrs=folder),
        entry(b"./opt/app/data/", DIR, mode=0o750, xattrs={b"system.posix_acl_default": DEFAULT_ACL}),
        *(entry(b"./opt/app/data/%02d.bin" % n, data=_content(b"%d" % n, 1000 * n)) for n in range(12)),
        entry(b"./opt/app/run", data=b"#!/bin/sh\nexec echo running\n", mode=0o755),
        entry(b"./opt/app/shared", data=b"who may write this?\n", mode=0o664,
              xattrs={b"system.posix_acl_access": ACCESS_ACL}),
        entry(b"./opt/app/tagged", data=b"with xattrs\n",
              xattrs={b"user.binary": bytes(range(256)), b"user.note": "é".encode()}),
        entry(b"./var/log/app.log", data=b"started\n", uid=33, gid=33, mode=0o640),
        entry(b"./opt/app/becomes-dir", data=b"a file below, a directory above\n"),
        entry(b"./opt/app/becomes-link/", DIR, mode=0o755),
        entry(b"./opt/app/becomes-link/inner", data=b"goes with its directory\n"),
    ])  # fmt: skip


def _chown() -> bytes:
    """Return what ``chown -R 1000:1000 /opt/app`` and a chmod leave: every file once more."""
    ours = functools.partial(entry, uid=1000, gid=1000)
    return b"".join([
        ours(b"opt/app/", DIR, mode=0o755, xattrs={b"user.note": b"a directory"}),
        ours(b"opt/app/data/", DIR, mode=0o750, xattrs={b"system.posix_acl_default": DEFAULT_ACL}),
        *(ours(b"opt/app/data/%02d.bin" % n, data=_content(b"%d" % n, 1000 * n), mode=0o600)
          for n in range(12)),
        ours(b"opt/app/run", data=b"#!/bin/sh\nexec echo running\n", mode=0o755),
        ours(b"opt/app/shared", data=b"who may write this?\n", mode=0o664,
             xattrs={b"system.posix_acl_access": ACCESS_ACL}),
    ])  # fmt: skip


def _edits() -> bytes:
    return b"".join([
        entry(b"etc/.wh.removed"),
        entry(b"etc/.wh.again"),
        entry(b"etc/again", data=b"added again\n", uid=1, gid=1),
        entry(b"etc/gone/", DIR, mode=0o700, uid=33, gid=33),
        entry(b"etc/gone/.wh..wh..opq"),
        entry(b"etc/gone/three", data=b"the only one left\n"),
        # A directory over a directory: new attributes, old content.
        entry(b"etc/keep/", DIR, mode=0o711, gid=1000),
        # A changed file that was a hard link: its siblings keep the old inode.
        entry(b"usr/share/link-b", data=b"an inode of its own\n", mode=0o600, uid=1000, gid=1000),
        entry(b"opt/app/becomes-dir/", DIR, mode=0o755),
        entry(b"opt/app/becomes-dir/inside", data=b"under what was a file\n"),
        entry(b"opt/app/becomes-link", SYMLINK, link=b"data", mode=0o777),
        entry(b"opt/app/data/.wh.03.bin"),
    ])  # fmt: skip


# --- compression without an entropy stage ------------------------------------------------------------


def stored_gzip(data: bytes) -> bytes:
    """Return a gzip member of stored blocks (RFC 1951, 3.2.4)."""
    out = bytearray(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")
    for start in range(0, max(1, len(data)), 65535):
        piece = data[start : start + 65535]
        out += bytes([start + 65535 >= len(data)]) + struct.pack("<HH", len(piece), len(piece) ^ 0xFFFF) + piece
    return bytes(out + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF))


def stored_zstd(data: bytes) -> bytes:
    """Return a zstd frame of raw blocks (RFC 8878, 3.1.1)."""
    step = 1 << 17
    out = bytearray(struct.pack("<IBB", 0xFD2FB528, 0, 7 << 3))  # a window of 128 KiB
    for start in range(0, max(1, len(data)), step):
        piece = data[start : start + step]
        out += struct.pack("<I", len(piece) << 3 | (start + step >= len(data)))[:3] + piece
    return bytes(out)


_SUFFIX = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": stored_gzip, "zstd": stored_zstd, "none": bytes}


# --- the image ---------------------------------------------------------------------------------------


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _archive(files: dict[str, bytes]) -> bytes:
    tar = b"".join(entry(name.encode(), data=files[name], mtime="0") for name in sorted(files))
    return tar + bytes(2 * BLOCK)


def build(
    dest: Path, *, kind: str = "oci", compression: str = "gzip", devices: bool = True
) -> dict[str, str | list[str]]:
    """Write the image to ``dest`` and return its digests.

    Args:
        dest: a folder to make for ``oci``, else a file to write.
        kind: ``oci``, ``oci-archive`` or ``docker-archive`` (whose layers are never compressed).
        compression: of the layers: ``gzip``, ``zstd`` or ``none``.
        devices: with ``/dev/null``, which only a privileged unpacker can make.

    Returns:
        ``manifest`` and ``config`` digests, ``layers`` and ``diff_ids``, bottom first. For a docker
        archive ``manifest`` is the digest of ``manifest.json``.
    """
    tars = layers(devices=devices)
    diff_ids = [_digest(tar) for tar in tars]
    created = "2023-11-14T22:13:20Z"
    steps = ("base", "COPY app", "RUN chown -R 1000:1000 /opt/app", "RUN edits")
    config = _json({
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "config": {"Cmd": ["/usr/bin/hello"], "Env": ["PATH=/usr/bin:/bin"], "User": "1000:1000"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": created, "created_by": step} for step in steps],
    })  # fmt: skip
    if kind == "docker-archive":
        return _docker_archive(dest, config, tars, diff_ids)
    blobs = [_COMPRESS[compression](tar) for tar in tars]
    media_type = "application/vnd.oci.image.layer.v1.tar" + _SUFFIX[compression]
    manifest = _json({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _digest(config),
                   "size": len(config)},
        "layers": [{"mediaType": media_type, "digest": _digest(blob), "size": len(blob)} for blob in blobs],
    })  # fmt: skip
    index = _json({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": _digest(manifest),
                       "size": len(manifest), "annotations": {"org.opencontainers.image.ref.name": "latest"}}],
    })  # fmt: skip
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index}
    files |= {f"blobs/sha256/{_digest(data)[7:]}": data for data in (manifest, config, *blobs)}
    dest.parent.mkdir(parents=True, exist_ok=True)
    if kind == "oci-archive":
        dest.write_bytes(_archive(files))
    elif kind == "oci":
        for name, data in files.items():
            path = dest / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    else:
        raise ValueError(f"kind {kind!r}: want oci, oci-archive or docker-archive")
    return {
        "manifest": _digest(manifest),
        "config": _digest(config),
        "layers": [_digest(blob) for blob in blobs],
        "diff_ids": diff_ids,
    }


def _docker_archive(
    dest: Path, config: bytes, tars: list[bytes], diff_ids: list[str]
) -> dict[str, str | list[str]]:
    names = [f"{diff_id[7:]}.tar" for diff_id in diff_ids]
    config_name = f"{_digest(config)[7:]}.json"
    manifest = _json([{"Config": config_name, "RepoTags": [NAME], "Layers": names}])
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_bytes(
        _archive({config_name: config, "manifest.json": manifest, **dict(zip(names, tars, strict=True))})
    )
    return {
        "manifest": _digest(manifest),
        "config": _digest(config),
        "layers": diff_ids,
        "diff_ids": diff_ids,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the tiny sample image.")
    parser.add_argument("dest", type=Path, metavar="OUT")
    parser.add_argument("--kind", default="oci-archive", choices=("oci", "oci-archive", "docker-archive"))
    parser.add_argument("--compression", default="gzip", choices=tuple(_COMPRESS))
    parser.add_argument(
        "--no-devices", action="store_true", help="leave /dev/null out (for unprivileged unpackers)"
    )
    args = parser.parse_args()
    result = build(args.dest, kind=args.kind, compression=args.compression, devices=not args.no_devices)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
