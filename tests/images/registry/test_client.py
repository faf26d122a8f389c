"""The registry client against a strict registry in memory, a hostile one, and a proxy that breaks things."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_proxy import Fault, fault_proxy
from made_images import digest as digest_of
from registry_fake import Fake, Handler, fake_registry

from layerkit.formats.oci import documents as oci
from layerkit.images.registry.client import RegistryClient, Repository
from layerkit.images.registry.options import RegistryOptions, Retry
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, NotFound, RegistryError

PASSWORD = "sentinel-secret-51fe"
AUTH = {"username": "u", "password": PASSWORD}
BIG = os.urandom(6 << 20)
"""Above the size that is sent in one piece from memory."""


def descriptor(data: bytes, media_type: str = "application/octet-stream") -> Descriptor:
    return Descriptor(media_type, Digest.of(data), len(data))


def pieces(data: bytes, size: int = 1 << 20) -> Iterator[bytes]:
    """Chunks that can be iterated once only."""
    yield from (data[i : i + size] for i in range(0, len(data), size))


def read(repo: Repository, blob: Descriptor) -> bytes:
    return repo.blob(blob, blob.size)


# Uploads


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("data", [b"", b"x", BIG], ids=["empty", "small", "big"])
@pytest.mark.parametrize("again", [False, True])
def test_blob_there_and_back(fake: Fake, repo: Repository, data: bytes, again: bool, absolute: bool) -> None:
    fake.absolute = absolute
    blob = descriptor(data)
    assert repo.blob_size(blob.digest) is None
    assert repo.put_blob(blob, [data] if again else pieces(data)) is False
    assert repo.blob_size(blob.digest) == len(data)
    assert read(repo, blob) == data
    assert not fake.violations
    assert fake.count("PATCH") == (6 if len(data) == len(BIG) and not again else 0)


def test_chunks_of_the_size_that_the_registry_wants(fake: Fake, repo: Repository) -> None:
    fake.chunk_min = 4 << 20
    repo.put_blob(descriptor(BIG), pieces(BIG))
    sizes = [int(h["Content-Length"]) for m, _, h in fake.requests if m == "PATCH"]
    assert sizes == [4 << 20, 2 << 20]
    assert not fake.violations


@pytest.mark.parametrize("done", [True, False])
def test_mount_or_go_on_with_the_session(fake: Fake, repo: Repository, done: bool) -> None:
    fake.mount = done
    fake.repo("other/app").blobs[digest_of(BIG)] = BIG
    chunks = pieces(BIG)
    assert repo.put_blob(descriptor(BIG), chunks, mount_from=["other/app"]) is done
    assert (next(chunks, None) is None) is not done  # read to the end, or not touched
    assert fake.count("POST") == 1
    assert fake.repo("team/app").blobs[digest_of(BIG)] == BIG
    assert not fake.violations


@pytest.mark.parametrize("wrong", [BIG[:-1], BIG + b"x", b"y" + BIG[1:]], ids=["short", "long", "other"])
@pytest.mark.parametrize("again", [False, True])
def test_wrong_bytes_are_not_kept(fake: Fake, repo: Repository, wrong: bytes, again: bool) -> None:
    with pytest.raises(DigestMismatch):
        repo.put_blob(descriptor(BIG), [wrong] if again else pieces(wrong))
    assert not fake.repo("team/app").blobs
    assert not fake.sessions


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", status=503, headers={"Retry-After": "0"}, times=2),
        Fault("PUT", status=500),
        Fault("PATCH", status=502, times=2),
        Fault("PATCH", reset_upload_after=100_000, times=3),
        Fault("PUT", reset_upload_after=100_000),
        Fault("PUT", lose_answer=True),
        Fault("PATCH", lose_answer=True, times=2),
        Fault("POST", status=429, headers={"Retry-After": "1"}),
    ],
    ids=lambda f: f"{f.method}-{f.status or ('lost' if f.lose_answer else 'cut')}",
)
def test_upload_through_faults(fake: Fake, make: Callable[..., RegistryClient], fault: Fault, again: bool) -> None:
    with fault_proxy(fake.host) as proxy:
        proxy.add(Fault(**{name: getattr(fault, name) for name in fault.__dataclass_fields__}))
        repo = make().repository(f"{proxy.host}/team/app")
        repo.put_blob(descriptor(BIG), [BIG] if again else pieces(BIG))
    assert fake.repo("team/app").blobs[digest_of(BIG)] == BIG
    assert not fake.violations


def test_upload_gives_up_in_the_end(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    with fault_proxy(fake.host) as proxy:
        proxy.add(Fault("POST", status=503, times=None))
        repo = make().repository(f"{proxy.host}/team/app")
        with pytest.raises(RegistryError, match="HTTP 503") as caught:
            repo.put_blob(descriptor(b"x"), [b"x"])
        assert caught.value.temporary and caught.value.exit_code == 4
        assert proxy.hits == 4


# Downloads


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("GET", "/blobs/", reset_after=1_000_000), Fault("GET", "/blobs/", reset_after=2_000_000)],
        [Fault("GET", "/blobs/", truncate_after=3_000_000)],
        [Fault("GET", "/blobs/", status=500, times=2)],
        [Fault("GET", "/blobs/", reset_after=1_500_000, times=3)],
    ],
    ids=["resets", "truncated", "errors", "with-progress"],
)
def test_download_goes_on_where_it_broke(
    fake: Fake, make: Callable[..., RegistryClient], faults: list[Fault]
) -> None:
    fake.repo("team/app").blobs[digest_of(BIG)] = BIG
    with fault_proxy(fake.host) as proxy:
        proxy.add(*faults)
        client = make()
        assert read(client.repository(f"{proxy.host}/team/app"), descriptor(BIG)) == BIG
        # What came is not asked for again: a megabyte of slack for what a reset throws away.
        assert sum(n for _, _, n in proxy.seen) < len(BIG) + 3 * (1 << 20)
        assert client.traffic.retries >= 1
    assert not fake.violations


def test_a_reset_of_the_proxy_loses_nothing_that_was_passed_on(fake: Fake) -> None:
    """However slow the reader: what a client of ours repeats is then its own doing."""
    fake.repo("team/app").blobs[digest_of(BIG)] = BIG
    with fault_proxy(fake.host) as proxy, socket.socket() as peer:
        proxy.add(Fault("GET", "/blobs/", reset_after=5_000_000))
        host, _, port = proxy.host.rpartition(":")
        peer.connect((host, int(port)))
        peer.sendall(f"GET /v2/team/app/blobs/{digest_of(BIG)} HTTP/1.1\r\nHost: {proxy.host}\r\n\r\n".encode())
        got, rests = 0, [4_500_000, 4_000_000, 3_500_000, 3_000_000]
        with pytest.raises(ConnectionResetError):
            while piece := peer.recv(1 << 16):
                got += len(piece)
                if rests and got > rests[-1]:
                    rests.pop()
                    time.sleep(0.3)
        assert got >= 5_000_000


def test_download_without_ranges_begins_again(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    fake.repo("team/app").blobs[digest_of(BIG)] = BIG

    def no_ranges(handler: Handler) -> bool:
        del handler.headers["Range"]
        return False

    fake.before = no_ranges
    with fault_proxy(fake.host) as proxy:
        proxy.add(Fault("GET", "/blobs/", reset_after=2_000_000))
        assert read(make().repository(f"{proxy.host}/team/app"), descriptor(BIG)) == BIG


def test_download_that_never_gets_on(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    fake.repo("team/app").blobs[digest_of(BIG)] = BIG
    with fault_proxy(fake.host) as proxy:
        proxy.add(Fault("GET", "/blobs/", truncate_after=10, times=None))
        with pytest.raises(RegistryError, match="again and again") as caught:
            read(make().repository(f"{proxy.host}/team/app"), descriptor(BIG))
        assert caught.value.temporary
        assert proxy.hits < 10


def test_silence_is_a_fault(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    fake.repo("team/app").blobs[digest_of(b"slow")] = b"slow"
    with fault_proxy(fake.host) as proxy:
        proxy.add(Fault("GET", "/blobs/", delay_seconds=1.0, times=1))
        repo = make(read_seconds=0.3).repository(f"{proxy.host}/team/app")
        assert read(repo, descriptor(b"slow")) == b"slow"


def test_corrupt_and_overlong_blobs(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    fake.repo("team/app").blobs[digest_of(BIG)] = BIG
    with fault_proxy(fake.host) as proxy:
        proxy.add(Fault("GET", "/blobs/", corrupt_at=5_000_000))
        repo = make().repository(f"{proxy.host}/team/app")
        with pytest.raises(DigestMismatch):
            read(repo, descriptor(BIG))
        shorter = Descriptor("x", Digest.of(BIG), len(BIG) - 1)
        with pytest.raises(DigestMismatch, match="more than"):
            read(repo, shorter)


def test_ranges(fake: Fake, repo: Repository) -> None:
    fake.repo("team/app").blobs[digest_of(BIG)] = BIG
    assert repo.blob_range(descriptor(BIG), 17, 1000) == BIG[17:1017]
    assert repo.blob_range(descriptor(BIG), len(BIG) - 5, 5) == BIG[-5:]

    def lie(handler: Handler) -> bool:
        handler.reply(206, b"12345", Content_Range=f"bytes 0-4/{len(BIG)}")
        return True

    fake.before = lie
    with pytest.raises(RegistryError, match="asked for bytes 10-14"):
        repo.blob_range(descriptor(BIG), 10, 5)


# Manifests, tags, referrers


def manifest(subject: Descriptor | None = None, kind: str = "application/x.test", note: str = "") -> bytes:
    return oci.manifest_json(
        oci.EMPTY_DESCRIPTOR, [oci.EMPTY_DESCRIPTOR], artifact_type=kind, subject=subject,
        annotations={"note": note} if note else None,
    )  # fmt: skip


def test_manifests(fake: Fake, repo: Repository) -> None:
    repo.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
    data = manifest()
    stored = repo.put_manifest(data, oci.MANIFEST, "v1")
    assert repo.resolve("v1") == stored == repo.resolve(stored.digest)
    assert repo.manifest("v1") == (stored, data)
    assert list(repo.tags()) == ["v1"]
    with pytest.raises(NotFound, match="no such image"):
        repo.manifest("v2")
    repo.delete_manifest(stored.digest)
    assert not repo.has_manifest("v1")
    assert not fake.violations


def test_manifest_that_is_not_what_was_asked_for(fake: Fake, repo: Repository) -> None:
    fake.repo("team/app").manifests[f"sha256:{'0' * 64}"] = (oci.MANIFEST, manifest())
    with pytest.raises(DigestMismatch):
        repo.manifest(Digest("sha256", "0" * 64))

    def other_header(handler: Handler) -> bool:
        handler.reply(200, manifest(), Content_Type=oci.MANIFEST, Docker_Content_Digest=f"sha256:{'1' * 64}")
        return True

    fake.before = other_header
    with pytest.raises(DigestMismatch):
        repo.manifest("v1")


def test_manifest_without_end(fake: Fake, repo: Repository) -> None:
    def endless(handler: Handler) -> bool:
        handler.reply(200, b" " * (9 << 20), Content_Type=oci.MANIFEST)
        return True

    fake.before = endless
    with pytest.raises(RegistryError, match="more than 8388608 bytes"):
        repo.manifest("v1")


def test_lists_in_pages(fake: Fake, repo: Repository, make: Callable[..., RegistryClient]) -> None:
    fake.page = 3
    for i in range(10):
        fake.put("team/app", f"t{i}", manifest(note=str(i)))
        fake.repo(f"r{i}")
    assert list(repo.tags()) == [f"t{i}" for i in range(10)]
    assert list(make().catalog(fake.host)) == [*(f"r{i}" for i in range(10)), "team/app"]
    assert fake.count("GET", "/tags/list") == 4


@pytest.mark.parametrize(
    ("link", "says"),
    [('</v2/team/app/tags/list>; rel="next"', "circle"), ('<http://evil.example/x>; rel="next"', "another host")],
)
def test_pages_that_lead_astray(fake: Fake, repo: Repository, link: str, says: str) -> None:
    def astray(handler: Handler) -> bool:
        handler.reply(200, b'{"tags": ["a"]}', Link=link)
        return True

    fake.before = astray
    with pytest.raises(RegistryError, match=says):
        list(repo.tags())


@pytest.mark.parametrize("api", [True, False])
def test_referrers(fake: Fake, repo: Repository, api: bool) -> None:
    fake.referrers_api, fake.page = api, 2
    repo.put_blob(oci.EMPTY_DESCRIPTOR, [oci.EMPTY_JSON])
    subject = repo.put_manifest(manifest(), oci.MANIFEST, "v1")
    attached = [
        repo.put_manifest(manifest(subject, f"application/x.{i % 2}", str(i)), oci.MANIFEST).digest
        for i in range(5)
    ]
    assert [e.digest for e in repo.referrers(subject.digest)] == attached
    assert [e.digest for e in repo.referrers(subject.digest, "application/x.1")] == [attached[1], attached[3]]
    assert repo.referrers(Digest("sha256", "0" * 64)) == []
    tag = f"sha256-{subject.digest.hex}"
    assert (tag in fake.repo("team/app").tags) is not api
    if not api:
        _, listed = fake.repo("team/app").manifests[fake.repo("team/app").tags[tag]]
        assert [e["annotations"]["note"] for e in json.loads(listed)["manifests"]] == list("01234")
    assert not fake.violations


def test_referrers_by_tag_from_many_writers(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    fake.referrers_api = False
    fake.repo("team/app").blobs[digest_of(b"{}")] = b"{}"
    subject = make().repository(f"{fake.host}/team/app").put_manifest(manifest(), oci.MANIFEST, "v1")
    clients = [make() for _ in range(8)]

    def write(i: int) -> None:
        clients[i].repository(f"{fake.host}/team/app").put_manifest(manifest(subject, note=str(i)), oci.MANIFEST)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clients[0].repository(f"{fake.host}/team/app").referrers(subject.digest)) == 8


# Hostile answers, and secrets


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "gopher://x/",
        "http://",
        "//user:pw@127.0.0.1:1/x",
        "http://u@localhost/",
        "http://[::1",
    ],
)
@pytest.mark.parametrize("upload", [False, True])
def test_hostile_locations(fake: Fake, repo: Repository, location: str, upload: bool) -> None:
    def redirect(handler: Handler) -> bool:
        handler.reply(202 if upload else 307, Location=location)
        return True

    fake.before = redirect
    with pytest.raises(RegistryError, match="refused"):
        if upload:
            repo.put_blob(descriptor(b"x"), [b"x"])
        else:
            read(repo, descriptor(b"x"))


def test_redirects_without_end(fake: Fake, repo: Repository) -> None:
    def redirect(handler: Handler) -> bool:
        handler.reply(307, Location=handler.path)
        return True

    fake.before = redirect
    with pytest.raises(RegistryError, match="redirects"):
        read(repo, descriptor(b"x"))


def _wants_basic(handler: Handler) -> bool:
    if handler.headers.get("Authorization", "").startswith("Basic "):
        return False
    handler.error(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="x"')
    return True


def test_credentials_stay_with_their_host(fake: Fake, make: Callable[..., RegistryClient]) -> None:
    with fake_registry() as other:
        other.repo("team/app").blobs[digest_of(b"x")] = b"x"

        def away(handler: Handler) -> bool:
            if _wants_basic(handler):
                return True
            if "/blobs/" in handler.path:
                handler.reply(307, Location=f"http://{other.host}{handler.path}")
                return True
            return False

        fake.before = away
        repo = make({fake.host: AUTH}).repository(f"{fake.host}/team/app")
        assert read(repo, descriptor(b"x")) == b"x"
        assert any("Authorization" in h for _, _, h in fake.requests)
        assert other.requests and not any("Authorization" in h for _, _, h in other.requests)


def test_upload_session_on_another_host_gets_no_credentials(
    fake: Fake, make: Callable[..., RegistryClient]
) -> None:
    with fake_registry() as other:

        def away(handler: Handler) -> bool:
            if _wants_basic(handler):
                return True
            if handler.command == "POST":
                handler.reply(202, Location=f"http://{other.host}/v2/x/blobs/uploads/1?step=0")
                return True
            return False

        fake.before = away
        with pytest.raises(RegistryError):
            make({fake.host: AUTH}).repository(f"{fake.host}/team/app").put_blob(descriptor(b"x"), [b"x"])
        assert not any("Authorization" in h for _, _, h in other.requests)


@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="file:///etc/passwd",service="x"',
        'Bearer realm="http://u:p@localhost/"',
        'Bearer realm="gopher://x"',
    ],
)
def test_hostile_token_servers(fake: Fake, make: Callable[..., RegistryClient], challenge: str) -> None:
    def ask(handler: Handler) -> bool:
        handler.error(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
        return True

    fake.before = ask
    with pytest.raises(RegistryError, match="nothing was sent") as caught:
        make({fake.host: AUTH}).repository(f"{fake.host}/team/app").manifest("v1")
    assert caught.value.exit_code == 4


def test_no_secret_in_errors_or_logs(
    fake: Fake, make: Callable[..., RegistryClient], caplog: pytest.LogCaptureFixture
) -> None:
    """A registry that throws all it was told back at the client, by every way it has."""

    def echo(handler: Handler) -> bool:
        given = handler.headers.get("Authorization", "")
        if not given:
            return _wants_basic(handler)
        handler.error(403, "DENIED", f"you are {given} {PASSWORD}", Location=f"/x?sig={PASSWORD}")
        return True

    fake.before = echo
    caplog.set_level(logging.DEBUG)
    repo = make({fake.host: AUTH}).repository(f"{fake.host}/team/app")
    texts = []
    for action in (lambda: repo.manifest("v1"), lambda: repo.put_blob(descriptor(b"x"), [b"x"])):
        with pytest.raises(RegistryError) as caught:
            action()
        texts += [str(caught.value), repr(caught.value)]
    texts.append(caplog.text)
    import base64

    for secret in (PASSWORD, base64.b64encode(f"u:{PASSWORD}".encode()).decode()):
        assert not [text for text in texts if secret in text]
    assert "layerkit.registry" in caplog.text


def test_no_token_in_errors_or_logs(
    fake: Fake, make: Callable[..., RegistryClient], caplog: pytest.LogCaptureFixture
) -> None:
    token = "sentinel-token-77c1"

    def echo(handler: Handler) -> bool:
        given = handler.headers.get("Authorization", "")
        if handler.path.startswith("/token"):
            handler.reply(200, json.dumps({"token": token}).encode(), Content_Type="application/json")
        elif token in given:
            handler.error(403, "DENIED", f"the token {token} is {given}")
        else:
            realm = f'Bearer realm="http://{fake.host}/token",service="{PASSWORD}"'
            handler.error(401, "UNAUTHORIZED", WWW_Authenticate=realm)
        return True

    fake.before = echo
    caplog.set_level(logging.DEBUG)
    with pytest.raises(RegistryError, match="denies") as caught:
        make({fake.host: AUTH}).repository(f"{fake.host}/team/app").manifest("v1")
    for text in (str(caught.value), caplog.text):
        assert token not in text and PASSWORD not in text
    assert fake.count("GET", "/token") == 1


def test_a_registry_that_asks_to_wait_for_hours(fake: Fake, tmp_path: Path) -> None:
    waits: list[float] = []
    (tmp_path / "auth.json").write_text("{}")
    options = RegistryOptions(authfile=tmp_path / "auth.json", tls_verify=False, retry=Retry(3, 0.5, 7.0))
    with fault_proxy(fake.host) as proxy, RegistryClient(options, sleep=waits.append) as client:
        proxy.add(
            Fault("POST", status=429, headers={"Retry-After": "100000"}),
            Fault("POST", status=503, headers={"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}),
        )
        client.repository(f"{proxy.host}/team/app").put_blob(descriptor(b"x"), [b"x"])
    assert waits == [7.0, 7.0]


def test_a_certificate_that_is_not_trusted_is_not_asked_twice(tmp_path: Path) -> None:
    import ssl
    from http.server import ThreadingHTTPServer

    from registry_server import certificate

    cert, key = certificate(tmp_path, "localhost")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"fake": Fake()}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    waits: list[float] = []
    try:
        with RegistryClient(RegistryOptions(), sleep=waits.append) as client:
            with pytest.raises(RegistryError, match="--tls-verify=false") as caught:
                client.repository(f"localhost:{server.server_address[1]}/a/b").manifest("v1")
        assert not waits and not caught.value.temporary
    finally:
        server.shutdown()
        server.server_close()


def test_control_characters_of_a_registry_do_not_reach_the_terminal(fake: Fake, repo: Repository) -> None:
    def shout(handler: Handler) -> bool:
        handler.error(403, "DENIED", "\x1b[31mred\x07\n" + "x" * 5000)
        return True

    fake.before = shout
    with pytest.raises(RegistryError) as caught:
        repo.manifest("v1")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_malformed_referrers(fake: Fake, repo: Repository) -> None:
    def odd(handler: Handler) -> bool:
        handler.reply(200, b'{"manifests": [{"digest": "sha256:short"}]}', Content_Type=oci.INDEX)
        return True

    fake.before = odd
    with pytest.raises(InvalidImage):
        repo.referrers(Digest("sha256", "0" * 64))
