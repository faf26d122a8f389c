"""The tables of contents that eStargz and zstd:chunked layers carry, as indexes.

Both formats put a JSON document about all entries at the end of the blob, and its digest into the annotations of
the layer's descriptor (stargz-snapshotter, docs/estargz.md; containers/storage, pkg/chunked). It is read by two
small requests, and verified by that digest: the image's author vouches for it. Whether it says the truth about
the tar shows only when the layer is read, so the index is marked as unproven. A table knows neither where a file
lies in the tar nor which parts of it are holes, and eStargz's has no ACLs and whole seconds only.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import zstandard

from layerkit.formats.index import toc_entries
from layerkit.formats.index.check import check_index, mark_unproven
from layerkit.formats.tar.reader import read_tar
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry
from layerkit.model.errors import DigestMismatch, InvalidImage
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
    index = Index.of([*toc_entries.entries(data, what, limits), *extra], diff_id)
    check_index(index, what, limits)
    return mark_unproven(index, f"its {place.kind} table of contents")


def _chunked(read_range: ReadRange, place: Place, layer: Descriptor, what: str) -> bytes:
    _check_place(place.start, place.length, place.plain, layer, what)
    packed = read_range(place.start, place.length)
    _verify(packed, place.digest, what)
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
    _verify(data, place.digest, what)
    return data, [rows[0]._replace(offset=-1)]


def _check_place(start: int, length: int, plain: int, layer: Descriptor, what: str) -> None:
    if not 0 < length <= _MOST_BYTES or start < 0 or start + length > layer.size or plain > _MOST_PLAIN_BYTES:
        raise InvalidImage(f"{what}: said to be {length} bytes at {start} of {layer.size}")


def _verify(data: bytes, digest: Digest, what: str) -> None:
    hasher = digest.hasher()
    hasher.update(data)
    if hasher.hexdigest() != digest.hex:
        raise DigestMismatch(what, f"{digest.algorithm}:{hasher.hexdigest()}", str(digest))
