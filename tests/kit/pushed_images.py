"""Images pushed by plain HTTP, and what a registry then lists of them; no code of ours."""

from __future__ import annotations

import gzip
import json
import urllib.error
import urllib.request
from dataclasses import dataclass

from hook_service import BEARER, call
from made_images import CONFIG, INDEX, LAYER, MANIFEST, descriptor, digest, dump, tar

REMAP = "application/vnd.layerkit.remap.v1"


@dataclass
class Pushed:
    name: str
    digest: str
    layers: list[str]


def image(number: int) -> tuple[bytes, dict[str, bytes], list[str]]:
    """A manifest, its blobs by digest, and the digests of its layers: one of all, one of five, one of its own."""
    layers = [
        tar(("etc/base", b"base" * 2000), ("bin/sh", b"\x7fELF" * 500)),
        tar((f"opt/group{number % 5}", b"group" * 1000)),
        tar((f"srv/own{number}", b"%d" % number * 300), ("etc/base", b"changed" * number)),
    ]
    packed = [gzip.compress(layer, mtime=0) for layer in layers]
    config = dump(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest(x) for x in layers]},
        }
    )
    manifest = dump({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(config, CONFIG),
        "layers": [descriptor(blob, LAYER + "+gzip") for blob in packed],
    })  # fmt: skip
    return manifest, {digest(blob): blob for blob in (config, *packed)}, [digest(blob) for blob in packed]


def ask(
    host: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, str]:
    url = path if path.startswith("http") else f"http://{host}/v2/{path}"
    request = urllib.request.Request(url, body, {k.replace("_", "-"): v for k, v in headers.items()}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers.get("Location", "")
    except urllib.error.HTTPError as error:
        return error.code, error.read(), ""


def push(host: str, number: int) -> Pushed:
    """Push an image by plain HTTP, as the specification says it; no code of ours."""
    manifest, blobs, layers = image(number)
    name = f"team{number % 3}/app{number}"
    for at, blob in blobs.items():
        if ask(host, f"{name}/blobs/{at}", "HEAD")[0] == 404:
            place = ask(host, f"{name}/blobs/uploads/", "POST", b"")[2]
            mark = "&" if "?" in place else "?"
            status, said, _ = ask(
                host, f"{place}{mark}digest={at}", "PUT", blob, Content_Type="application/octet-stream"
            )
            assert status == 201, said
    status, said, _ = ask(host, f"{name}/manifests/v1", "PUT", manifest, Content_Type=MANIFEST)
    assert status == 201, said
    return Pushed(name, digest(manifest), layers)


def artifacts(host: str, pushed: Pushed) -> list[dict[str, object]]:
    """What the registry lists for an image: whole, of the right subject, its blobs there and right."""
    status, data, _ = ask(host, f"{pushed.name}/manifests/{pushed.digest.replace(':', '-')}", Accept=INDEX)
    if status == 404:
        return []
    found = []
    for entry in json.loads(data)["manifests"]:
        status, manifest, _ = ask(host, f"{pushed.name}/manifests/{entry['digest']}", Accept=MANIFEST)
        assert status == 200 and digest(manifest) == entry["digest"], "an artifact is listed and not there"
        document = json.loads(manifest)
        if document["artifactType"] != REMAP:
            continue
        assert document["subject"]["digest"] == pushed.digest
        for blob in (document["config"], *document["layers"]):
            status, content, _ = ask(host, f"{pushed.name}/blobs/{blob['digest']}")
            assert status == 200 and digest(content) == blob["digest"], "half an artifact is visible"
        found.append(document)
    return found


def map_of(document: dict[str, object]) -> str:
    annotations = document["annotations"]
    assert isinstance(annotations, dict)
    return str(annotations["io.layerkit.remap.map"])


def states(url: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(call(f"{url}/v1/status", headers=BEARER)[2])["states"]
    return found


def settled(url: str, done: int) -> bool:
    found = states(url)
    return not found.get("waiting") and not found.get("running") and found.get("done", 0) >= done
