"""What has to change for an upper to stand for itself, as a list of small steps that can be done and undone.

Layers are looked up as they lie on disk, in the way in which the kernel merges them; nothing here writes or mounts.
Rules: Documentation/filesystems/overlayfs.rst ("whiteouts and opaque directories", "Redirect directories",
"Metadata only copy up") and ``fs/overlayfs/namei.c``, in the words of what they do.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from layerkit import metaonly as mo
from layerkit.formats.overlay_options import parse_layers
from layerkit.linux.folders.walk import Folder, walk, xattr_names
from layerkit.metaonly import METACOPY, OPAQUE, REDIRECT, YES, Namespace, own_mark
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
            if not here.is_dir or self.xattr(full, OPAQUE) == YES:
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
            hit = next((i for i, place in enumerate(below) if _is_file(place)), None)
            if hit is None:
                raise LossyResult(full, f"a stub whose data, /{show_path(path)}, is in no layer given with --lower")
            full, first = below[hit], first + 1 + hit
            if first >= len(self.roots):
                break
        # A data-only layer is asked for nothing but the path, and the first file that has it wins.
        for other in range(min(first, len(self.roots))):
            if _is_file(self.roots[other] + b"/" + path):
                raise LossyResult(
                    full,
                    f"{os.fsdecode(self.roots[other])} has another file under this path, which a mount would read "
                    "in its place; flatten the lower layers first",
                )
        return path

    def is_whiteout(self, full: bytes, shown: os.stat_result, parent: bytes) -> bool:
        """Return whether a name hides what lies below: a device 0:0, or an empty file marked so."""
        if mo.is_whiteout(shown.st_mode, shown.st_rdev):
            return True
        marked = stat.S_ISREG(shown.st_mode) and shown.st_size == 0
        return (
            marked
            and self.xattr(parent, OPAQUE) == mo.HOLDS_WHITEOUTS
            and self.xattr(full, mo.WHITEOUT) is not None
        )

    def xattr(self, full: bytes, name: bytes) -> bytes | None:
        """Return an overlay xattr, None where there is none."""
        try:
            return os.getxattr(full, self.namespace.xattr(name), follow_symlinks=False)
        except OSError:
            return None


def _is_file(path: bytes) -> bool:
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
    """Return what makes ``upper`` (an absolute path) final over ``lowers``; no step where it is already.

    ``keep_root_whiteouts``: the kernel merges the roots of all normal layers, whatever they say. A mount over the
    lowers as normal ones needs whiteouts there, one over data-only layers would list them.

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
                marks.append(self._mark(parent, mo.IMPURE, None, YES))
            elif self._lowers.xattr(self._full(raw(parent)), mo.IMPURE) != YES:
                marks.append(self._set(raw(parent), self._full(raw(parent)), mo.IMPURE, YES))
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
                opaque = self._lowers.xattr(place, OPAQUE) == YES
                found = [] if opaque else self._merged_with(place, below, name)
                self._below[child] = [each for each in found if each.is_dir]
            elif stat.S_ISREG(shown.st_mode) and self._lowers.xattr(place, METACOPY) is not None:
                self._stub(child, place, shown, below, name)
        if below:
            # A whiteout or a file of the upper hides what is below under the same name.
            for name in sorted(self._lowers.names(below) - there):
                self._make(path, name, below)
                self._touched.add(path)
        if self._lowers.xattr(full, OPAQUE) != YES:
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
        return any(_is_file(root + redirect) for root in self._lowers.data)

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
        "xattrs": {
            text(os.fsencode(n)): text(os.getxattr(full, n, follow_symlinks=False)) for n in xattr_names(full)
        },
    }  # fmt: skip
