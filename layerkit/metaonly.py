"""Tree to metadata layer. The only place where names and values of overlay xattrs are written.

A metadata layer (META) is a tree whose non-empty regular files are *stubs*: no data, but the two xattrs
``overlay.metacopy`` and ``overlay.redirect`` that send the kernel to the data (Documentation/filesystems/
overlayfs.rst, "Metadata only copy up" and "Data-only lower layers"). Its renderings are in ``formats.meta``.
numpy is loaded where a tree is: programs that only name xattrs have to start quickly.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from enum import StrEnum
from stat import S_IFCHR, S_ISCHR
from typing import TYPE_CHECKING

from layerkit.model import acl_caps
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.errors import InvalidImage, LossyResult, UnsafeEntry, show_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layerkit.model.strings import Strings
    from layerkit.model.tree import Tree

METACOPY, REDIRECT, OPAQUE, ORIGIN, IMPURE, WHITEOUT = (
    b"metacopy", b"redirect", b"opaque", b"origin", b"impure", b"whiteout",
)  # fmt: skip
"""What overlayfs calls its xattrs; :meth:`Namespace.xattr` makes whole names of them."""

OWNERS = b"layerkit"
"""Our own among them, which a mount hides: the map that the owners of an upper on disk were made under."""

METACOPY_VALUE = b"\0\4\0\0"
"""``{version 0, length 4, flags 0, no digest}``: an EMPTY value is lost by several runtimes' unpackers."""

METACOPY_EMPTY = b""
"""The same in four bytes less, for a folder of ours: with more, xattrs would leave an ext4 inode of 256 bytes."""

YES = b"y"
"""Of OPAQUE: what is below is hidden. Of IMPURE: entries may have been copied up."""

HOLDS_WHITEOUTS = b"x"
"""Of OPAQUE: empty files in the folder that are marked WHITEOUT are whiteouts."""

WHITEOUT_MODE, WHITEOUT_DEVICE = S_IFCHR, 0
"""What a whiteout is made of: a character device 0:0."""

REDIRECT_BYTES = 24
"""Length of every redirect: short enough to stay inside an ext4 inode of 256 bytes."""

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_ESCAPE = b"overlay."
_XATTR_NAME_MAX = 255
_REDIRECT_MAX = 4095
_MAJOR_MAX, _MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1


class Namespace(StrEnum):
    """Which xattrs the kernel reads stubs from: ``user`` under the mount option ``userxattr``."""

    TRUSTED = "trusted"
    USER = "user"

    @property
    def prefix(self) -> bytes:
        """Return ``trusted.overlay.`` or ``user.overlay.``."""
        return self.value.encode() + b"." + _ESCAPE

    def xattr(self, mark: bytes) -> bytes:
        """Return the whole name of METACOPY and so on."""
        return self.prefix + mark

    def stub(self, redirect: bytes = b"") -> dict[bytes, bytes]:
        """Return the xattrs of a stub whose data lies at ``redirect``, or at the stub's own path below it."""
        xattrs = {self.xattr(METACOPY): METACOPY_VALUE}
        return xattrs | {self.xattr(REDIRECT): redirect} if redirect else xattrs

    def escaped(self, name: bytes) -> bytes:
        """Return the name under which a layer holds the image's xattr ``name`` for a mount to show it."""
        return self.prefix + _ESCAPE + name[len(self.prefix) :] if name.startswith(self.prefix) else name


_PREFIXES = tuple(namespace.prefix for namespace in Namespace)


def own_mark(name: bytes, namespace: Namespace | None = None) -> bytes | None:
    """Return METACOPY and so on for an xattr of overlayfs itself, None for what is the image's.

    Args:
        name: as it lies in a layer on disk.
        namespace: the one that counts; None for either.
    """
    for prefix in _PREFIXES if namespace is None else (namespace.prefix,):
        if name.startswith(prefix) and not name.startswith(_ESCAPE, len(prefix)):
            return name[len(prefix) :]
    return None


def unescaped(name: bytes) -> bytes:
    """Return the image's name of an xattr that lies as ``name`` in a layer on disk."""
    for prefix in _PREFIXES:
        if name.startswith(prefix + _ESCAPE):
            return prefix + name[len(prefix) + len(_ESCAPE) :]
    return name


def is_whiteout(mode: int, device: int) -> bool:
    """Return whether an entry with this ``st_mode`` and ``st_rdev`` is a whiteout to the kernel."""
    return S_ISCHR(mode) and device == WHITEOUT_DEVICE


