"""Pins: what somebody outside the store goes on using, such as a bundle that is not mounted at this moment.

``STORE/pins/ID.json`` names metadata layers and layers, and the owner: a file that holds the pin's id. A pin
counts for as long as its owner is there, so that deleting a bundle's folder by hand lets go of it as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from layerkit.linux.durable import whole_file


@dataclass(frozen=True, slots=True)
class Pin:
    """Something in use.

    Attributes:
        id: random; the owner's file holds it.
        owner: that file.
        metas: keys of METAs. layers: diff_ids as text.
    """

    id: str
    owner: str
    metas: tuple[str, ...]
    layers: tuple[str, ...]


def new_id() -> str:
    """Return a random id."""
    return secrets.token_hex(8)


def put(store: Path, pin: Pin) -> None:
    """Write a pin, whole or not at all; its owner must be there already, or gc may drop it."""
    folder = store / "pins"
    folder.mkdir(mode=0o755, exist_ok=True)
    with whole_file(folder / f"{pin.id}.json") as file:
        file.write(json.dumps({"owner": pin.owner, "metas": pin.metas, "layers": pin.layers}).encode())


def drop(store: Path, identity: str) -> None:
    """Remove a pin if it is there."""
    (store / "pins" / f"{identity}.json").unlink(missing_ok=True)


def live(store: Path) -> list[Pin]:
    """Return the pins whose owners are there."""
    return [pin for _, pin, alive in _all(store) if alive]


def clear(store: Path) -> list[str]:
    """Remove the pins whose owners are gone; return what was removed, as text."""
    cleared = []
    for path, pin, alive in _all(store):
        if not alive:
            path.unlink(missing_ok=True)
            cleared.append(f"pin of {pin.owner}")
    return cleared


def used(pins: Collection[Pin]) -> tuple[set[str], set[str]]:
    """Return (diff_ids, META keys) that ``pins`` keep."""
    return {x for pin in pins for x in pin.layers}, {x for pin in pins for x in pin.metas}


def _all(store: Path) -> list[tuple[Path, Pin, bool]]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(store / "pins")):
            path = store / "pins" / name
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if path.suffix != ".json":
                    continue
                facts = json.loads(path.read_bytes())
                pin = Pin(path.stem, str(facts["owner"]), tuple(facts["metas"]), tuple(facts["layers"]))
                found.append((path, pin, _owned(pin)))
    return found


def _owned(pin: Pin) -> bool:
    try:
        return pin.id.encode() in Path(pin.owner).read_bytes()
    except FileNotFoundError:
        return False
    except OSError:
        # Not reachable is not gone: keep what may be in use.
        return True
