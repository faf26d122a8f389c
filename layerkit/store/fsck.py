"""Checking a store against its digests, and putting right what can be."""

from __future__ import annotations

import contextlib
import filecmp
import functools
import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from layerkit.linux.durable import remove
from layerkit.linux.folders.listing import list_folder
from layerkit.metaonly import Namespace
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, StoreError
from layerkit.model.index import Index
from layerkit.model.limits import Limits
from layerkit.model.reports import Report
from layerkit.store import layers
from layerkit.store.catalog import Catalog, LayerRow, short_name
from layerkit.store.gc import strays
from layerkit.store.layout import FILE_MODE, DataBackend, unknown_names
from layerkit.store.metas import INFO_FILE, ROOT_FOLDER, names_data_by_path, parse_info
from layerkit.store.objects import needed, object_path
from layerkit.store.spool import Spool, dead

_TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"


class Severity(StrEnum):
    """How bad a finding is."""

    DAMAGE = "damage"
    """What the catalog calls whole is not."""
    LEFTOVER = "leftover"
    """Left by a run that was ended; not used by anything, and gc removes it."""
    NOTE = "note"
    """Nothing is wrong, but something is worth knowing."""


@dataclass(frozen=True, slots=True)
class Finding(Report):
    """One thing found; ``remedy`` says what was done in a repair, or what will put it right."""

    severity: Severity
    where: str
    problem: str
    remedy: str = ""

    @property
    def is_damage(self) -> bool:
        """Return whether the store was not whole."""
        return self.severity is Severity.DAMAGE

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


