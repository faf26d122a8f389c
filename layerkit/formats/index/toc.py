"""The tables of contents that eStargz and zstd:chunked layers carry, as indexes.

Both formats put a JSON document about all entries at the end of the blob, and its digest into the annotations of
the layer's descriptor (stargz-snapshotter, docs/estargz.md; containers/storage, pkg/chunked). It is read by two
small requests, and verified by that digest: the image's author vouches for it. Whether it says the truth about
the tar shows only when the layer is read, so the index is marked as unproven. A table knows neither where a file
lies in the tar nor which parts of it are holes, and eStargz's has no ACLs and whole seconds only.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import zstandard

from layerkit.formats.compression.zstd_chunked import TYPES
from layerkit.formats.index.check import check_index, mark_unproven
from layerkit.formats.strict_json import JsonObject, load_object
from layerkit.formats.tar import names as tar_names
from layerkit.formats.tar.reader import read_tar
from layerkit.idmap import MAX_ID
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.entry import WHITEOUT_PREFIX, Entry, Kind, XattrSet
from layerkit.model.errors import InvalidImage, UnsafeEntry
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT, Limits
from layerkit.model.ports import ReadRange

ESTARGZ_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
_CHUNKED = ("io.github.containers.zstd-chunked.", "io.containers.zstd-chunked.")

_FOOTER_BYTES = 51
_FOOTER = re.compile(rb"\x1f\x8b\x08\x04.{6}\x1a\x00SG\x16\x00([0-9a-f]{16})STARGZ.{13}", re.DOTALL)
_TOC_NAME = b"stargz.index.json"
_MOST_BYTES = 128 << 20
_MOST_PLAIN_BYTES = 1 << 30
_POSITION = re.compile(r"(\d{1,18}):(\d{1,18}):(\d{1,18}):1")
_KINDS = {text: kind for kind, text in TYPES.items()}
_EMPTY = bytes.fromhex(Digest.of(b"").hex)
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's table of contents is.

    Attributes:
        kind: ``estargz`` or ``zstd:chunked``.
        digest: of the JSON (eStargz), or of its compressed form (zstd:chunked).
        start: in the blob; 0 for eStargz, whose footer says it.
        length: of the compressed form, 0 for eStargz.
        plain: length of the JSON, 0 for eStargz.
    """

    kind: str
    digest: Digest
    start: int = 0
    length: int = 0
    plain: int = 0


def locate(layer: Descriptor) -> Place | None:
    """Return where the table of a layer is, None if its descriptor names none (or does so malformed)."""
    said = layer.annotations
    try:
        if ESTARGZ_DIGEST in said:
            return Place("estargz", Digest.parse(said[ESTARGZ_DIGEST]))
        for prefix in _CHUNKED:
            match = _POSITION.fullmatch(said.get(f"{prefix}manifest-position", ""))
            if match is not None:
                digest = Digest.parse(said.get(f"{prefix}manifest-checksum", ""))
                return Place("zstd:chunked", digest, *map(int, match.groups()))
    except InvalidImage:
        pass
    return None


def read(
    read_range: ReadRange, place: Place, layer: Descriptor, diff_id: Digest, *, limits: Limits = DEFAULT
) -> Index:
    """Return the index that a layer's table of contents makes, marked as unproven.

    Args:
        read_range: reads parts of the layer's blob.
        place: from :func:`locate`.
        layer: descriptor of the blob.
        diff_id: of the layer; nothing shows here that it is right.
        limits: bounds.

    Raises:
        DigestMismatch: the table is not the one that the descriptor names.
        InvalidImage: malformed, or with entries that no layer may have.
    """
    what = f"table of contents of layer {layer.digest}"
    if place.kind == "estargz":
        data, extra = _estargz(read_range, place, layer, what, limits)
    else:
        data, extra = _chunked(read_range, place, layer, what), []
    index = Index.of([*_entries(data, what, limits), *extra], diff_id)
    check_index(index, what, limits)
    return mark_unproven(index, f"its {place.kind} table of contents")


def _chunked(read_range: ReadRange, place: Place, layer: Descriptor, what: str) -> bytes:
    _check_place(place.start, place.length, place.plain, layer, what)
    packed = read_range(place.start, place.length)
    place.digest.verify(packed, what)
    try:
        plain = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed).read(place.plain + 1)
    except zstandard.ZstdError as error:
        raise InvalidImage(f"{what}: damaged zstd data ({error})") from None
    if len(plain) != place.plain:
        raise InvalidImage(f"{what}: {place.plain} bytes announced, found another number")
    return plain


def _estargz(
    read_range: ReadRange, place: Place, layer: Descriptor, what: str, limits: Limits
) -> tuple[bytes, list[Entry]]:
    """Return the JSON, and the entry that it has in the tar, which it does not list itself."""
    if layer.size <= _FOOTER_BYTES:
        raise InvalidImage(f"{what}: the blob is too short to have one")
    match = _FOOTER.fullmatch(read_range(layer.size - _FOOTER_BYTES, _FOOTER_BYTES))
    if match is None:
        raise InvalidImage(f"{what}: the blob does not end with the footer of eStargz")
    start = int(match[1], 16)
    length = layer.size - _FOOTER_BYTES - start
    _check_place(start, length, 0, layer, what)
    inflate = zlib.decompressobj(31)
    try:
        tar = inflate.decompress(read_range(start, length), _MOST_PLAIN_BYTES)
    except zlib.error as error:
        raise InvalidImage(f"{what}: damaged gzip data ({error})") from None
    if not inflate.eof:
        raise InvalidImage(f"{what}: more than {_MOST_PLAIN_BYTES} bytes, or cut off")
    inner = read_tar(tar, what, limits)
    rows = [e for e in inner.entries() if e.path == _TOC_NAME]
    if len(inner) != 1 or not rows:
        raise InvalidImage(f"{what}: want the one file {_TOC_NAME.decode()}")
    data = tar[rows[0].offset : rows[0].offset + rows[0].size]
    place.digest.verify(data, what)
    return data, [rows[0]._replace(offset=-1)]


def _check_place(start: int, length: int, plain: int, layer: Descriptor, what: str) -> None:
    if not 0 < length <= _MOST_BYTES or start < 0 or start + length > layer.size or plain > _MOST_PLAIN_BYTES:
        raise InvalidImage(f"{what}: said to be {length} bytes at {start} of {layer.size}")


def _entries(data: bytes, what: str, limits: Limits) -> Iterator[Entry]:
    """Yield the entries of the table (CRFS's JSON) in the document ``data``, in tar order, whiteouts told apart."""
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
        uid=_number(value, "uid", what, MAX_ID),
        gid=_number(value, "gid", what, MAX_ID),
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
