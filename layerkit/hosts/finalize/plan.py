"""What has to change for an upper to stand for itself, as a list of small steps that can be done and undone."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from layerkit.hosts.finalize.overlay_view import Found, Lowers, is_file
from layerkit.linux.folders.walk import Folder, walk
from layerkit.metaonly import IMPURE, METACOPY, OPAQUE, REDIRECT, YES, own_mark
from layerkit.model.errors import LossyResult

Step = dict[str, Any]
"""One change: ``do`` says which; ``path`` is below the upper. Values are JSON, bytes as latin-1 text."""

MAKE, LINK, SET, WHITEOUT, TIMES = "make", "link", "set", "whiteout", "times"
"""Make an entry; link it to one made before; set an xattr; remove a whiteout; set a folder's times again."""


def text(value: bytes) -> str:
    """Return bytes as the text that stands for them in a step."""
    return value.decode("latin-1")


def raw(value: str) -> bytes:
    """Return the bytes that :func:`text` was given."""
    return value.encode("latin-1")


@dataclass(slots=True)
class Plan:
    """The steps, in an order in which a mount shows the same tree after each of them (times of folders apart).

    First what is missing is made, then stubs say where their data is, then folders hide what is below, and last
    whiteouts go, which hide nothing any more.
    """

    upper: bytes
    steps: list[Step] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        """Return how many steps of each kind there are, by the words of the report."""
        words = {LINK: "made", MAKE: "made", WHITEOUT: "whiteouts", TIMES: "times"}
        named = {OPAQUE: "opaque", REDIRECT: "redirects"}
        return Counter(
            words.get(s["do"])
            or ("dropped" if s["new"] is None else named.get(own_mark(raw(s["name"])) or b"", "marks"))
            for s in self.steps
        )


def plan(upper: bytes, lowers: Lowers, *, keep_root_whiteouts: bool) -> Plan:
    """Return what makes ``upper`` final over ``lowers``; no step where it is already.

    Args:
        upper: absolute path.
        lowers: what it lies over.
        keep_root_whiteouts: the kernel merges the roots of all normal layers, whatever they say: a mount over
            the lowers as normal ones needs whiteouts there, one over data-only layers would list them.

    Raises:
        LossyResult: something that no finalized layer can say.
    """
    return _Planner(upper, lowers, keep_root_whiteouts).run()