class Fsck:
    """One check of a whole store."""

    def __init__(self, spool: Spool, catalog: Catalog, limits: Limits, *, repair: bool, deep: bool) -> None:
        """Check the store of these parts; for ``repair`` it must be held alone."""
        self._layout, self._catalog, self._spool, self._limits = catalog.layout, catalog, spool, limits
        self._repair, self._deep = repair, deep
        self._found: list[Finding] = []
        self._indexes: dict[Digest, Index] = {}

    def run(self) -> list[Finding]:
        """Check everything; return what was found."""
        for problem in self._catalog.problems(deep=self._deep):
            self._add(
                Severity.DAMAGE, self._layout.catalog, problem, "remove the store and import its images again"
            )
        rows = self._catalog.layers()
        for row in rows:
            self._layer(row)
        self._objects(rows)
        for key, text in self._catalog.metas():
            self._meta(key, text)
        self._images()
        self._leftovers()
        return self._found

    def _add(self, severity: Severity, where: Path | str, problem: str, remedy: str = "") -> None:
        if isinstance(where, Path) and where.is_relative_to(self._layout.root):
            where = str(where.relative_to(self._layout.root))
        self._found.append(Finding(severity, str(where), problem, remedy))

    def _damage(self, where: Path | str, problem: str, remedy: str, act: Callable[[], None]) -> None:
        """Report damage, and with ``repair`` put it right by ``act``; ``remedy`` tells what that does."""
        if not self._repair:
            self._add(Severity.DAMAGE, where, problem, "`layerkit store verify --repair` puts it right")
            return
        try:
            act()
        except (LayerkitError, OSError) as error:
            remedy = f"could not be put right: {error}"
        self._add(Severity.DAMAGE, where, problem, remedy)

    # Layers

    def _layer(self, row: LayerRow) -> None:
        tar_problem = self._tar_problem(row) if row.tar else ""
        try:
            index = self._layout.read_index(row.diff_id)
            if index.tar_size != row.tar_size or len(index) != row.entries:
                raise StoreError(f"{self._layout.index(row.diff_id)}: its size differs from the catalog's")
        except StoreError as error:
            problem = str(error).removeprefix(f"{self._layout.index(row.diff_id)}: ").partition("; run ")[0]
            path, files = self._layout.index(row.diff_id), self._layout.layer_files(row.diff_id)
            if row.tar and not tar_problem:
                self._damage(path, problem, "made again from the tar", lambda: self._remake_index(row))
            else:
                remedy = "taken out; import the image again"
                self._damage(path, problem, remedy, lambda: self._forget("layers", str(row.diff_id), *files))
                if self._repair:
                    return
        else:
            self._indexes[row.diff_id] = index
        if tar_problem:
            self._damage(
                self._layout.tar(row.diff_id), tar_problem, "taken out; import the image again",
                lambda: self._drop_tar(row),
            )  # fmt: skip
        elif row.tar and row.diff_id in self._indexes:
            self._data(self._indexes[row.diff_id])

    def _tar_problem(self, row: LayerRow) -> str:
        path = self._layout.tar(row.diff_id)
        problem = self._file_problem(path, row.tar_size)
        if not problem and self._deep and (got := _digest_of(path, row.diff_id)) != row.diff_id:
            problem = f"its content has the digest {got}"
        return problem

    def _file_problem(self, path: Path, size: int | None) -> str:
        try:
            facts = path.lstat()
        except FileNotFoundError:
            return "missing"
        if not stat.S_ISREG(facts.st_mode):
            return "no regular file"
        if size is not None and facts.st_size != size:
            return f"{facts.st_size} bytes long, want {size}"
        if stat.S_IMODE(facts.st_mode) != FILE_MODE:
            self._damage(
                path, f"mode {stat.S_IMODE(facts.st_mode):04o}, want {FILE_MODE:04o}", "mode set again",
                lambda: path.chmod(FILE_MODE),
            )  # fmt: skip
        return ""

    def _data(self, index: Index) -> None:
        path = self._layout.data(index.diff_id)
        problem = self._file_problem(path, None)
        if not problem and self._deep:
            again = self._spool.path("data")
            try:
                layers.build_data(index, self._layout.tar(index.diff_id), again)
                if not filecmp.cmp(path, again, shallow=False):
                    problem = "not what the index and the tar give"
            finally:
                remove(again)
        if problem:
            make = functools.partial(layers.make_data, self._spool, self._catalog, index)
            self._damage(path, problem, "made again from the tar", make)

    def _remake_index(self, row: LayerRow) -> None:
        from layerkit import unpack
        from layerkit.images.oci.blobs import FileRange

        with contextlib.closing(FileRange.whole(self._layout.tar(row.diff_id))) as reader:
            descriptor = Descriptor(_TAR_TYPE, row.diff_id, row.tar_size)
            index = unpack.index_layer(reader, descriptor, row.diff_id, limits=self._limits)
        encoded = self._spool.path("index")
        try:
            layers.write_index(index, encoded)
            layers.put_layer(self._catalog, index, layers.LayerFiles(encoded))
        finally:
            remove(encoded)
        self._indexes[row.diff_id] = index

    def _drop_tar(self, row: LayerRow) -> None:
        with self._catalog.write() as db:
            Catalog.drop_backend(db, row.diff_id, DataBackend.TAR)
        for path in self._layout.layer_files(row.diff_id)[:2]:
            remove(path)

    # Objects

    def _objects(self, rows: list[LayerRow]) -> None:
        bad: dict[bytes, str] = {}
        known = set()
        for obj in self._catalog.objects():
            known.add(obj.sha256)
            path = object_path(self._layout, obj.sha256)
            problem = self._file_problem(path, obj.size)
            if not problem and obj.short != short_name(obj.sha256):
                problem = f"the catalog has it under a name that is not that of sha256:{obj.sha256.hex()}"
            want = Digest("sha256", obj.sha256.hex())
            if not problem and self._deep and (got := _digest_of(path, want)) != want:
                problem = f"its content has the digest {got}, want {want}"
            if problem:
                bad[obj.sha256] = problem
        users: dict[bytes, list[LayerRow]] = {}
        for row in rows:
            if not row.objects or row.diff_id not in self._indexes:
                continue
            for sha256 in needed(self._indexes[row.diff_id]):
                if sha256 not in known and sha256 not in bad:
                    bad[sha256] = f"not in the catalog, and layer {row.diff_id} needs it"
                if sha256 in bad:
                    users.setdefault(sha256, []).append(row)
        for sha256, problem in bad.items():
            remedy = self._mend_object(sha256, users.get(sha256, [])) if self._repair else ""
            self._damage(object_path(self._layout, sha256), problem, remedy, lambda: None)

    def _mend_object(self, sha256: bytes, users: list[LayerRow]) -> str:
        """Write an object again from the tar of a layer that has it, or take it out; return what was done."""
        for diff_id, index in self._indexes.items():
            row = self._catalog.layer(diff_id)
            if row is not None and row.tar and sha256 in set(needed(index)):
                try:
                    layers.make_objects(self._spool, self._catalog, index, only=frozenset((sha256,)))
                except (LayerkitError, OSError) as error:
                    return f"could not be put right: {error}"
                return "made again from the tar"
        with self._catalog.write() as db:
            Catalog.drop(db, "objects", [short_name(sha256)])
            for row in users:
                Catalog.drop_backend(db, row.diff_id, DataBackend.OBJECTS)
        remove(object_path(self._layout, sha256))
        return "taken out; import the image again"

    # METAs and images

    def _meta(self, key: str, text: str) -> None:
        path = self._layout.meta(key)
        try:
            problem = self._meta_problem(key, path, text)
        except (StoreError, OSError, ValueError) as error:
            problem = str(error)
        if problem:
            remedy = "taken out; it is made again when it is needed"
            self._damage(path, problem, remedy, lambda: self._forget("metas", key, path))

    def _meta_problem(self, key: str, path: Path, text: str) -> str:
        if not path.is_dir():
            return "missing"
        info = parse_info(text, "the catalog's row")
        problem = self._file_problem(path / INFO_FILE, None)
        if problem:
            return f"{INFO_FILE}: {problem}"
        if (path / INFO_FILE).read_text(errors="replace") != text:
            return f"{INFO_FILE}: not what the catalog says"
        strange = {p.name for p in path.iterdir()} - {INFO_FILE, *info["files"]}
        if info["listing"]:
            strange.discard(ROOT_FOLDER)
        if strange:
            return f"{sorted(strange)[0]} does not belong there"
        for name, (sha256, size) in info["files"].items():
            problem = self._file_problem(path / name, size)
            if problem:
                return f"{name}: {problem}"
            want = Digest("sha256", sha256)
            if self._deep and (got := _digest_of(path / name, want)) != want:
                return f"{name}: its content has the digest {got}, want {want}"
        if info["listing"] and not (path / ROOT_FOLDER).is_dir():
            return f"{ROOT_FOLDER}: missing"
        if info["listing"] and self._deep:
            stubs, by_path = Namespace(info["namespace"]), names_data_by_path(key, info)
            if list_folder(path / ROOT_FOLDER, stubs, by_path=by_path).digest != info["listing"]:
                return f"{ROOT_FOLDER}: an entry is not as it was written"
        return ""

    def _images(self) -> None:
        present = {row.diff_id for row in self._catalog.layers()}
        for digest in self._catalog.digests():
            problems: list[str] = []
            absent: list[str] = []
            try:
                if (stored := self._catalog.image(digest)) is not None:
                    image = stored.image
                    problems += _other_digest("manifest", image.manifest, Digest.parse(digest))
                    problems += _other_digest("config", image.config, image.config_descriptor.digest)
                    absent = [str(diff_id) for diff_id in image.diff_ids if diff_id not in present]
            except StoreError as error:
                problems.append(str(error).partition("; run ")[0])
            for problem in problems:
                forget = functools.partial(self._forget, "images", digest)
                self._damage(f"image {digest}", problem, "forgotten; import it again", forget)
            if absent:
                self._add(
                    Severity.NOTE, f"image {digest}", f"layer {absent[0]} is not in the store",
                    "the next remap or mount of the image imports it",
                )  # fmt: skip

    def _forget(self, table: str, key: str, *files: Path) -> None:
        with self._catalog.write() as db:
            Catalog.drop(db, table, [key])
        for path in files:
            remove(path)

    # Leftovers

    def _leftovers(self) -> None:
        for name in sorted(unknown_names(self._layout.root)):
            self._add(Severity.NOTE, name, "nothing of layerkit's", "move it elsewhere")
        left = [*dead(self._layout), *strays(self._catalog)]
        for path in left:
            if self._repair:
                remove(path)
            remedy = "removed" if self._repair else "`layerkit store gc` removes it"
            self._add(Severity.LEFTOVER, path, "left by a run that was ended", remedy)


def _other_digest(what: str, data: bytes, want: Digest) -> list[str]:
    hasher = want.hasher()
    hasher.update(data)
    got = Digest(want.algorithm, hasher.hexdigest())
    return [] if got == want else [f"its {what} has the digest {got}"]


def _digest_of(path: Path, like: Digest) -> Digest:
    with path.open("rb") as file:
        return Digest(like.algorithm, hashlib.file_digest(file, like.hasher).hexdigest())
