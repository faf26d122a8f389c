"""Tree to metadata layer. The only place where overlay xattrs are minted.

A metadata layer (META) is a tree whose non-empty regular files are *stubs*: no data, but the two xattrs
``overlay.metacopy`` and ``overlay.redirect`` that send the kernel to the data (Documentation/filesystems/
overlayfs.rst, "Metadata only copy up" and "Data-only lower layers"). Its renderings are in ``emit``.
"""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from layerkit.errors import InvalidImage, LossyResult, UnsafeEntry
from layerkit.model.entry import Kind, XattrSet
from layerkit.model.tree import Tree

REDIRECT_BYTES = 24
"""Length of every redirect: short enough to stay inside an ext4 inode of 256 bytes."""

METACOPY_VALUE = b"\0\4\0\0"
"""``{version 0, length 4, flags 0, no digest}``: an EMPTY value is lost by several runtimes' unpackers."""

_ALPHABET = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)
_CAPABILITY = b"security.capability"


class Namespace(StrEnum):
    """Which xattrs the kernel reads stubs from: ``user`` under the mount option ``userxattr``."""

    TRUSTED = "trusted"
    USER = "user"

    @property
    def prefix(self) -> bytes:
        """Return ``trusted.overlay.`` or ``user.overlay.``."""
        return self.value.encode() + b".overlay."


@dataclass(frozen=True, slots=True)
class MetadataLayer:
    """A tree ready to be rendered.

    Attributes:
        tree: owners and xattrs as the mount shows them, overlay xattrs of the image escaped;
            capabilities always in their v3 form, whose length no id map changes.
        namespace: where the stubs' xattrs live.
    """

    tree: Tree
    namespace: Namespace

    @property
    def is_stub(self) -> NDArray[np.bool_]:
        """Return bool (m,): the inodes whose data lies elsewhere: regular files that are not empty."""
        stubs: NDArray[np.bool_] = (self.tree.kind == Kind.REG) & (self.tree.size > 0)
        return stubs

    def redirects(self) -> NDArray[np.uint8]:
        """Return uint8 (stubs, 24): the redirect of each stub, in inode order."""
        return redirects(self.tree.sha256[self.is_stub])


def redirects(sha256: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return uint8 (k, 24): for each of the (k, 32) digests the absolute path of its data.

    ``/:x/`` + 20 characters: the first 126 bits of the digest in base64url, the first character in the
    place of ``x``, so that data spreads over 64 folders.
    """
    bits = np.unpackbits(np.ascontiguousarray(sha256[:, :16]), axis=1)[:, :126].reshape(-1, 21, 6)
    letters = _ALPHABET[(bits << np.arange(5, -1, -1, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)]
    out = np.empty((len(sha256), REDIRECT_BYTES), np.uint8)
    out[:, 0] = out[:, 3] = ord("/")
    out[:, 1] = ord(":")
    out[:, 2] = letters[:, 0]
    out[:, 4:] = letters[:, 1:]
    return out


def data_path(sha256: bytes) -> bytes:
    """Return :func:`redirects` of one digest without the leading slash: its path under a data root."""
    text = base64.urlsafe_b64encode(sha256)[:21]
    return b":" + text[:1] + b"/" + text[1:]


def metadata_layer(tree: Tree, namespace: Namespace = Namespace.TRUSTED, *, strict: bool = False) -> MetadataLayer:
    """Return the metadata layer of ``tree`` (whose owners are already mapped, if they are to be).

    Args:
        tree: what the mount is to show.
        namespace: ``trusted`` for privileged mounts, ``user`` for ``userxattr`` ones.
        strict: refuse overlay xattrs of the image instead of escaping them.

    Raises:
        UnsafeEntry: ``strict``, and the image brings overlay xattrs of its own.
        LossyResult: something a metadata layer cannot express: a character device 0:0 (the kernel's
            whiteout), or a top folder with a reserved name.
        InvalidImage: two contents whose short names are equal.
    """
    _check_expressible(tree)
    _check_names_unique(tree)
    sets = tuple(_escaped(pairs) for pairs in tree.xattr_sets)
    if strict and sets != tuple(_escaped(pairs, escape=False) for pairs in tree.xattr_sets):
        row = next(r for r, (a, b) in enumerate(zip(sets, tree.xattr_sets, strict=True))
                   if [n for n, _ in a] != [n for n, _ in b])  # fmt: skip
        path = tree.inode_path(int(np.argmax(tree.xattr == row)))
        raise UnsafeEntry("image", path, "brings overlay xattrs of its own, refused under --strict")
    return MetadataLayer(replace(tree, xattr_sets=sets), namespace)


def _escaped(pairs: XattrSet, *, escape: bool = True) -> XattrSet:
    """Return ``pairs`` with overlay names escaped one level (the kernel strips it) and capabilities as v3."""
    out = []
    for name, value in pairs:
        if escape:
            for prefix in (Namespace.TRUSTED.prefix, Namespace.USER.prefix):
                if name.startswith(prefix):
                    # The mount shows `overlay.overlay.X` as `overlay.X` only in its own namespace; the
                    # other one passes through it untouched, and a nested mount must see it as it was.
                    name = prefix + b"overlay." + name[len(prefix) :]
                    break
        if name == _CAPABILITY and len(value) == 20:
            # v2 means "root of the filesystem's owner", which v3 spells as rootid 0. Patching a map
            # into a rendered META needs the room for the rootid from the start.
            value = struct.pack("<I", int.from_bytes(value[:4], "little") + 0x01000000) + value[4:] + bytes(4)
        out.append((name, value))
    return tuple(sorted(out))


def _check_expressible(tree: Tree) -> None:
    whiteout = (tree.kind == Kind.CHAR) & (tree.major == 0) & (tree.minor == 0)
    if whiteout.any():
        path = tree.inode_path(int(np.argmax(whiteout)))
        raise LossyResult(path, "a character device 0:0 is a whiteout to overlayfs and would be invisible")
    for row in np.flatnonzero(tree.parent == 0).tolist():
        name = tree.name[row]
        if len(name) == 2 and name[:1] == b":" and name[1:] in _ALPHABET.tobytes():
            raise LossyResult(name, "a top folder of this name is reserved for the data of stubs")


def _check_names_unique(tree: Tree) -> None:
    digests = tree.sha256[(tree.kind == Kind.REG) & (tree.size > 0)]
    whole = np.unique(np.ascontiguousarray(digests).view("V32").ravel())
    short = np.unique(np.frombuffer(whole.tobytes(), "V16").reshape(-1, 2)[:, 0] if len(whole) else whole)
    # 128 bits compared here, 126 are used: masking the last two off matters only for a deliberate clash.
    if len(short) != len(whole):
        raise InvalidImage("two files of different content share the first 126 bits of their sha256")