@dataclass(frozen=True, slots=True)
class MetadataLayer:
    """A tree ready to be rendered.

    Attributes:
        tree: owners and xattrs as the mount shows them, overlay xattrs of the image escaped;
            capabilities always in their v3 form, whose length no id map changes.
        namespace: where the stubs' xattrs live.
        places: None: data is found by its content. Else m strings, by inode: the absolute path of its data in
            the data-only layers, or ``b""`` for data at the stub's own path in the layers beneath.
    """

    tree: Tree
    namespace: Namespace
    places: Strings | None = None

    @property
    def is_stub(self) -> NDArray[np.bool_]:
        """Return bool (m,): the inodes whose data lies elsewhere."""
        return self.tree.has_content

    @property
    def redirect_bytes(self) -> NDArray[np.int64]:
        """Return int64 (m,): the length of the redirect of each inode, 0 for one that has none."""
        lengths = REDIRECT_BYTES if self.places is None else self.places.lengths
        return lengths * self.is_stub.astype("i8")

    def redirects_of(self, inodes: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return uint8 (k, bytes): the redirects of stubs that are all equally long."""
        import numpy as np

        if self.places is None:
            return redirects(self.tree.sha256[inodes])
        return np.frombuffer(self.places.take(inodes).blob, np.uint8).reshape(len(inodes), -1)

    def redirect_list(self, inodes: NDArray[np.integer]) -> list[bytes]:
        """Return the redirect of each of ``inodes``, ``b""`` where there is none."""
        if self.places is not None:
            return self.places.take(inodes).tolist()
        text = redirects(self.tree.sha256[inodes]).tobytes()
        return [text[at : at + REDIRECT_BYTES] for at in range(0, len(text), REDIRECT_BYTES)]


def redirects(sha256: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8 (k, 24): for each of the (k, 32) digests the absolute path of its data.

    ``/:x/`` + 20 characters: the first 126 bits of the digest in base64url, the first character in the
    place of ``x``, so that data spreads over 64 folders.
    """
    import numpy as np

    high, low = _words(sha256)
    alphabet = np.frombuffer(_ALPHABET, np.uint8)
    out = np.empty((len(sha256), REDIRECT_BYTES), np.uint8)
    out[:, 0] = out[:, 3] = ord("/")
    out[:, 1] = ord(":")
    six = np.uint64(63)
    for place in range(21):
        shift = 58 - 6 * place
        if shift >= 0:
            code = high >> np.uint64(shift)
        elif shift > -6:  # the one character whose bits lie in both words
            code = (high << np.uint64(-shift)) | (low >> np.uint64(64 + shift))
        else:
            code = low >> np.uint64(64 + shift)
        out[:, 2 if place == 0 else 3 + place] = alphabet[code & six]
    return out


def encode_devices(major: NDArray[np.uint32], minor: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return device numbers in the kernel's "new" 32-bit encoding (``new_encode_dev``), which has room for them."""
    return (minor & 0xFF | major << 8 | (minor & 0xFFFFFF00) << 12).astype("u4")


def data_path(sha256: bytes) -> bytes:
    """Return :func:`redirects` of one digest without the leading slash: its path under a data root."""
    text = base64.urlsafe_b64encode(sha256)[:21]
    return b":" + text[:1] + b"/" + text[1:]


def metadata_layer(
    tree: Tree, namespace: Namespace = Namespace.TRUSTED, *, strict: bool = False, places: Strings | None = None
) -> MetadataLayer:
    """Return the metadata layer of ``tree`` (whose owners are already mapped, if they are to be).

    A mount of the result shows the tree's xattrs as they were, those in the overlay namespaces included:
    the kernel hides and acts on ``overlay.*`` of its own namespace only, and shows ``overlay.overlay.X``
    there as ``overlay.X`` (overlayfs.rst, "Nesting overlayfs mounts"), so names of ``namespace`` get one
    level of escaping; names of the other one pass through it untouched and have no effect. That is why a
    metadata layer must never be mounted in the namespace that it was not made for.

    Args:
        tree: what the mount is to show.
        namespace: ``trusted`` for privileged mounts, ``user`` for ``userxattr`` ones.
        strict: refuse overlay xattrs of the image, in either namespace, instead of escaping them.
        places: where each inode's data lies, see :class:`MetadataLayer`; None finds it by content.

    Raises:
        UnsafeEntry: ``strict``, and the image brings overlay xattrs of its own.
        LossyResult: something that no mount of a metadata layer can show: a character device 0:0 (the
            kernel's whiteout), a device number beyond 12 + 20 bits, a top folder with a reserved name,
            a ``user.`` xattr on what is neither file nor directory, an ACL that the kernel refuses, an
            overlay xattr whose escaped name is above 255 bytes or whose own name is empty.
        InvalidImage: two contents whose short names are equal.
    """
    from layerkit.model.trees.as_kept import as_kept

    _check_expressible(tree)
    tree = as_kept(tree)
    if places is None:
        _check_top_names(tree)
        _check_names_unique(tree)
    else:
        beyond = tree.has_content & (places.lengths > _REDIRECT_MAX)
        tree.refuse(beyond, f"its data lies under a path above {_REDIRECT_MAX} bytes, which no redirect can hold")
    sets = []
    for row, pairs in enumerate(tree.xattr_sets):
        try:
            sets.append(_escaped(pairs, namespace, strict))
        except ValueError as reason:
            path = tree.inode_path(int((tree.xattr == row).argmax()))
            if strict:
                raise UnsafeEntry("image", path, str(reason)) from None
            raise LossyResult(path, str(reason)) from None
    return MetadataLayer(replace(tree, xattr_sets=tuple(sets)), namespace, places)


def _escaped(pairs: XattrSet, namespace: Namespace, strict: bool) -> XattrSet:
    """Return ``pairs`` with overlay names of ``namespace`` escaped one level and capabilities as v3."""
    out = []
    for name, value in pairs:
        if name.startswith(_PREFIXES):
            if strict:
                raise ValueError(f"brings the overlay xattr {show_path(name)} of its own, refused under --strict")
            shown, name = name, namespace.escaped(name)
            if shown == namespace.prefix:
                # The kernel lists it through an overlay and refuses to read it: EINVAL, there is no suffix.
                raise ValueError(f"the xattr {show_path(shown)} cannot be read through an overlay mount")
            if name != shown and len(name) > _XATTR_NAME_MAX:
                raise ValueError(
                    f"the xattr {show_path(shown)} is too long to be escaped ({len(name)} > 255 bytes)"
                )
        elif name == acl_caps.CAPABILITY_NAME:
            # Patching a map into a rendered META needs the room from the start.
            try:
                value = acl_caps.capability_with_rootid(value)
            except InvalidImage as error:
                raise ValueError(f"has {error}, which no kernel stores") from None
        out.append((name, value))
    return tuple(sorted(out))


def _check_expressible(tree: Tree) -> None:
    import numpy as np

    kind = tree.kind
    whiteout = (kind == Kind.CHAR) & (tree.major == 0) & (tree.minor == 0)
    tree.refuse(whiteout, "a character device 0:0 is a whiteout to overlayfs and would be invisible")
    beyond = ((kind == Kind.CHAR) | (kind == Kind.BLOCK)) & ((tree.major > _MAJOR_MAX) | (tree.minor > _MINOR_MAX))
    tree.refuse(beyond, lambda i: f"the kernel has no device {tree.major[i]}:{tree.minor[i]} (12 and 20 bits)")
    users = [row for row, pairs in enumerate(tree.xattr_sets) if any(n.startswith(b"user.") for n, _ in pairs)]
    odd = np.isin(tree.xattr, users) & (kind != Kind.REG) & (kind != Kind.DIR)
    tree.refuse(odd, "the kernel has no user xattrs on anything but files and directories")


def _check_top_names(tree: Tree) -> None:
    for row in (tree.parent == 0).nonzero()[0].tolist():
        name = tree.name[row]
        if len(name) == 2 and name[:1] == b":" and name[1:] in _ALPHABET:
            raise LossyResult(name, "a top folder of this name is reserved for the data of stubs")


def _words(sha256: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the first 16 bytes of each (k, 32) digest as two big-endian words of native type."""
    import numpy as np

    pairs = np.ascontiguousarray(sha256[:, :16]).view(">u8").astype(np.uint64)
    return pairs[:, 0], pairs[:, 1] & ~np.uint64(3)


def _check_names_unique(tree: Tree) -> None:
    import numpy as np

    stubs = np.flatnonzero(tree.has_content)
    high, low = _words(tree.sha256[stubs])
    # One sort of the first word leaves almost nothing: only rows that share it go through the rest.
    order = np.argsort(high)
    same = high[order[1:]] == high[order[:-1]]
    shared = np.zeros(len(order), np.bool_)
    shared[1:] |= same
    shared[:-1] |= same
    rows = order[shared]
    rows = rows[np.lexsort((low[rows], high[rows]))]
    a, b = rows[:-1], rows[1:]
    equal_names = (high[a] == high[b]) & (low[a] == low[b])
    clash = equal_names & (tree.sha256[stubs[a]] != tree.sha256[stubs[b]]).any(axis=1)
    if clash.any():
        at = int(clash.argmax())
        first, second = (show_path(tree.inode_path(int(stubs[side[at]]))) for side in (a, b))
        raise InvalidImage(
            f"{first} and {second} differ but share the first 126 bits of their sha256: "
            "such a pair is made on purpose; do not use this image"
        )
