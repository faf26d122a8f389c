"""The entries of a table of contents (CRFS's JSON, as eStargz and zstd:chunked use it) as those of an index."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from datetime import UTC, datetime

from layerkit.formats.strict_json import JsonObject, load_object
from layerkit.formats.tar import names as tar_names
from layerkit.model.digest import Digest
from layerkit.model.entry import WHITEOUT_PREFIX, Entry, Kind, XattrSet
from layerkit.model.errors import InvalidImage, UnsafeEntry
from layerkit.model.limits import DEFAULT, Limits

_KINDS = {
    "dir": Kind.DIR, "reg": Kind.REG, "symlink": Kind.SYMLINK, "hardlink": Kind.HARDLINK,
    "char": Kind.CHAR, "block": Kind.BLOCK, "fifo": Kind.FIFO,
}  # fmt: skip
_EMPTY = bytes.fromhex(Digest.of(b"").hex)
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def entries(data: bytes, what: str, limits: Limits = DEFAULT) -> Iterator[Entry]:
    """Yield the entries of the table in the JSON document ``data``, in tar order, whiteouts told apart.

    Raises:
        UnsafeEntry: a name that cannot be, or that JSON has mangled.
        InvalidImage: malformed.
    """
    document = load_object(data, what, limits)
    listed = document.get("entries")
    if document.get("version") != 1 or not isinstance(listed, list):
        raise InvalidImage(f"{what}: want version 1 and a list of entries")
    limits.check("entries_per_layer", len(listed), f"{what}: entries")
    for place, value in enumerate(listed):
        if not isinstance(value, dict):
            raise InvalidImage(f"{what}: entries[{place}]: want a JSON object")
        if value.get("type") == "chunk":
            continue
        entry = _entry(value, f"{what}: entries[{place}]", limits)
        if entry is not None:
            yield entry


def _entry(value: JsonObject, what: str, limits: Limits) -> Entry | None:
    kind = _KINDS.get(str(value.get("type")))
    if kind is None:
        raise InvalidImage(f"{what}: type {value.get('type')!r}: not known")
    path = tar_names.normalise(_name(value.get("name"), what), what)
    if WHITEOUT_PREFIX in path:
        meant = tar_names.whiteout(path, kind, what)
        if meant is None:
            return None
        path, kind = meant
    if kind >= Kind.WHITEOUT:
        return Entry(path, kind, perm=0)
    link = b""
    if kind in (Kind.SYMLINK, Kind.HARDLINK):
        link = _name(value.get("linkName"), what)
        if kind is Kind.HARDLINK:
            # The inode's attributes are those of its first name.
            return Entry(path, kind, perm=0, link=tar_names.target(link, path, what, limits))
    size = _number(value, "size", what, 1 << 62) if kind is Kind.REG else 0
    seconds, nanoseconds = _time(value.get("modtime"), what)
    device = kind in (Kind.CHAR, Kind.BLOCK)
    return Entry(
        path=path,
        kind=kind,
        perm=_number(value, "mode", what, 1 << 32) & 0o7777,
        uid=_number(value, "uid", what, (1 << 32) - 1),
        gid=_number(value, "gid", what, (1 << 32) - 1),
        mtime=seconds,
        mtime_ns=nanoseconds,
        size=size,
        major=_number(value, "devMajor", what, (1 << 32) - 1) if device else 0,
        minor=_number(value, "devMinor", what, (1 << 32) - 1) if device else 0,
        link=link,
        xattrs=_xattrs(value.get("xattrs"), what),
        sha256=_sha256(value.get("digest"), size, what) if kind is Kind.REG else b"",
    )


def _name(value: object, what: str) -> bytes:
    if not isinstance(value, str) or not value:
        raise InvalidImage(f"{what}: want a name")
    name = value.encode("utf-8", "surrogatepass")
    if "\ufffd" in value:
        # Go writes this for every byte that is no UTF-8: the real name is lost.
        raise UnsafeEntry(what, name, "a name that is no UTF-8, which a table of contents cannot hold")
    return name


def _number(value: JsonObject, key: str, what: str, most: int) -> int:
    found = value.get(key, 0)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= most:
        raise InvalidImage(f"{what}: {key}: want a number from 0 to {most}, found {str(found)[:40]}")
    return found


def _time(value: object, what: str) -> tuple[int, int]:
    if value is None or value == "":
        return 0, 0
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise InvalidImage(f"{what}: modtime {str(value)[:40]!r}: want RFC 3339")
    try:
        moment = datetime.fromisoformat(match[1] + match[3])
    except ValueError as error:
        raise InvalidImage(f"{what}: modtime {match[0]!r}: {error}") from None
    since = moment - _EPOCH
    return since.days * 86400 + since.seconds, int((match[2] or "0").ljust(9, "0"))


def _xattrs(value: object, what: str) -> XattrSet:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise InvalidImage(f"{what}: xattrs: want a JSON object")
    found = []
    for name, text in value.items():
        try:
            found.append((_name(name, what), base64.b64decode(str(text), validate=True)))
        except binascii.Error:
            raise InvalidImage(f"{what}: xattrs[{name[:80]!r}]: want base64") from None
    return tuple(sorted(found))


def _sha256(value: object, size: int, what: str) -> bytes:
    if size == 0:
        return _EMPTY
    digest = Digest.parse(value) if isinstance(value, str) else None
    if digest is None or digest.algorithm != "sha256":
        raise InvalidImage(f"{what}: digest: want sha256 of the file's content")
    return bytes.fromhex(digest.hex)
