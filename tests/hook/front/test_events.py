"""What registries send, as they send it, and as an attacker would."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkit.hook.front.events import BadRequest, Event, parse, parse_job

DISTRIBUTION_TYPES = (
    "application/vnd.docker.distribution.events.v1+json",
    "application/vnd.docker.distribution.events.v2+json",
)

HEX = "ab" * 32
DIGEST = f"sha256:{HEX}"
SCHEMA2 = "application/vnd.docker.distribution.manifest.v2+json"


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def distribution(**target: Any) -> dict[str, Any]:
    whole = {"mediaType": SCHEMA2, "digest": DIGEST, "repository": "library/app", "tag": "1", "size": 1, **target}
    return {
        "id": "e1", "timestamp": "2026-11-21T09:00:00Z", "action": "push", "target": whole,
        "request": {"addr": "10.0.0.1:44", "host": "registry.example:5000", "method": "PUT", "useragent": "docker"},
        "source": {"addr": "r1:5000", "instanceID": "x"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "media_type", [*DISTRIBUTION_TYPES, "application/json", DISTRIBUTION_TYPES[1] + "; charset=utf-8"]
)
def test_distribution(media_type: str) -> None:
    found = parse(dump({"events": [distribution()]}), media_type, {})
    assert [(e.repository, str(e.digest), e.tag, e.host, e.kind) for e in found.events] == [
        ("library/app", DIGEST, "1", "registry.example:5000", "distribution")
    ]
    assert found.ignored == ()


def test_pulls_deletes_and_blobs_are_left_out() -> None:
    pull, delete = distribution() | {"action": "pull"}, distribution() | {"action": "delete"}
    blob = distribution(mediaType="application/octet-stream")
    found = parse(dump({"events": [pull, blob, distribution(), delete]}), DISTRIBUTION_TYPES[0], {})
    assert len(found.events) == 1
    assert len(found.ignored) == 3


def test_the_preheat_driver_of_harbor_writes_gos_own_names() -> None:
    target = {
        "MediaType": SCHEMA2,
        "Digest": DIGEST,
        "Repository": "library/app",
        "Url": "http://h/v2/x",
        "Tag": "2",
    }
    body = {"Events": [{"Id": "i", "TimeStamp": "2026-11-21T09:00:00Z", "Action": "push", "Target": target,
                        "Request": None, "Actor": None}]}  # fmt: skip
    assert parse(dump(body), "application/json", {}).events[0].tag == "2"


@pytest.mark.parametrize("untagged", [True, False])
@pytest.mark.parametrize("cloud", [True, False])
def test_harbor_webhooks(untagged: bool, cloud: bool) -> None:
    data = {
        "resources": [
            {"digest": DIGEST, "tag": DIGEST if untagged else "v1", "resource_url": "harbor.example/team/app:v1"}
        ],
        "repository": {"name": "app", "namespace": "team", "repo_full_name": "team/app", "repo_type": "private"},
    }
    body = {"type": "PUSH_ARTIFACT", "occur_at": 1, "operator": "admin", "event_data": data}
    if cloud:
        body = {"specversion": "1.0", "id": "1", "source": "/projects/1/webhook/policies/1",
                "type": "harbor.artifact.pushed", "datacontenttype": "application/json", "data": data}  # fmt: skip
    (event,) = parse(dump(body), "application/json", {}).events
    assert (event.repository, event.tag, event.host) == ("team/app", "" if untagged else "v1", "harbor.example")
    other = dump(body).replace(b"PUSH_ARTIFACT", b"DELETE_ARTIFACT").replace(b"pushed", b"deleted")
    assert parse(other, "application/json", {}).events == ()


ZOT = {"name": "team/app", "reference": "v1", "digest": DIGEST,
       "mediaType": "application/vnd.oci.image.manifest.v1+json", "manifest": "{}"}  # fmt: skip


def test_zot_in_every_mode_of_the_http_binding() -> None:
    want = Event("team/app", parse(dump({"events": [distribution()]}), "", {}).events[0].digest, "v1", "zot", "zot")
    headers = {"ce-type": "zotregistry.image.updated", "ce-source": "zot", "ce-specversion": "1.0", "ce-id": "1"}
    assert parse(dump(ZOT), "application/json", headers).events == (want,)
    whole = {"specversion": "1.0", "id": "1", "source": "zot", "type": "zotregistry.image.updated", "data": ZOT}
    assert parse(dump(whole), "application/cloudevents+json", {}).events == (want,)
    assert parse(dump([whole, whole]), "application/cloudevents-batch+json", {}).events == (want, want)
    by_digest = whole | {"data": ZOT | {"reference": DIGEST}}
    assert parse(dump(by_digest), "application/json", {}).events[0].tag == ""
    for other in ("zotregistry.image.deleted", "zotregistry.repository.created", "com.example"):
        assert parse(dump(ZOT), "application/json", headers | {"ce-type": other}).events == ()


@pytest.mark.parametrize(
    "target",
    [
        {"repository": "../../etc"}, {"repository": "UPPER"}, {"repository": "a//b"}, {"repository": "a" * 256},
        {"repository": "http://169.254.169.254/latest"}, {"repository": "a@b"}, {"repository": "a/b\n"},
        {"repository": None}, {"repository": {"a": 1}}, {"digest": "sha256:short"}, {"digest": "md5:" + "a" * 32},
        {"digest": DIGEST + "\n"}, {"digest": "", "tag": ""}, {"digest": "", "tag": "a b"},
        {"digest": "", "tag": "a" * 129}, {"digest": "", "tag": "../x"},
    ],
)  # fmt: skip
def test_a_wrong_event_is_left_out_and_the_others_are_kept(target: dict[str, Any]) -> None:
    found = parse(dump({"events": [distribution(**target), distribution()]}), "", {})
    assert len(found.events) == 1
    assert len(found.ignored) == 1
    assert found.events[0].repository == "library/app"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]x", b"1", b"null", b"{}", b'{"events": 1}', b'{"events": [], "events": []}', b"\xff",
        b'{"events": NaN}', b"[" * 100_000, b'{"a":' * 5000, b'{"type": "PUSH_ARTIFACT", "event_data": 1}',
        b'{"specversion": "1.0"}', b'{"specversion": "1.0", "type": "zotregistry.image.updated", "data": []}',
        b'["x"]',
    ],
)  # fmt: skip
def test_what_is_no_notification(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(body, "application/json", {})


def test_too_many_events() -> None:
    with pytest.raises(BadRequest, match="more than 10 events"):
        parse(dump({"events": [distribution()] * 11}), "", {}, max_events=10)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["events", "target", "action", "type", "event_data", "resources", "repository", "specversion",
                     "data", "digest", "tag"]) | st.text(), x)), st.booleans())  # fmt: skip
def test_anything_is_parsed_or_refused(value: object, binary: bool) -> None:
    headers = {"ce-type": "zotregistry.image.updated"} if binary else {}
    try:
        found = parse(dump(value), "application/json", headers)
    except BadRequest:
        return
    for event in found.events:
        assert event.digest or event.tag


def test_a_job() -> None:
    found, again = parse_job(dump({"repository": "a/b", "reference": "v1", "registry": "main", "again": True}))
    assert again
    assert (found.repository, found.tag, found.host) == ("a/b", "v1", "main")
    assert str(parse_job(dump({"repository": "a/b", "reference": DIGEST}))[0].digest) == DIGEST
    wrongs: tuple[object, ...] = (
        {}, [], {"repository": "a"}, {"repository": "a", "reference": 1}, {"repository": "a", "reference": ""},
        {"repository": "a", "reference": "x", "url": "http://x"}, {"repository": "A", "reference": "x"},
        {"repository": "a", "reference": "x", "again": "yes"},
    )  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(BadRequest):
            parse_job(dump(wrong))
