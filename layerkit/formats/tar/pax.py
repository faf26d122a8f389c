"""PAX extended headers (POSIX.1-2008 pax, "pax Extended Header") and what tar writers put into them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from typing import NamedTuple

from layerkit.formats.tar.acl import ACL_XATTRS, NamedIds, from_text
from layerkit.model.entry import XattrSet
from layerkit.model.errors import InvalidImage, LossyResult, UnsafeEntry
from layerkit.model.limits import Limits

Records = dict[bytes, bytes]
"""PAX records by keyword; of equal keywords the last, and the pairs of GNU.sparse 0.0 as one map."""

XATTR = b"SCHILY.xattr."
LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."
SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_OFFSET, _SPARSE_LENGTH = b"GNU.sparse.offset", b"GNU.sparse.numbytes"
_NAMESPACES = (b"user.", b"trusted.", b"security.", b"system.")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")
# What most PAX headers of real layers are, nothing but times and a long name. Times are whole seconds, or with all
# nine digits or one or two less (writers cut zeros off); each form stands with the one length that is right for it.
# GNU tar has the name first, Go and Python have it last.
_OTHER_TIME = (
    rb"(?:30 [ac]time=[0-9]{10}\.[0-9]{9}\n|20 [ac]time=[0-9]{10}\n|19 [ac]time=[0-9]{9}\n"
    rb"|29 [ac]time=[0-9]{10}\.[0-9]{8}\n|28 [ac]time=[0-9]{10}\.[0-9]{7}\n){0,2}"
)
_PATH = rb"([1-9][0-9]{1,3} path=[^\0\n]+\n)?"
_BODIES = re.compile(
    rb"\0(?:" + _PATH + _OTHER_TIME
    + rb"(?:(?:30 mtime=([0-9]{10})\.([0-9]{9})|20 mtime=([0-9]{10}))\n" + _OTHER_TIME + rb")?"
    + _PATH + rb"(?=\0)|([^\0]*))"
)  # fmt: skip
_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
_DIGITS_OF_LENGTH = 20
_LENGTHS = {b"%d" % length: length for length in range(1, 512)}


def parse(body: bytes, where: str, limits: Limits) -> Records:
    """Return the records of an extended header's ``body``: ``length SP keyword=value LF``, repeated.

    Raises:
        InvalidImage: malformed.
        LimitExceeded: more xattrs than an entry may have.
    """
    records = _lines(body)
    if records is None:
        records = dict(_records(body, where))
    if b"GNU.sparse.numbytes=" in body:
        # Version 0.0 repeats two keywords, which a dict cannot hold: keep them in 0.1's form.
        records[SPARSE_MAP] = _pairs_as_map(body, where, limits)
    if len(records) > limits.xattrs_per_entry:
        limits.check("xattrs_per_entry", sum(key.startswith(XATTR) for key in records), f"{where}: xattrs")
    return records


def _lines(body: bytes) -> Records | None:
    """Return the records of a body in which each of them is one line; None for all others."""
    records: Records = {}
    lines = body.split(b"\n")
    if lines.pop():
        return None
    for line in lines:
        digits, _, rest = line.partition(b" ")
        key, equals, value = rest.partition(b"=")
        if _LENGTHS.get(digits) != len(line) + 1 or not key or not equals:
            return None
        records[key] = value
    return records


def _records(body: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    pos, size = 0, len(body)
    while pos < size:
        space = body.find(b" ", pos, pos + _DIGITS_OF_LENGTH)
        digits = body[pos:space]
        if space < 0 or not digits.isdigit() or not int(digits):
            raise InvalidImage(f"{where}: a PAX record without a length: {body[pos : pos + 40]!r}")
        end = pos + int(digits)
        equals = body.find(b"=", space, end)
        if end > size or equals <= space + 1 or body[end - 1] != 0x0A:
            raise InvalidImage(f"{where}: a PAX record of the wrong form or length: {body[pos : pos + 40]!r}")
        yield body[space + 1 : equals], body[equals + 1 : end - 1]
        pos = end


def _pairs_as_map(body: bytes, where: str, limits: Limits) -> bytes:
    numbers: list[bytes] = []
    for key, value in _records(body, where):
        if key in (_SPARSE_OFFSET, _SPARSE_LENGTH):
            if (key == _SPARSE_LENGTH) != (len(numbers) % 2 == 1) or b"," in value:
                raise InvalidImage(f"{where}: the sparse map's offsets and lengths do not alternate")
            numbers.append(value)
    limits.check("sparse_extents_per_file", len(numbers) // 2, f"{where}: sparse extents")
    return b",".join(numbers)


def number(text: bytes, what: str, where: str) -> int:
    """Return a decimal PAX value that is not negative.

    Raises:
        InvalidImage: not of that form.
    """
    if not text.isdigit() or len(text) > _DIGITS_OF_LENGTH:
        raise InvalidImage(f"{where}: PAX {what} is {text[:40]!r}, want a whole number, not negative")
    return int(text)


def time(text: bytes, where: str) -> tuple[int, int]:
    """Return (seconds, nanoseconds) of a PAX time, exactly; digits beyond nanoseconds are cut off.

    Raises:
        InvalidImage: not a decimal number.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise InvalidImage(f"{where}: PAX mtime is {text[:40]!r}, want a decimal number")
    sign, whole, fraction = match.groups()
    seconds = int(whole)
    nanoseconds = int(fraction[:9].ljust(9, b"0")) if fraction else 0
    if sign:
        # -1.5 s is 2 s before 1970 and half a second on.
        return (-seconds - 1, 1_000_000_000 - nanoseconds) if nanoseconds else (-seconds, 0)
    return seconds, nanoseconds