class _Planner:
    def __init__(self, upper: bytes, lowers: Lowers, keep_root_whiteouts: bool) -> None:
        self._upper, self._lowers, self._keep = upper, lowers, keep_root_whiteouts
        self._below = {b"": lowers.top()}
        self._made: list[Step] = []
        self._redirects: list[Step] = []
        self._opaque: list[Step] = []
        self._whiteouts: list[Step] = []
        self._touched: set[bytes] = set()
        self._links: dict[tuple[int, int], bytes] = {}
        self._stubs: set[tuple[int, int]] = set()

    def run(self) -> Plan:
        for folder in walk(os.fsdecode(self._upper)):
            self._folder(folder)
        times = [self._times(path) for path in sorted(self._touched)]
        return Plan(
            self._upper, [*self._made, *self._marks(), *self._redirects, *self._opaque, *self._whiteouts, *times]
        )

    def _marks(self) -> list[Step]:
        """Mark the folders that got stubs: stat shows their data's inode number, and so must readdir."""
        parents = {step["path"].rpartition("/")[0] for step in self._made if not stat.S_ISDIR(step.get("mode", 0))}
        made = {step["path"] for step in self._made}
        marks = []
        for parent in sorted(parents):
            if parent in made:
                marks.append(self._mark(parent, IMPURE, None, YES))
            elif self._lowers.xattr(self._full(raw(parent)), IMPURE) != YES:
                marks.append(self._set(raw(parent), self._full(raw(parent)), IMPURE, YES))
        return marks

    def _folder(self, folder: Folder) -> None:
        """Plan one folder of the upper; note what lies below its subfolders."""
        path, below, there = folder.path, self._below.pop(folder.path), set()
        full = self._full(path)
        for name, shown in folder.names:
            there.add(name)
            child = folder.below(name)
            place = self._full(child)
            if self._lowers.is_whiteout(place, shown, full):
                if path or not self._keep or not self._lowers.lookup(below, name):
                    self._whiteouts.append(_entry(WHITEOUT, child, place, shown))
                    self._touched.add(path)
            elif stat.S_ISDIR(shown.st_mode):
                opaque = self._lowers.opaque(place) == YES
                found = [] if opaque else self._merged_with(place, below, name)
                self._below[child] = [each for each in found if each.is_dir]
            elif stat.S_ISREG(shown.st_mode) and self._lowers.xattr(place, METACOPY) is not None:
                self._stub(child, place, shown, below, name)
        if below:
            # A whiteout or a file of the upper hides what is below under the same name.
            for name in sorted(self._lowers.names(below) - there):
                self._make(path, name, below)
                self._touched.add(path)
        if self._lowers.opaque(full) != YES:
            self._opaque.append(self._set(path, full, OPAQUE, YES))
        if self._lowers.xattr(full, REDIRECT) is not None:
            # After opaque: in between, it must not merge with what has the folder's own name below.
            self._opaque.append(self._set(path, full, REDIRECT, None))

    def _merged_with(self, place: bytes, parents: list[Found], name: bytes) -> list[Found]:
        """Return what the kernel finds below a folder or stub of the upper."""
        redirect = self._lowers.xattr(place, REDIRECT) or name
        if redirect.startswith(b"/"):
            return self._lowers.walk(redirect[1:])
        return self._lowers.lookup(parents, redirect)

    def _stub(self, child: bytes, place: bytes, shown: os.stat_result, parents: list[Found], name: bytes) -> None:
        key = (shown.st_dev, shown.st_ino)
        if key in self._stubs:
            return
        self._stubs.add(key)
        redirect = self._lowers.xattr(place, REDIRECT)
        if redirect is not None and redirect.startswith(b"/") and self._is_data(redirect):
            return
        found = self._merged_with(place, parents, name)
        if not found or not found[0].is_file:
            raise LossyResult(
                place, "a stub without its data in the lower layers: --lower must name those it was mounted over"
            )
        wanted = b"/" + self._lowers.data_path(found[0])
        if redirect != wanted:
            self._redirects.append(self._set(child, place, REDIRECT, wanted))

    def _is_data(self, redirect: bytes) -> bool:
        """Return whether a data-only layer has the path, which is then looked up nowhere else."""
        return any(is_file(root + redirect) for root in self._lowers.data)

    def _make(self, parent: bytes, name: bytes, below: list[Found]) -> None:
        """Plan a copy of what the merged lowers show as ``name``: folders whole, files as stubs."""
        pending = [(parent + b"/" + name if parent else name, self._lowers.lookup(below, name))]
        while pending:
            path, found = pending.pop()
            if not found:
                continue  # a whiteout of a lower layer
            top = found[0]
            full = self._lowers.full(top)
            if top.is_dir:
                self._made.append(self._entry(path, full, top))
                # Only once it is whole: until then it merges with the one below.
                self._opaque.append(self._mark(text(path), OPAQUE, None, YES))
                folders = [each for each in found if each.is_dir]
                pending += [
                    (path + b"/" + inner, self._lowers.lookup(folders, inner))
                    for inner in sorted(self._lowers.names(folders), reverse=True)
                ]
                continue
            key = (top.layer, top.stat.st_ino)
            if top.stat.st_nlink > 1 and key in self._links:
                self._made.append({"do": LINK, "path": text(path), "to": text(self._links[key])})
                continue
            step = self._entry(path, full, top)
            if top.is_file and top.stat.st_size:
                stub = self._lowers.namespace.stub(b"/" + self._lowers.data_path(top))
                step["xattrs"] |= {text(key): text(value) for key, value in stub.items()}
            self._links[key] = path
            self._made.append(step)

    def _entry(self, path: bytes, full: bytes, found: Found) -> Step:
        step = _entry(MAKE, path, full, found.stat)
        # The kernel's own of the lower layer say nothing here; what is escaped is the image's.
        step["xattrs"] = {
            name: value
            for name, value in step["xattrs"].items()
            if own_mark(raw(name), self._lowers.namespace) is None
        }
        step |= {"size": found.stat.st_size if found.is_file else 0, "rdev": found.stat.st_rdev}
        if stat.S_ISLNK(found.stat.st_mode):
            step["target"] = text(os.readlink(full))
        return step

    def _set(self, path: bytes, full: bytes, name: bytes, value: bytes | None) -> Step:
        return self._mark(text(path), name, self._lowers.xattr(full, name), value)

    def _mark(self, path: str, name: bytes, old: bytes | None, value: bytes | None) -> Step:
        return {
            "do": SET, "path": path, "name": text(self._lowers.namespace.xattr(name)),
            "old": None if old is None else text(old), "new": None if value is None else text(value),
        }  # fmt: skip

    def _times(self, path: bytes) -> Step:
        shown = os.lstat(self._full(path))
        return {"do": TIMES, "path": text(path), "times": [shown.st_atime_ns, shown.st_mtime_ns]}

    def _full(self, path: bytes) -> bytes:
        return self._upper + b"/" + path if path else self._upper


def _entry(do: str, path: bytes, full: bytes, shown: os.stat_result) -> Step:
    """Return the step that makes or removes an entry, with all that it takes to make it."""
    return {
        "do": do, "path": text(path), "mode": shown.st_mode, "uid": shown.st_uid, "gid": shown.st_gid,
        "times": [shown.st_atime_ns, shown.st_mtime_ns],
        "xattrs": {text(os.fsencode(n)): text(os.getxattr(full, n, follow_symlinks=False)) for n in _xattrs(full)},
    }  # fmt: skip


def _xattrs(full: bytes) -> list[str]:
    try:
        return os.listxattr(full, follow_symlinks=False)
    except OSError:
        return []
