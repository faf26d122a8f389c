"""Overlay layers as they lie on disk, looked up as the kernel merges them. Nothing here writes or mounts.

Rules: Documentation/filesystems/overlayfs.rst ("whiteouts and opaque directories", "Redirect directories",
"Metadata only copy up") and ``fs/overlayfs/namei.c``, in the words of what they do.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from layerkit.formats.overlay_options import parse_layers
from layerkit.metaonly import HOLDS_WHITEOUTS, METACOPY, OPAQUE, REDIRECT, WHITEOUT, YES, Namespace, is_whiteout
from layerkit.model.errors import LossyResult, UsageError, show_path


class Found(NamedTuple):
    """A name in a layer: where, and what lstat says."""

    layer: int
    path: bytes
    stat: os.stat_result

    @property
    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return stat.S_ISDIR(self.stat.st_mode)

    @property
    def is_file(self) -> bool:
        """Return whether it is a regular file."""
        return stat.S_ISREG(self.stat.st_mode)


@dataclass(frozen=True, slots=True)
class Lowers:
    """The lower layers below an upper, top first, and the data-only ones below those."""

    roots: tuple[bytes, ...]
    data: tuple[bytes, ...]
    namespace: Namespace

    @classmethod
    def parse(cls, text: str, namespace: Namespace) -> Lowers:
        """Return the layers of ``DIR[:DIR…][::DATA…]``, as mount(8) has them, with its escapes.

        Raises:
            UsageError: no layer, or one that is not a folder.
        """
        roots, data = (
            tuple(os.fsencode(_folder(part)) for part in parts) for parts in parse_layers(text, "--lower")
        )
        return cls(roots, data, namespace)

    def full(self, found: Found) -> bytes:
        """Return the absolute path of something found."""
        return self.roots[found.layer] + b"/" + found.path

    def top(self) -> list[Found]:
        """Return the roots of all layers, which the kernel always merges."""
        return [Found(i, b"", os.lstat(root)) for i, root in enumerate(self.roots)]

    def lookup(self, parents: list[Found], name: bytes) -> list[Found]:
        """Return what a lookup of ``name`` in the merged folder ``parents`` finds: [] nothing, else top first.

        Several only for folders, which are merged.

        Raises:
            LossyResult: a renamed folder in a lower layer.
        """
        found: list[Found] = []
        for parent in parents:
            path = parent.path + b"/" + name if parent.path else name
            full = self.roots[parent.layer] + b"/" + path
            try:
                shown = os.lstat(full)
            except (FileNotFoundError, NotADirectoryError):
                continue
            here = Found(parent.layer, path, shown)
            if self.is_whiteout(full, shown, self.full(parent)) or (found and not here.is_dir):
                break
            found.append(here)
            if not here.is_dir or self.opaque(full) == YES:
                break
            if self.xattr(full, REDIRECT) is not None:
                raise LossyResult(full, "a renamed folder in a lower layer; flatten the lower layers first")
        return found

    def names(self, parents: list[Found]) -> set[bytes]:
        """Return every name in the folders ``parents``, those that are whiteouts as well."""
        return {name for parent in parents for name in os.listdir(self.full(parent))}

    def walk(self, path: bytes) -> list[Found]:
        """Return what an absolute redirect to ``path`` (without the leading slash) finds, as :meth:`lookup`."""
        found = self.top()
        for part in path.split(b"/"):
            if part in (b"", b".", b".."):
                raise LossyResult(path, "a redirect that is no plain path; no kernel wrote this upper")
            found = self.lookup([x for x in found if x.is_dir], part)
        return found

    def data_path(self, found: Found) -> bytes:
        """Return the path below a layer's root under which every mount finds the bytes of a lower file.

        Raises:
            LossyResult: a file of another layer hides it there.
        """
        path, first = found.path, found.layer
        full = self.full(found)
        while self.xattr(full, METACOPY) is not None:
            redirect = self.xattr(full, REDIRECT)
            if redirect is not None:
                path = redirect[1:] if redirect.startswith(b"/") else os.path.join(os.path.dirname(path), redirect)
            below = [root + b"/" + path for root in (*self.roots[first + 1 :], *self.data)]
            hit = next((i for i, place in enumerate(below) if is_file(place)), None)
            if hit is None:
                raise LossyResult(full, f"a stub whose data, /{show_path(path)}, is in no layer given with --lower")
            full, first = below[hit], first + 1 + hit
            if first >= len(self.roots):
                break
        # A data-only layer is asked for nothing but the path, and the first file that has it wins.
        for other in range(min(first, len(self.roots))):
            if is_file(self.roots[other] + b"/" + path):
                raise LossyResult(
                    full,
                    f"{os.fsdecode(self.roots[other])} has another file under this path, which a mount would read "
                    "in its place; flatten the lower layers first",
                )
        return path

    def is_whiteout(self, full: bytes, shown: os.stat_result, parent: bytes) -> bool:
        """Return whether a name hides what lies below: a device 0:0, or an empty file marked so."""
        if is_whiteout(shown.st_mode, shown.st_rdev):
            return True
        marked = stat.S_ISREG(shown.st_mode) and shown.st_size == 0
        return marked and self.opaque(parent) == HOLDS_WHITEOUTS and self.xattr(full, WHITEOUT) is not None

    def opaque(self, full: bytes) -> bytes | None:
        """Return the folder's overlay.opaque: ``y``, ``x`` (it holds marked whiteouts) or None."""
        return self.xattr(full, OPAQUE)

    def xattr(self, full: bytes, name: bytes) -> bytes | None:
        """Return an overlay xattr, None where there is none."""
        try:
            return os.getxattr(full, self.namespace.xattr(name), follow_symlinks=False)
        except OSError:
            return None


def is_file(path: bytes) -> bool:
    """Return whether a regular file lies at ``path``, which may be nowhere."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _folder(text: str) -> Path:
    path = Path(os.path.realpath(text))
    if not path.is_dir():
        raise UsageError(f"--lower {text}: no such folder")
    return path