class Common(NamedTuple):
    """What :func:`common` found, by place among the bodies; those at no place change nothing.

    Attributes:
        timed: places of the bodies with an mtime, its ``seconds`` and its ``nanoseconds``.
        named: places of the bodies with a path, and the ``names``.
        others: places of the bodies that are to be parsed.
    """

    timed: list[int]
    seconds: list[int]
    nanoseconds: list[int]
    named: list[int]
    names: list[bytes]
    others: list[int]


def common(bodies: list[bytes]) -> Common:
    """Look through ``bodies`` for those that say nothing, or nothing but a time and a name, in the common form."""
    joined = b"\0" + b"\0".join(bodies) + b"\0"
    found = Common([], [], [], [], [], [])
    if joined.count(b"\0") != len(bodies) + 1:
        found.others.extend(range(len(bodies)))
        return found
    timed, seconds, nanoseconds, named, names, others = found
    # One match for each body, from NUL to NUL; and an empty one for the NUL at the end.
    for i, (first, whole, fraction, alone, last, other) in enumerate(_BODIES.findall(joined)):
        if other:
            others.append(i)
            continue
        if record := first or last:
            digits, _, name = record.partition(b" path=")
            if int(digits) != len(record) or (first and last):
                others.append(i)
                continue
            named.append(i)
            names.append(name[:-1])
        if whole:
            timed.append(i)
            seconds.append(int(whole))
            nanoseconds.append(int(fraction))
        elif alone:
            timed.append(i)
            seconds.append(int(alone))
            nanoseconds.append(0)
    return found


def xattrs(records: Records, layer: str, path: bytes, limits: Limits) -> XattrSet:
    """Return the xattrs that ``records`` give the entry ``path`` of ``layer``, sorted by name.

    An empty value is an xattr with an empty value, unlike for other keywords, where it deletes.

    Raises:
        UnsafeEntry: a name outside the kernel's namespaces, or a value that cannot be decoded.
        LossyResult: an ACL that names users without their numbers.
        LimitExceeded: too many, too long, too large.
    """
    found: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(XATTR):
            name = key[len(XATTR) :]
            if b"%3D" in name or b"%25" in name:
                # GNU tar decodes these, Go and libarchive do not: nobody can say which xattr is meant.
                raise UnsafeEntry(layer, path, f"the xattr name {name!r} is read differently by each tool")
            found[name] = value
    for key, value in records.items():
        if key.startswith(LIBARCHIVE_XATTR):
            name = _PERCENT.sub(lambda m: bytes((int(m[1], 16),)), key[len(LIBARCHIVE_XATTR) :])
            if name not in found:
                found[name] = _base64(value, name, layer, path)
        elif (name := ACL_XATTRS.get(key, b"")) and name not in found and (acl := _acl(key, value, layer, path)):
            found[name] = acl
    where = f"{layer}: an xattr"
    limits.check("xattrs_per_entry", len(found), where + "s of one entry")
    for name, value in found.items():
        if b"\0" in name or not name.startswith(_NAMESPACES) or (name.endswith(b".") and name in _NAMESPACES):
            why = f"the xattr name {name[:80]!r} is in none of the namespaces user, trusted, security, system"
            raise UnsafeEntry(layer, path, why)
        limits.check("xattr_name_bytes", len(name), where + " name")
        limits.check("xattr_value_bytes", len(value), where + " value")
    return tuple(sorted(found.items()))


def _base64(value: bytes, name: bytes, layer: str, path: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as e:
        raise UnsafeEntry(layer, path, f"the value of xattr {name!r} is not base64") from e


def _acl(key: bytes, value: bytes, layer: str, path: bytes) -> bytes:
    try:
        return from_text(value)
    except NamedIds as e:
        raise LossyResult(path, f"{key.decode()} in {layer}: {e}; write the layer with numeric ids") from e
    except ValueError as e:
        raise UnsafeEntry(layer, path, f"{key.decode()}: {e}") from e
