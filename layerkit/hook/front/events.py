"""What registries send, parsed into one kind of value. Pure: no network, no clock.

Understood are

- distribution notifications, media types ``application/vnd.docker.distribution.events.v1+json`` and ``.v2+json``
  (distribution, docs "Work with notifications");
- Harbor's preheat driver for Kraken, which posts the same envelope to ``/registry/notifications`` under the names
  of Go's struct fields (``Events``, ``Target``) and calls everything a schema 2 manifest, indexes too;
- Harbor webhooks, "Default" and "CloudEvents" (``harbor.artifact.pushed``);
- zot's CloudEvents (``zotregistry.image.updated``), binary, structured and batched (CloudEvents HTTP binding 3);
- our own ``POST /v1/jobs``.

An event is a claim by a stranger. It says *which* manifest may be new; never *where*: no URL of an event is used
for anything, and its media type only to leave out blobs. A wrong event among good ones is left out with a reason,
as senders repeat a refused request for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import loads
from layerkit.images.registry.names import REPOSITORY, TAG
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage
from layerkit.model.limits import Limits

CLOUD_EVENT = "application/cloudevents+json"
CLOUD_EVENTS = "application/cloudevents-batch+json"

_MANIFESTS = oci.MANIFEST_TYPES | oci.INDEX_TYPES
_MAX_REPOSITORY_CHARS = 255
_MAX_HOST_CHARS = 255
_EVENT_LIMITS = Limits(json_depth=32)


@dataclass(frozen=True, slots=True)
class Event:
    """A manifest that may be new.

    Attributes:
        repository: name within a registry, checked.
        digest: of the manifest, None where only a tag was told.
        tag: for people, and to be resolved where there is no digest; may be empty.
        host: what the sender says the registry is called; only ever compared with configured names.
        kind: ``distribution``, ``harbor``, ``zot`` or ``job``.
    """

    repository: str
    digest: Digest | None
    tag: str
    host: str
    kind: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """The events of one request, and why the others were left out."""

    events: tuple[Event, ...]
    ignored: tuple[str, ...]


class BadRequest(Exception):
    """The request as a whole is none that we know."""


class _Left(Exception):
    """One event is left out; the text says why."""


def parse(body: bytes, content_type: str, headers: Mapping[str, str], *, max_events: int = 100_000) -> Parsed:
    """Return the events that a request holds.

    Args:
        body: of the request, already bounded.
        content_type: its media type; parameters are allowed.
        headers: names in lower case; those of CloudEvents (``ce-…``) are read.
        max_events: bound on the events of one request.

    Raises:
        BadRequest: not JSON, or JSON that is no notification we know.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    value = _json(body)
    found: Iterable[tuple[str, Mapping[str, object]]]
    if "ce-type" in headers:
        found = _cloud(headers["ce-type"], value, headers.get("ce-source", ""))
    elif media_type == CLOUD_EVENTS or (isinstance(value, list) and media_type != CLOUD_EVENT):
        if not isinstance(value, list):
            raise BadRequest("a batch of CloudEvents is a JSON array")
        found = [pair for each in value for pair in _structured(each)]
    elif not isinstance(value, dict):
        raise BadRequest(f"want a JSON object, found {type(value).__name__}")
    elif media_type == CLOUD_EVENT or "specversion" in value:
        found = _structured(value)
    elif "event_data" in value:
        found = _harbor(str(value.get("type", "")), value.get("event_data"))
    else:
        found = _distribution(value)
    events: list[Event] = []
    ignored: list[str] = []
    for count, (kind, fields) in enumerate(found):
        if count >= max_events:
            raise BadRequest(f"more than {max_events} events in one request")
        try:
            events.append(_event(kind, fields))
        except _Left as why:
            ignored.append(str(why))
    return Parsed(tuple(events), tuple(ignored))


def parse_job(body: bytes) -> tuple[Event, bool]:
    """Return what the body of ``POST /v1/jobs`` asks for, and whether a dead or finished job is to run again.

    ``{"repository": "library/app", "reference": "TAG or DIGEST", "registry": "NAME", "again": false}``; the
    registry may be left out where only one is configured.

    Raises:
        BadRequest: anything else, unknown members too: a typing error must not become a default.
    """
    value = _json(body)
    if not isinstance(value, dict):
        raise BadRequest(f"want a JSON object, found {type(value).__name__}")
    if unknown := value.keys() - {"repository", "reference", "registry", "again"}:
        raise BadRequest(f"unknown member {min(unknown)!r}; known are repository, reference, registry and again")
    reference, again = value.get("reference"), value.get("again", False)
    if not isinstance(reference, str) or not reference or not isinstance(again, bool):
        raise BadRequest("reference: want a tag or a digest as text; again: want true or false")
    fields = {"repository": value.get("repository"), "host": value.get("registry", "")}
    fields["digest" if ":" in reference else "tag"] = reference
    try:
        return _event("job", fields), again
    except _Left as why:
        raise BadRequest(str(why)) from None


