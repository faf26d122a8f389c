"""Requests as the programs of registries send them, header by header, and the answers that these want.

The forms are those of the senders' own sources (distribution ``notifications``, Harbor ``notifier`` and
``p2p/preheat``, zot ``extensions/events`` over the SDK of CloudEvents); names and values are ours.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hook_service import TOKEN, call, hook, settings

from layerkit.model.digest import Digest

DIGEST = str(Digest.of(b"pushed"))
OCI, SCHEMA2 = "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"
AGENT = {"User-Agent": "Go-http-client/1.1", "Accept-Encoding": "gzip"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
# An account's name is whatever the operator has put there.
BASIC = {"Authorization": "Basic " + base64.b64encode(f"mirror:{TOKEN}".encode()).decode()}


def notification(media_type: str) -> bytes:
    """As distribution writes it: indented, the descriptor's members in the target, blobs it refers to listed."""
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": str(Digest.of(b"l")), "size": 81}
    target = {
        "mediaType": media_type, "digest": DIGEST, "size": 481, "length": 481, "repository": "team/app",
        "url": f"http://mirror.example:5000/v2/team/app/manifests/{DIGEST}", "tag": "v3", "references": [layer],
    }  # fmt: skip
    whole = {
        "id": "7d3a1f64-0000-4000-8000-51a2c0ffee00", "timestamp": "2026-11-28T09:00:00.123456789Z",
        "action": "push", "target": target,
        "request": {"id": "41", "addr": "192.0.2.7:40112", "host": "mirror.example:5000", "method": "PUT",
                    "useragent": "skopeo/1.9.3"},
        "actor": {}, "source": {"addr": "mirror-0:5000", "instanceID": "1f64"},
    }  # fmt: skip
    return json.dumps({"events": [whole]}, indent=3).encode()


def preheat() -> bytes:
    """As Harbor's driver for Kraken writes it: names of Go's fields but for three, and what is not set as null."""
    target = {"MediaType": SCHEMA2, "Digest": DIGEST, "Repository": "team/app", "Tag": "v3",
              "Url": f"https://harbor.example/v2/team/app/manifests/{DIGEST}"}  # fmt: skip
    event = {"Id": "f3tr9", "TimeStamp": "2026-11-28T09:00:00.5Z", "Action": "push", "Target": target,
             "Request": None, "Actor": None}  # fmt: skip
    return json.dumps({"Events": [event]}).encode()


def harbor_data(tag: str) -> dict[str, Any]:
    separator = "@" if tag.startswith("sha256:") else ":"
    resource = {"digest": DIGEST, "tag": tag, "resource_url": f"harbor.example/team/app{separator}{tag}"}
    place = {"date_created": 1764316800, "name": "app", "namespace": "team", "repo_full_name": "team/app",
             "repo_type": "private"}  # fmt: skip
    return {"resources": [resource], "repository": place}


def harbor_default(tag: str) -> bytes:
    body = {"type": "PUSH_ARTIFACT", "occur_at": 1764316800, "operator": "ci", "event_data": harbor_data(tag)}
    return json.dumps(body).encode()


def harbor_cloud(tag: str) -> bytes:
    return json.dumps({
        "specversion": "1.0", "id": "6b1c", "source": "/projects/7/webhook/policies/2", "requestid": "a1",
        "type": "harbor.artifact.pushed", "datacontenttype": "application/json", "time": "2026-11-28T09:00:00Z",
        "data": harbor_data(tag), "operator": "robot$team+ci",
    }).encode()  # fmt: skip


def zot(reference: str) -> bytes:
    """As zot's recorder fills it: the manifest itself comes along as a text."""
    body = {"name": "team/app", "reference": reference, "digest": DIGEST, "mediaType": OCI,
            "manifest": json.dumps({"schemaVersion": 2})}  # fmt: skip
    return json.dumps(body).encode()


ZOT = {
    "Ce-Id": "0e1d", "Ce-Source": "zotregistry.dev", "Ce-Specversion": "1.0",
    "Ce-Type": "zotregistry.image.updated",
    "Ce-Time": "2026-11-28T09:00:00.25Z", "Ce-Channel": "images", "Content-Type": "application/json",
}  # fmt: skip
JSON = {"Content-Type": "application/json"}
KRAKEN = JSON | {"Accept": "application/json"}
EVENTS = "application/vnd.docker.distribution.events.v{}+json"

