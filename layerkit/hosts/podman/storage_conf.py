"""The lines of storage.conf that make podman use our mount program, put in and taken out again.

The file is edited as text, line by line, so that comments and order stay (containers-storage.conf(5)). Each line
of ours ends with a mark, and a line that had to give way stays as a comment with another: ``--undo`` needs no more.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from layerkit.formats.overlay_options import FEATURE_KEYS
from layerkit.hosts.setup_file import Change, parse, read
from layerkit.model.errors import UsageError

MARK = "  # by layerkit"
GAVE_WAY = "# before layerkit: "
_TABLE = "storage.options.overlay"
_HEADER = re.compile(r"\s*\[\s*([^\]\s]+)\s*\]\s*(#.*)?$")


def storage_conf(privileged: bool) -> Path:
    """Return the storage.conf that podman reads for this user and an administrator may edit."""
    named = os.environ.get("CONTAINERS_STORAGE_CONF")
    if named:
        return Path(named)
    if privileged:
        return Path("/etc/containers/storage.conf")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "containers/storage.conf"


def add(path: Path, program: Path) -> Change:
    """Return the change that names ``program`` as mount_program in the file ``path``, which may be missing.

    Raises:
        UsageError: no TOML, another storage driver than overlay, or an option that cannot go with it.
    """
    old = read(path)
    text = _without(old)
    settings = parse(text, path, "podman")
    storage = _table(settings, "storage")
    overlay = _table(storage, "options", "overlay")
    driver = storage.get("driver", "")
    if driver not in ("", "overlay"):
        raise UsageError(
            f"{path}: driver = {driver!r}: a mount program belongs to the driver overlay; set it, and note that "
            "podman keeps the images of each driver apart"
        )
    if overlay.get("force_mask") or _table(storage, "options").get("force_mask"):
        raise UsageError(
            f"{path}: force_mask keeps owners in xattrs, which layerkit does not read; remove it, or keep "
            "fuse-overlayfs"
        )
    lines = text.splitlines()
    if not driver:
        lines = _insert(lines, "storage", f'driver = "overlay"{MARK}')
    lines = [GAVE_WAY + line if re.match(r"\s*(overlay\.)?mount_program\s*=", line) else line for line in lines]
    lines = _insert(lines, _TABLE, f'mount_program = "{program}"{MARK}')
    new = "\n".join(lines) + "\n"
    parse(new, path, "podman")
    return Change(path, new, tuple(_notes(overlay, driver, path)))


def remove(path: Path) -> Change:
    """Return the change that takes out what :func:`add` put in; a file that held no more goes."""
    text = _without(read(path))
    parse(text, path, "podman")
    return Change(path, text if text.strip() else "")


def _table(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        found = settings.get(name, {})
        settings = found if isinstance(found, dict) else {}
    return settings


def _without(text: str) -> str:
    """Return ``text`` as it was before :func:`add`."""
    lines = [line.removeprefix(GAVE_WAY) for line in text.splitlines() if not line.endswith(MARK)]
    return "\n".join(lines) + "\n" if lines else ""


def _insert(lines: list[str], table: str, line: str) -> list[str]:
    """Put ``line`` under the header of ``table``, which is added where it is missing."""
    for place, text in enumerate(lines):
        header = _HEADER.match(text)
        if header and header[1] == table:
            return [*lines[: place + 1], line, *lines[place + 1 :]]
    return [*lines, f"[{table}]{MARK}", line]


def _notes(overlay: dict[str, Any], driver: str, path: Path) -> list[str]:
    notes = []
    options = str(overlay.get("mountopt", ""))
    for word in options.split(","):
        if word.partition("=")[0] in FEATURE_KEYS:
            notes.append(f"{path}: mountopt {word} has no effect with a mount program")
    if overlay.get("mount_program"):
        notes.append(f"{path}: mount_program = {overlay['mount_program']!r} is replaced; --undo restores it")
    if not driver:
        notes.append("the storage driver is set to overlay; pull images of another driver (vfs) again")
    return notes
