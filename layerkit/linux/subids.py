"""TODO."""

from __future__ import annotations

from pathlib import Path

from layerkit.model.errors import UnsupportedHost


def _subordinate(file: str, names: set[str], kind: str) -> list[tuple[int, int, int]]:
    """Return the extents of a user's subordinate ids, from 1 on (subuid(5))."""
    extents, inside = [], 1
    try:
        text = Path(file).read_text("utf-8", "surrogateescape")
    except OSError:
        text = ""
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) == 3 and fields[0] in names and fields[1].isdigit() and fields[2].isdigit():
            extents.append((inside, int(fields[1]), int(fields[2])))
            inside += int(fields[2])
    if not extents:
        user = min(names, key=str.isdigit)
        raise UnsupportedHost(
            f"subordinate ids for {user} in {file}",
            f"as root: usermod --add-sub{kind}s 100000-165535 {user}",
        )
    return extents
