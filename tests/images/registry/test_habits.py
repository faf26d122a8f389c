"""Habits of registries that users of skopeo, crane and docker meet, each in a registry that is made to have it."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_images import digest as digest_of
from programs import skopeo
from registry_fake import Fake, Handler
from registry_server import PASSWORD, USER, TokenServer, docker_registry

from layerkit.formats.oci import documents as oci
from layerkit.images.registry.client import RegistryClient, Repository
from layerkit.images.registry.options import Retry
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, RegistryError

BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
BLOB = b"a blob" * 1000


def blob(data: bytes) -> Descriptor:
    return Descriptor("application/octet-stream", Digest.of(data), len(data))


def manifest() -> bytes:
    return oci.manifest_json(oci.EMPTY_DESCRIPTOR, [])


@pytest.mark.parametrize("status", [405, 501])
def test_a_registry_that_does_not_know_head(fake: Fake, repo: Repository, status: int) -> None:
    """What HEAD would say is asked for by GET: tags resolve, and nothing is sent twice."""
    fake.put("team/app", "v1", manifest())
    fake.repo("team/app").blobs[digest_of(BLOB)] = BLOB

    def no_head(handler: Handler) -> bool:
        if handler.command == "HEAD":
            handler.error(status, "UNSUPPORTED")
        return handler.command == "HEAD"

    fake.before = no_head
    assert repo.resolve("v1").digest == Digest.of(manifest())
    assert repo.has_manifest("v1") and not repo.has_manifest("v2")
    assert repo.blob_size(Digest.of(BLOB)) == len(BLOB)
    assert repo.blob_size(Digest.of(b"absent")) is None
    repo.put_blob(blob(b"new"), [b"new"])
    assert fake.repo("team/app").blobs[digest_of(b"new")] == b"new"


def test_head_that_answers_half(fake: Fake, repo: Repository) -> None:
    """Neither the digest nor the length is promised in an answer to HEAD."""
    fake.put("team/app", "v1", manifest())

    def half(handler: Handler) -> bool:
        if handler.command == "HEAD":
            handler.send_response(200)
            handler.send_header("Content-Type", oci.MANIFEST)
            handler.end_headers()
        return handler.command == "HEAD"

    fake.before = half
    found = repo.resolve("v1")
    assert (found.digest, found.size) == (Digest.of(manifest()), len(manifest()))


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("NAME_UNKNOWN", lambda repo: repo.manifest("v1")),
        ("MANIFEST_UNKNOWN", lambda repo: repo.manifest("v1")),
        ("MANIFEST_UNKNOWN", lambda repo: repo.resolve("v1")),
        ("NAME_UNKNOWN", lambda repo: list(repo.tags())),
        ("BLOB_UNKNOWN", lambda repo: repo.blob(blob(BLOB), 1 << 20)),
    ],
)
def test_what_is_not_there(fake: Fake, repo: Repository, code: str, call: Callable[[Repository], object]) -> None:
    """Every 404 is the same to a caller, whatever the code in it, and is asked once."""

    def unknown(handler: Handler) -> bool:
        handler.error(404, code, "unknown to the registry")
        return True

    fake.before = unknown
    with pytest.raises(NotFound, match="no such"):
        call(repo)
    assert len([1 for method, path, _ in fake.requests if method == "GET" and path != "/v2/"]) == 1


def test_a_rate_limit_is_said_in_the_registrys_words(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    repo = make(retry=Retry(3, 0.001, 0.01)).repository(f"{fake.host}/team/app")

    def limited(handler: Handler) -> bool:
        handler.error(429, "TOOMANYREQUESTS", "You have reached your pull rate limit", Retry_After="0",
                      RateLimit_Remaining="0;w=21600")  # fmt: skip
        return handler.path != "/v2/"

    fake.before = limited
    with pytest.raises(RegistryError) as caught:
        repo.manifest("v1")
    assert caught.value.status == 429 and caught.value.temporary and caught.value.exit_code == 4
    assert "reached your pull rate limit" in str(caught.value) and "log in" in str(caught.value)
    assert fake.count("GET", "/manifests/v1") == 3  # as often as the options say, and no more


def test_warnings_are_passed_on_once(fake: Fake, repo: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """distribution-spec 1.1: clients should show the texts of ``Warning: 299`` headers."""
    fake.put("team/app", "v1", manifest())

    def warns(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Warning", '299 - "This \\"old\\" name ends in May\x1b[31m"')
        handler.send_header("Warning", '199 - "not for us"')
        handler.send_header("Content-Type", oci.MANIFEST)
        handler.send_header("Content-Length", str(len(manifest())))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(manifest())
        return True

    fake.before = warns
    with caplog.at_level(logging.WARNING, "layerkit.registry"):
        repo.manifest("v1")
        repo.manifest("v1")
    (said,) = [record.getMessage() for record in caplog.records]
    assert 'This "old" name ends in May' in said and "\x1b" not in said and "not for us" not in said


@pytest.mark.parametrize(
    "challenges",
    [
        ['Negotiate, Basic realm="a, b"'],
        ["Negotiate", 'Basic realm="x", charset="UTF-8"'],
        ['NTLM dG9rZW4=, basic realm="x"'],
        ['Basic realm="x", Digest realm="y", nonce="n=1", qop="auth,auth-int"'],
    ],
)
def test_several_challenges(fake: Fake, make: Callable[..., RegistryClient], challenges: list[str]) -> None:
    """The one that is known is answered, wherever it stands and in whatever header."""
    fake.put("team/app", "v1", manifest())

    def closed(handler: Handler) -> bool:
        if handler.path == "/v2/" or handler.headers.get("Authorization") == BASIC:
            return False
        handler.send_response(401)
        for value in challenges:
            handler.send_header("WWW-Authenticate", value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    fake.before = closed
    client = make({fake.host: {"username": USER, "password": PASSWORD}})
    assert client.repository(f"{fake.host}/team/app").manifest("v1")[1] == manifest()


def test_bearer_is_preferred_to_basic(fake: Fake, make: Callable[..., RegistryClient], tmp_path: Path) -> None:
    """As docker and containerd do: a password goes to the token server, not along with every request."""
    tokens = TokenServer(tmp_path / "tokens")
    try:
        fake.put("team/app", "v1", manifest())

        def closed(handler: Handler) -> bool:
            if handler.path == "/v2/" or handler.headers.get("Authorization", "").startswith("Bearer "):
                return False
            both = f'Basic realm="x", Bearer realm="{tokens.url}",service="test-registry"'
            handler.reply(401, WWW_Authenticate=both)
            return True

        fake.before = closed
        client = make({fake.host: {"username": USER, "password": PASSWORD}})
        client.repository(f"{fake.host}/team/app").manifest("v1")
        assert tokens.asked == [["repository:team/app:pull"]]
        assert not [head for _, _, head in fake.requests if head.get("Authorization", "").startswith("Basic")]
    finally:
        tokens.close()


@pytest.mark.parametrize("form", ["relative", "absolute", "query"])
def test_pages_by_links_of_every_form(fake: Fake, repo: Repository, form: str) -> None:
    """Link headers hold whole URLs, paths, or only a query; parameters stand before and behind ``rel``."""
    names = [f"t{n}" for n in range(5)]

    def paged(handler: Handler) -> bool:
        path, _, query = handler.path.partition("?")
        if not path.endswith("/tags/list"):
            return False
        at = int(query.rpartition("last=")[2] or -1) + 1
        place = {"relative": path, "absolute": f"http://{fake.host}{path}", "query": ""}[form]
        link = {"Link": f'<{place}?n=1&last={at}>; title="more, of it"; rel=next'} if at < 4 else {}
        body = json.dumps({"name": "team/app", "tags": [names[at]]}).encode()
        handler.reply(200, body, Content_Type="application/json", **link)
        return True

    fake.before = paged
    assert list(repo.tags()) == names


def test_tags_that_are_null(fake: Fake, repo: Repository) -> None:
    """Go writes an empty list as null."""

    def null(handler: Handler) -> bool:
        handler.reply(200, b'{"name": "team/app", "tags": null}', Content_Type="application/json")
        return True

    fake.before = null
    assert list(repo.tags()) == []


def test_media_types_with_parameters_and_none(fake: Fake, repo: Repository) -> None:
    for kind in (oci.MANIFEST + "; charset=utf-8", "application/json", ""):

        def typed(handler: Handler, kind: str = kind) -> bool:
            handler.reply(200, manifest(), **({"Content_Type": kind} if kind else {}))
            return True

        fake.before = typed
        assert repo.manifest("v1")[0] == Descriptor(oci.MANIFEST, Digest.of(manifest()), len(manifest()))


def test_short_names_and_ports_mean_what_they_mean_to_docker(
    tmp_path: Path, tiny_archive: Callable[..., Path]
) -> None:
    """``docker://localhost:PORT/NAME`` without TLS: refused with the way out, taken where that is allowed."""
    with docker_registry(tmp_path / "r") as registry:
        source = f"oci-archive:{tiny_archive()}"
        for name in ("tiny", "tiny:v2", "library/tiny:v3"):
            skopeo("copy", "-q", "--dest-tls-verify=false", source, registry.ref(name))

        def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "layerkit.cli.main", *words]
            return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60)

        refused = run("inspect", registry.ref("tiny"), LAYERKIT_TLS_VERIFY="true")
        assert refused.returncode == 4 and "--tls-verify=false" in refused.stderr
        for name in ("tiny", "tiny:latest", "tiny:v2", "library/tiny:v3"):
            assert run("inspect", registry.ref(name), "--tls-verify=false").returncode == 0, name
        digest = json.loads(skopeo("inspect", "--tls-verify=false", registry.ref("tiny")).stdout)["Digest"]
        for name in (f"tiny@{digest}", f"tiny:latest@{digest}"):
            assert run("inspect", registry.ref(name), "--tls-verify=false").returncode == 0, name