SENT: dict[str, tuple[str, dict[str, str], bytes]] = {
    "distribution 2": ("/v1/events/main", BEARER | {"Content-Type": EVENTS.format(1)}, notification(SCHEMA2)),
    "distribution 3": ("/v1/events/main", BEARER | {"Content-Type": EVENTS.format(2)}, notification(OCI)),
    "Harbor preheat, basic": ("/registry/notifications", BASIC | KRAKEN, preheat()),
    "Harbor preheat, OAuth": ("/registry/notifications", BEARER | KRAKEN, preheat()),
    "Harbor webhook": ("/v1/events/main", BEARER | JSON, harbor_default("v3")),
    "Harbor webhook, untagged": ("/v1/events/main", BEARER | JSON, harbor_default(DIGEST)),
    "Harbor webhook, CloudEvents": (
        "/v1/events/main", BEARER | {"Content-Type": "application/cloudevents+json"}, harbor_cloud("v3")
    ),
    "Harbor webhook, CloudEvents, untagged": (
        "/v1/events/main", BEARER | {"Content-Type": "application/cloudevents+json"}, harbor_cloud(DIGEST)
    ),
    "zot": ("/v1/events/main", BASIC | ZOT, zot("v3")),
    "zot, by digest": ("/v1/events/main", BASIC | ZOT, zot(DIGEST)),
}  # fmt: skip


@pytest.mark.parametrize("sender", SENT)
def test_what_a_sender_sends_becomes_the_job_and_is_acknowledged(sender: str, tmp_path: Path) -> None:
    path, headers, body = SENT[sender]
    with hook(settings(tmp_path)) as (url, queue):
        status, _, answer = call(url + path, headers=AGENT | headers, raw=body)
        # All of them take any 2xx for done. 208 has a meaning of its own for Harbor: it was preheated before.
        assert status == 202, answer
        said = json.loads(answer)
        assert (said["count"], said["ignored"]) == (1, 0), said
        (row,) = queue.jobs()
        assert row.digest == DIGEST
        tagged = "untagged" not in sender and "digest" not in sender
        assert [(t.repository, t.tag) for t in row.targets] == [("team/app", "v3" if tagged else "")]
        # Senders repeat what they are not sure of.
        assert json.loads(call(url + path, headers=AGENT | headers, raw=body)[2])["jobs"][0]["new"] is False
        wrong = headers | {"Authorization": headers["Authorization"][:-4] + "AAAA"}
        assert call(url + path, headers=AGENT | wrong, raw=body)[0] == 401


def test_what_senders_tell_beside_pushes_is_acknowledged_and_left(tmp_path: Path) -> None:
    """A refusal would make them send it again, or hold back what follows."""
    pull = notification(OCI).replace(b'"push"', b'"pull"')
    mount = notification("application/octet-stream").replace(b'"push"', b'"mount"')
    others = [
        (BEARER | {"Content-Type": EVENTS.format(2)}, pull),
        (BEARER | {"Content-Type": EVENTS.format(2)}, mount),
        (BEARER | JSON, harbor_default("v3").replace(b"PUSH_ARTIFACT", b"SCANNING_COMPLETED")),
        (BEARER | JSON, harbor_default("v3").replace(b"PUSH_ARTIFACT", b"TAG_RETENTION")),
        (BEARER | {"Content-Type": "application/cloudevents+json"},
         harbor_cloud("v3").replace(b"artifact.pushed", b"quota.exceeded")),
        (BASIC | ZOT | {"Ce-Type": "zotregistry.image.lint_failed"}, zot("v3")),
        (BASIC | ZOT | {"Ce-Type": "zotregistry.repository.created"}, b'{"name": "team/app"}'),
    ]  # fmt: skip
    with hook(settings(tmp_path)) as (url, queue):
        for headers, body in others:
            status, _, answer = call(f"{url}/v1/events/main", headers=AGENT | headers, raw=body)
            assert (status, json.loads(answer)["count"]) == (202, 0), answer
        assert queue.jobs() == []


def test_harbor_finds_the_preheat_instance_healthy(tmp_path: Path) -> None:
    """It asks with the instance's account and takes any 2xx; one that could not post is shown as unhealthy."""
    with hook(settings(tmp_path)) as (url, _):
        for account, want in ((BASIC, 200), (BEARER, 200), ({}, 401)):
            headers = AGENT | account | {"Accept": "application/json"}
            assert call(f"{url}/health", headers=headers, method="GET")[0] == want
