"""Where things lie in a store, and whether a folder is one.

::

    ROOT (0700)        the root guards the rest: below it all is readable, as the kernel reads data
                       with the mounter's credentials
      version.json     layout version and store id; written last when a store is made
      catalog.db       SQLite (WAL): what is whole. A file without its row does not count
      locks/           flock files, see ``locks``
      tmp/             one folder per open store that writes, each with a flock'ed ``owner`` file beside it
      tar/HEX          raw uncompressed layer tars by diff_id, 0444
      data/HEX.erofs   DATA: the files of such a tar, mapped
      index/HEX.idx    indexes by diff_id
      objects/:x/NAME  files by content, 0444; names from ``metaonly.data_path``
      meta/KEY/        META: ``info.json`` and ``meta.erofs`` + ``fixups``, or ``root/``
      pins/ID.json     what bundles go on using, see ``pins``; made with the first one
      unproven-indexes/  a hook's copies of shared indexes: no part of the store's contents, see ``unproven``
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import uuid
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.linux.durable import is_staging, whole_file
from layerkit.model.digest import Digest
from layerkit.model.errors import LayerkitError, StoreError

if TYPE_CHECKING:
    from layerkit.model.index import Index

LAYOUT_VERSION = 1
REPAIR = "run `layerkit store verify --repair`"
FILE_MODE = 0o444
FOLDER_MODE = 0o755

_FOLDERS = ("locks", "tmp", "tar", "data", "index", "objects", "meta")
_FILES = ("version.json", "version.json.new", *(f"catalog.db{end}" for end in ("", "-wal", "-shm", "-journal")))
KNOWN_NAMES = frozenset((*_FOLDERS, *_FILES, "pins", "unproven-indexes"))
"""Every name that may stand in the root of a store (``lost+found`` aside, where it is a filesystem's root)."""


def unknown_names(root: Path) -> set[str]:
    """Return the names in a store's root that are nothing of layerkit's."""
    return {name for name in os.listdir(root) if not is_staging(name)} - KNOWN_NAMES - {"lost+found"}


class DataBackend(StrEnum):
    """How the bytes of a layer's files are kept."""

    TAR = "tar"
    """The raw layer tar, and an EROFS image that maps its files."""
    OBJECTS = "objects"
    """One file per content."""


class Layout:
    """The paths of the store at ``root``.

    Attributes:
        root: its folder.
        version_file: makes a folder a store.
        catalog: the SQLite database.
        locks: folder of lock files.
        tmp: folder of what is not whole yet.
        objects: folder under which ``metaonly.data_path`` names lie: a data-only lower as it is.
    """

    def __init__(self, root: Path) -> None:
        """Nothing is made yet."""
        self.root, self.version_file, self.catalog = root, root / "version.json", root / "catalog.db"
        self.locks, self.tmp, self.objects = root / "locks", root / "tmp", root / "objects"

    def tar(self, diff_id: Digest) -> Path:
        """Return where the raw tar of a layer lies."""
        return self.root / "tar" / diff_id.hex

    def data(self, diff_id: Digest) -> Path:
        """Return where the DATA image of a layer lies."""
        return self.root / "data" / f"{diff_id.hex}.erofs"

    def index(self, diff_id: Digest) -> Path:
        """Return where the index of a layer lies."""
        return self.root / "index" / f"{diff_id.hex}.idx"

    def layer_files(self, diff_id: Digest) -> tuple[Path, Path, Path]:
        """Return where all that is kept of a layer as a tar lies: tar, DATA image, index."""
        return self.tar(diff_id), self.data(diff_id), self.index(diff_id)

    def load_index(self, diff_id: Digest) -> Index | None:
        """Return the index of a layer, None if it is not kept.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.index(diff_id)
        try:
            with path.open("rb") as file:
                # Mapped, not read: many layers at once then cost page cache, and no memory of this process.
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: {error}; {REPAIR}") from error
        from layerkit.formats.index import file as index_file

        try:
            index = index_file.decode(buffer, str(path))
        except LayerkitError as error:
            raise StoreError(f"{error}; {REPAIR}") from error
        if index.diff_id != diff_id:
            raise StoreError(f"{path}: holds the index of {index.diff_id}; {REPAIR}")
        return index

    def read_index(self, diff_id: Digest) -> Index:
        """Return the index of a layer that the catalog has.

        Raises:
            StoreError: it is missing or damaged.
        """
        if (index := self.load_index(diff_id)) is None:
            raise StoreError(f"{self.index(diff_id)}: missing; {REPAIR}")
        return index

    def meta(self, key: str) -> Path:
        """Return the folder of a META."""
        return self.root / "meta" / key

    def read_version(self) -> str | None:
        """Return the store's id, None if there is no store yet.

        Raises:
            StoreError: unreadable, or of a layout this version does not know.
        """
        try:
            facts = json.loads(self.version_file.read_bytes())
            version, identity = facts["layout"], facts["id"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"{self.version_file}: cannot be read: {error.strerror}; is this your store?"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.version_file}: damaged; if {self.root} is a layerkit store, write "
                f'{{"layout": {LAYOUT_VERSION}, "id": "any"}} into it and run `layerkit store verify --repair`'
            ) from error
        if type(version) is not int or version < 1 or not isinstance(identity, str):
            raise StoreError(f"{self.version_file}: layout {version!r} is unknown; is this a layerkit store?")
        if version > LAYOUT_VERSION:
            raise StoreError(
                f"{self.root}: a store of layout {version}, and this layerkit knows up to {LAYOUT_VERSION}; use a "
                "newer layerkit, or another folder with --store"
            )
        return identity

    def create_folders(self) -> None:
        """Make the root and its folders, or complete those of an interrupted start.

        Raises:
            StoreError: the folder holds something else than a store.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        strange = sorted(unknown_names(self.root))
        if strange:
            raise StoreError(
                f"{self.root}: not a layerkit store, and not empty (it holds {strange[0]!r}); "
                "name an empty or new folder with --store"
            )
        self.root.chmod(0o700)
        for name in _FOLDERS:
            folder = self.root / name
            folder.mkdir(exist_ok=True)
            folder.chmod(FOLDER_MODE)  # whatever the umask says

    def write_version(self) -> str:
        """Declare the folder a store; return its new id."""
        identity = str(uuid.uuid4())
        with whole_file(self.version_file, sync=True) as file:
            file.write(json.dumps({"layout": LAYOUT_VERSION, "id": identity}).encode() + b"\n")
        return identity

    def check_owner(self) -> None:
        """Refuse a store that another user can write to: the kernel parses the images in it.

        Raises:
            StoreError: another owner, or a root folder that others may write to.
        """
        facts = self.root.stat()
        if facts.st_uid != os.geteuid():
            raise StoreError(
                f"{self.root}: belongs to uid {facts.st_uid}, you are uid {os.geteuid()}; "
                "name a store of your own with --store"
            )
        mode = stat.S_IMODE(facts.st_mode)
        if mode & 0o022:
            raise StoreError(
                f"{self.root}: others may write to it (mode {mode:04o}), so nothing in it can be trusted; "
                "check what is in it, then run chmod 0700 and `layerkit store verify`"
            )
        if mode & 0o077:
            self.root.chmod(0o700)
