"""What layerkit writes, held against the JSON schemas of image-spec (``tests/kit/schemas``) and its own digests."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from made_images import CONFIG, INDEX, MANIFEST
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

_SCHEMAS = Path(__file__).resolve().parent / "schemas"
_KINDS = {INDEX: "image-index-schema", MANIFEST: "image-manifest-schema", CONFIG: "config-schema"}
_FOREIGN = ("application/vnd.docker.",)

_formats = jsonschema.FormatChecker(formats=())


def _is_time(value: object) -> bool:
    # RFC 3339, which demands a zone.
    return not isinstance(value, str) or datetime.datetime.fromisoformat(value).tzinfo is not None


_formats.checks("date-time", raises=ValueError)(_is_time)


def _load(name: str) -> Any:
    return json.loads((_SCHEMAS / name).read_text())


def _retrieve(uri: str) -> Resource[Any]:
    # The files refer to each other by name, from ids in several folders.
    return Resource.from_contents(_load(uri.rpartition("/")[2]), default_specification=DRAFT4)


@functools.cache
def _validator(kind: str) -> Any:
    registry: Registry[Any] = Registry(retrieve=_retrieve)  # type: ignore[call-arg]
    return jsonschema.Draft4Validator(_load(f"{kind}.json"), registry=registry, format_checker=_formats)


def problems(kind: str, document: object) -> list[str]:
    """Return what the schema ``kind`` (a file's name without ``.json``) says against ``document``."""
    return [f"{kind}: {error.json_path}: {error.message}" for error in _validator(kind).iter_errors(document)]


def check(place: Path) -> dict[str, int]:
    """Validate every document of the layout or archive ``place``; return how many of each kind there were.

    Every descriptor is followed: its blob must be there with this size and digest. Whatever is not OCI's own, such
    as a docker manifest that was copied as it is, counts as ``foreign`` and has no schema.
    """
    read = _folder(place) if place.is_dir() else _archive(place)
    found: list[str] = problems("image-layout-schema", json.loads(read("oci-layout")))
    counts = {"layout": 1}
    index = json.loads(read("index.json"))
    found += problems("image-index-schema", index)
    todo = list(index["manifests"])
    seen = set()
    while todo:
        entry = todo.pop()
        found += problems("content-descriptor", entry)
        if entry["digest"] in seen:
            continue
        seen.add(entry["digest"])
        algorithm, _, text = entry["digest"].partition(":")
        data = read(f"blobs/{algorithm}/{text}")
        if len(data) != entry["size"] or hashlib.new(algorithm, data).hexdigest() != text:
            found.append(f"blob {entry['digest']}: not what its descriptor says")
        kind = _KINDS.get(entry["mediaType"])
        if kind is None:
            name = "foreign" if entry["mediaType"].startswith(_FOREIGN) else "blob"
            counts[name] = counts.get(name, 0) + 1
            continue
        counts[kind] = counts.get(kind, 0) + 1
        document = json.loads(data)
        found += [f"{entry['digest']}: {line}" for line in problems(kind, document)]
        if kind != "config-schema":
            if document.get("mediaType", entry["mediaType"]) != entry["mediaType"]:
                found.append(
                    f"{entry['digest']}: says it is {document['mediaType']}, listed as {entry['mediaType']}"
                )
            config = [document["config"]] if "config" in document else []
            todo += [*document.get("manifests", []), *config, *document.get("layers", [])]
    assert not found, "\n".join(found)
    return counts


def _folder(place: Path) -> Callable[[str], bytes]:
    return lambda name: (place / name).read_bytes()


def _archive(place: Path) -> Callable[[str], bytes]:
    with tarfile.open(place) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}  # type: ignore[union-attr]
    return members.__getitem__
