"""The outer tar of an image archive: its member table, and members read where they lie, never extracted.

Nothing of an archive ever becomes a path of this host: names are keys of a table, and links (old ``docker
save`` writes a repeated layer as ``b/layer.tar -> ../a/layer.tar``) are followed inside that table alone.
"""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
from typing import BinaryIO, NamedTuple

import tarsafe

from layerkit.images.oci.blobs import FileRange, compression, inflated, read_all, spool
from layerkit.model.errors import InvalidImage, LimitExceeded, NotFound, UnsafeEntry
from layerkit.model.limits import DEFAULT, Limits

_LINKS_FOLLOWED = 40


class Member(NamedTuple):
    """A regular file of the archive: its bytes are ``size`` bytes from ``offset``."""

    offset: int
    size: int


class _Guarded(io.RawIOBase):
    """What tarfile reads headers through: a header that claims gigabytes is refused before memory is taken."""

    def __init__(self, fd: int, what: str, limits: Limits) -> None:
        self._fd, self._what, self._limits, self._at = fd, what, limits, 0

    def read(self, count: int = -1, /) -> bytes:
        if count < 0 or count > self._limits.pax_header_bytes:
            raise LimitExceeded(
                "pax_header_bytes", count, self._limits.pax_header_bytes, f"{self._what}: a tar header"
            )
        data = os.pread(self._fd, count, self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence != os.SEEK_SET or offset < 0:
            raise InvalidImage(f"{self._what}: a tar member has a negative size")
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class _CheckedTar(tarsafe.TarSafe):  # type: ignore[misc]
    # Nothing is extracted; Python 3.12 and 3.13 warn about an extractall() that names no filter, which
    # Debian 12's Python 3.11.2 does not have.
    if hasattr(tarfile, "data_filter"):
        extraction_filter = staticmethod(tarfile.data_filter)


class OuterTar:
    """An image archive, opened for reading; safe to use from several threads.

    Attributes:
        what: the archive's name in messages.
    """

    def __init__(
        self, file: BinaryIO, what: str, *, limits: Limits = DEFAULT, tmp: str | os.PathLike[str] | None = None
    ) -> None:
        """Take over ``file`` (seekable) and read its member table; a compressed one is spooled into ``tmp``.

        Raises:
            InvalidImage: no tar, cut off, a name twice, sparse members.
            UnsafeEntry: a name or link that leads outside the archive, a device.
            LimitExceeded: too many members, too large.
        """
        self.what, self._limits, self._file = what, limits, file
        try:
            self._file = _plain(file, what, limits, tmp)
            self._fd = self._file.fileno()
            self._members: dict[str, Member] = {}
            self._symlinks: dict[str, str] = {}
            self._read_table()
        except BaseException:
            self.close()
            raise

    def _read_table(self) -> None:
        end = os.fstat(self._fd).st_size
        guarded = _Guarded(self._fd, self.what, self._limits)
        hardlinks: dict[str, str] = {}
        try:
            with _CheckedTar.open(fileobj=guarded, mode="r:", errorlevel=2) as tar:
                for count, info in enumerate(tar, 1):
                    self._limits.check("archive_members", count, f"{self.what}: members")
                    self._take(info, end, hardlinks)
                if not self._symlinks and not hardlinks:
                    # TarSafe checks the whole table at its extractall(), here of no member at all. It knows
                    # only whether links leave the folder, and would refuse the harmless ones of docker save.
                    tar.extractall("/layerkit-archive", members=[])
        except tarsafe.TarSafeException as error:
            raise InvalidImage(f"{self.what}: unsafe archive: {error}") from None
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise InvalidImage(f"{self.what}: not a readable tar archive: {error}") from None
        for name, target in hardlinks.items():
            found = self._members.get(target)
            if found is None:
                raise UnsafeEntry(self.what, _raw(name), f"hard link to {target!r}, which is no file before it")
            self._members[name] = found

    def _take(self, info: tarfile.TarInfo, end: int, hardlinks: dict[str, str]) -> None:
        name = self._inside(info.name, "", info.name)
        if info.isdir():
            return
        if not name:
            raise UnsafeEntry(self.what, _raw(info.name), "a file cannot be the archive's root")
        if name in self._members or name in self._symlinks or name in hardlinks:
            raise InvalidImage(f"{self.what}: {name!r} occurs twice; readers would disagree on which one counts")
        if info.issparse():
            raise InvalidImage(f"{self.what}: {name!r} is stored sparse; write the archive without --sparse")
        if info.issym():
            folder = posixpath.dirname(name)
            self._symlinks[name] = self._inside(info.linkname, folder, info.name)
        elif info.islnk():
            hardlinks[name] = self._inside(info.linkname, "", info.name)
        elif info.isreg():
            if info.size < 0 or info.offset_data + info.size > end:
                raise InvalidImage(
                    f"{self.what}: {name!r} claims {info.size} bytes from {info.offset_data}, "
                    f"but the archive ends at {end}; it is damaged or cut off"
                )
            self._members[name] = Member(info.offset_data, info.size)
        else:
            raise UnsafeEntry(
                self.what, _raw(info.name), "neither file, folder nor link; image archives hold no such"
            )

    def _inside(self, path: str, folder: str, member: str) -> str:
        """Return ``path`` (relative to ``folder``) without ``.`` and ``..``; it must stay in the archive."""
        if path.startswith("/"):
            raise UnsafeEntry(self.what, _raw(member), f"absolute path {path!r} in an image archive")
        parts: list[str] = folder.split("/") if folder else []
        for part in path.split("/"):
            if part == "..":
                if not parts:
                    raise UnsafeEntry(self.what, _raw(member), f"{path!r} leads outside the archive")
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        return "/".join(parts)

    def find(self, name: str) -> Member | None:
        """Return the file ``name``, links followed inside the archive, or None."""
        for _ in range(_LINKS_FOLLOWED):
            if name in self._members:
                return self._members[name]
            target = self._symlinks.get(name)
            if target is None:
                return None
            name = target
        raise InvalidImage(f"{self.what}: {name!r}: links that lead in a circle")

    def member(self, name: str, needed_by: str) -> Member:
        """Return the file ``name``; ``needed_by`` says in the error what asks for it.

        Raises:
            InvalidImage: there is none.
        """
        found = self.find(name)
        if found is None:
            link = " (its link leads to nothing)" if name in self._symlinks else ""
            raise InvalidImage(f"{self.what}: {needed_by} names {name!r}, which is not in the archive{link}")
        return found

    def open(self, member: Member) -> FileRange:
        """Open a member for reading from its start."""
        if self._file.closed:
            raise NotFound(f"{self.what}: the archive has been closed")
        return FileRange(self._fd, member.offset, member.size)

    def read(self, member: Member, limit: str, what: str) -> bytes:
        """Return a small member whole; ``limit`` names the bound on its size."""
        self._limits.check(limit, member.size, what)
        return read_all(self.open(member), member.size, what, limit)

    def head(self, member: Member, count: int = 16) -> bytes:
        """Return the first ``count`` bytes of a member."""
        return os.pread(self._fd, min(count, member.size), member.offset)

    def close(self) -> None:
        """Close the archive; readers that are open stay so."""
        self._file.close()


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _plain(file: BinaryIO, what: str, limits: Limits, tmp: str | os.PathLike[str] | None) -> BinaryIO:
    """Return ``file``, or where it is compressed a spool with its content (and close ``file``)."""
    fd = file.fileno()
    kind = compression(os.pread(fd, 16, 0))
    if not kind:
        return file
    size = os.fstat(fd).st_size
    with file:
        return spool(inflated(FileRange(fd, 0, size), kind, what, limits), tmp, limits.layer_tar_bytes, what)