def _json(body: bytes) -> object:
    try:
        return loads(body, "the request", _EVENT_LIMITS)
    except InvalidImage as error:
        raise BadRequest(str(error)) from None


def _event(kind: str, fields: Mapping[str, object]) -> Event:
    if why := fields.get("left"):
        raise _Left(str(why))
    media_type = _text(fields.get("mediatype"))
    if media_type and media_type not in _MANIFESTS:
        raise _Left(f"media type {media_type[:80]!r} is no manifest")
    repository, tag, host = (_text(fields.get(name)) for name in ("repository", "tag", "host"))
    if len(repository) > _MAX_REPOSITORY_CHARS or not REPOSITORY.fullmatch(repository):
        raise _Left(f"not a repository name: {repository[:80]!r}")
    digest: Digest | None = None
    if text := _text(fields.get("digest")):
        try:
            digest = Digest.parse(text)
        except InvalidImage:
            raise _Left(f"{repository}: not a digest: {text[:80]!r}") from None
    # Harbor names an untagged artifact by its digest in the place of the tag.
    if tag and not TAG.fullmatch(tag):
        if digest is None:
            raise _Left(f"{repository}: not a tag: {tag[:80]!r}")
        tag = ""
    if digest is None and not tag:
        raise _Left(f"{repository}: neither a digest nor a tag")
    return Event(repository, digest, tag, host[:_MAX_HOST_CHARS], kind)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _lower(value: object) -> dict[str, object]:
    """Return an object's members with their names in lower case: Go writes and reads them in any case."""
    return {name.lower(): member for name, member in value.items()} if isinstance(value, dict) else {}


def _distribution(value: dict[str, object]) -> Iterable[tuple[str, dict[str, object]]]:
    events = _lower(value).get("events")
    if not isinstance(events, list):
        raise BadRequest("want a notification of distribution, Harbor or zot; found a JSON object without events")
    for each in events:
        event = _lower(each)
        target, request = _lower(event.get("target")), _lower(event.get("request"))
        left = "" if event.get("action") == "push" else f"action {str(event.get('action'))[:40]!r}"
        yield "distribution", {**target, "host": request.get("host"), "left": left}


def _harbor(event_type: str, data: object) -> Iterable[tuple[str, dict[str, object]]]:
    if event_type not in ("PUSH_ARTIFACT", "pushImage", "harbor.artifact.pushed"):
        yield "harbor", {"left": f"Harbor event {event_type[:40]!r}"}
        return
    if not isinstance(data, dict) or not isinstance(data.get("resources"), list):
        raise BadRequest("a Harbor event without resources")
    repository = data.get("repository")
    name = repository.get("repo_full_name") if isinstance(repository, dict) else None
    for each in data["resources"]:
        resource = each if isinstance(each, dict) else {}
        # The URL serves as a name of the registry alone, up to the first slash.
        host = _text(resource.get("resource_url")).partition("/")[0]
        yield "harbor", {**resource, "repository": name, "host": host}


def _structured(value: object) -> Iterable[tuple[str, dict[str, object]]]:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise BadRequest("a CloudEvent is a JSON object with a type")
    return _cloud(value["type"], value.get("data"), _text(value.get("source")))


def _cloud(event_type: str, data: object, source: str) -> Iterable[tuple[str, dict[str, object]]]:
    if event_type.startswith("harbor."):
        yield from _harbor(event_type, data)
        return
    if event_type != "zotregistry.image.updated":
        yield "zot", {"left": f"CloudEvent {event_type[:60]!r}"}
        return
    if not isinstance(data, dict):
        raise BadRequest("a CloudEvent of zot holds an object as its data")
    reference = _text(data.get("reference"))
    tag, digest = ("", reference) if ":" in reference else (reference, "")
    fields = {"repository": data.get("name"), "digest": data.get("digest") or digest, "tag": tag}
    # zot's source is a constant of the program; an operator may have set it to the registry's name.
    yield "zot", {**fields, "mediatype": data.get("mediaType"), "host": source}
