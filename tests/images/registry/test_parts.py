"""The parts of the registry client that need no server: names, credentials, mirrors, challenges, addresses."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from layerkit.images.registry import credentials, hosts, transport
from layerkit.images.registry.auth import Authenticator, TokenRequest, parse_challenges
from layerkit.images.registry.names import RegistryRef, api_host, fallback_tag, is_private
from layerkit.images.registry.options import RegistryOptions, from_settings
from layerkit.model.digest import Digest
from layerkit.model.errors import RegistryError, UsageError

SHA = f"sha256:{'a' * 64}"
D = Digest.parse(SHA)


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("busybox", "docker.io", "library/busybox", "", None),
        ("busybox:1", "docker.io", "library/busybox", "1", None),
        ("user/app", "docker.io", "user/app", "", None),
        ("docker.io/busybox", "docker.io", "library/busybox", "", None),
        ("index.docker.io/user/app:v1", "docker.io", "user/app", "v1", None),
        ("registry-1.docker.io/library/x", "docker.io", "library/x", "", None),
        ("localhost/x", "localhost", "x", "", None),
        ("localhost:5000/x:y", "localhost:5000", "x", "y", None),
        ("host:5000/a/b/c", "host:5000", "a/b/c", "", None),
        ("EXAMPLE.com/a", "example.com", "a", "", None),
        ("example.com/a__b/c-d/e.f:v_1.2-3", "example.com", "a__b/c-d/e.f", "v_1.2-3", None),
        (f"example.com/a@{SHA}", "example.com", "a", "", D),
        (f"example.com/a:v1@{SHA}", "example.com", "a", "v1", D),
        ("[::1]:5000/a", "[::1]:5000", "a", "", None),
        ("127.0.0.1:80/a", "127.0.0.1:80", "a", "", None),
        ("localhost:5000", "docker.io", "library/localhost", "5000", None),
    ],
)
def test_names(text: str, host: str, repository: str, tag: str, digest: Digest | None) -> None:
    ref = RegistryRef.parse(text)
    assert ref == RegistryRef(host, repository, tag, digest)
    assert RegistryRef.parse(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "UPPER",
            "example.com/Upper",
            "a:",
            "a:b:c",
            "a:+",
            "a@sha256:00",
            "a..b",
            "a b",
        ),
        *("example.com/../x", "example.com:0/a", "example.com:99999/a", "-.com/a", "example.com/" + "a" * 255),
        *("user:pw@example.com/a", "example.com/a?x=1", "example.com/a#x", "a:" + "t" * 129, "ex\nample.com/a"),
    ],
)
def test_no_names(text: str) -> None:
    with pytest.raises(UsageError):
        RegistryRef.parse(text)


def test_hosts_of_names() -> None:
    assert api_host("docker.io") == "registry-1.docker.io"
    assert api_host("example.com") == "example.com"
    assert fallback_tag(D) == f"sha256-{'a' * 64}"
    assert [
        is_private(h) for h in ("localhost:1", "10.1.2.3", "[::1]:1", "169.254.169.254", "plain", "a.internal")
    ] == [True] * 6
    assert not is_private("example.com") and not is_private("8.8.8.8:443")


# Credentials


def _auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_credentials_by_longest_prefix(tmp_path: Path) -> None:
    file = tmp_path / "auth.json"
    entries = {
        "example.com": _auth("host", "p:w"), "example.com/team": _auth("team", "2"),
        "example.com/team/app": _auth("app", "3"), "https://old.example/v1/": _auth("old", "4"),
        "https://index.docker.io/v1/": _auth("hub", "5"), "id.example": {"identitytoken": "sentinel-id"},
        "example.community": _auth("no", "6"),
    }  # fmt: skip
    file.write_text(json.dumps({"auths": entries}))

    def user(host: str, repository: str) -> str:
        found = credentials.find(host, repository, authfile=file)
        return "" if found is None else found.username or found.identity_token

    assert user("example.com", "team/app/sub") == "app"
    assert user("example.com", "team/application") == "team"
    assert user("example.com", "other") == "host"
    assert user("old.example", "x") == "old"
    assert user("docker.io", "library/x") == "hub"
    assert user("id.example", "x") == "sentinel-id"
    assert user("nothing.example", "x") == ""
    found = credentials.find("example.com", "x", authfile=file)
    assert found is not None and found.password == "p:w" and "p:w" not in repr(found)


@pytest.mark.parametrize("text", ["{", '{"auths": {"h.example": {"auth": "%%%"}}}', '{"a": 1, "a": 2}', "[]"])
def test_broken_authfile(tmp_path: Path, text: str) -> None:
    file = tmp_path / "auth.json"
    file.write_text(text)
    with pytest.raises(UsageError, match="auth"):
        credentials.find("h.example", "x", authfile=file)


def test_credentials_are_looked_for_where_podman_and_docker_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert credentials.find("h.example", "x") is None
    for folder, user in (("docker", "d"), ("config/containers", "c"), ("run/containers", "r")):
        (tmp_path / folder).mkdir(parents=True)
        name = "config.json" if folder == "docker" else "auth.json"
        (tmp_path / folder / name).write_text(json.dumps({"auths": {"h.example": _auth(user, "x")}}))
        found = credentials.find("h.example", "x")
        assert found is not None and found.username == user


def test_credential_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``docker login`` leaves where a store is set: an empty entry, and the secret with a program."""
    helper = tmp_path / "docker-credential-fake"
    helper.write_text("""#!/bin/sh
read host
case "$host" in
  h.example) echo '{"ServerURL": "h.example", "Username": "u", "Secret": "sentinel-p"}';;
  id.example) echo '{"ServerURL": "id.example", "Username": "<token>", "Secret": "sentinel-id"}';;
  https://index.docker.io/v1/) echo '{"ServerURL": "x", "Username": "hub", "Secret": "sentinel-h"}';;
  broken.example) echo 'sentinel-leak'; exit 2;;
  *) echo 'credentials not found in native keychain'; exit 1;;
esac
""")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({
        "auths": {"h.example": {}, "https://index.docker.io/v1/": {}, "own.example": _auth("own", "x")},
        "credsStore": "fake",
    }))  # fmt: skip

    def found(host: str) -> credentials.Credentials | None:
        return credentials.find(host, "library/x", authfile=file)

    assert found("h.example") == credentials.Credentials("u", "sentinel-p")
    assert found("id.example") == credentials.Credentials(identity_token="sentinel-id")
    assert found("docker.io") == credentials.Credentials("hub", "sentinel-h")
    assert found("own.example") == credentials.Credentials("own", "x")
    assert found("nothing.example") is None
    with pytest.raises(RegistryError, match="docker-credential-fake") as caught:
        found("broken.example")
    assert "sentinel" not in str(caught.value)
    # One helper for one host goes before everything else.
    file.write_text(json.dumps({"auths": {"h.example": _auth("old", "x")}, "credHelpers": {"h.example": "fake"}}))
    assert found("h.example") == credentials.Credentials("u", "sentinel-p")


# Authentication


@pytest.mark.parametrize(
    ("header", "want"),
    [
        ('Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"', [("bearer", "https://a/t")]),
        ("Bearer realm=https://a/t, service=s", [("bearer", "https://a/t")]),
        ('Basic realm="x", Bearer realm="https://b"', [("basic", "x"), ("bearer", "https://b")]),
        ("basic", [("basic", None)]),
        ('bearer REALM="https://c"', [("bearer", "https://c")]),
        ("", []),
        ("Bearer", [("bearer", None)]),
        (',,"x"= =', []),
    ],
)
def test_challenges(header: str, want: list[tuple[str, str | None]]) -> None:
    assert [(c.scheme, c.parameters.get("realm")) for c in parse_challenges([header])] == want


def test_challenges_in_linear_time() -> None:
    for text in ("Bearer " + 'a="b",' * 5000, "a " * 100_000, 'Bearer a="' + "x" * 100_000, "a=" * 50_000):
        parse_challenges([text])


def test_tokens_are_kept_until_they_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], list[TokenRequest]()

    def ask(request: TokenRequest) -> dict[str, object]:
        asked.append(request)
        return {"token": f"t{len(asked)}", "expires_in": 100}

    scopes = frozenset(("repository:x:pull",))
    monkeypatch.setattr("layerkit.images.registry.auth.monotonic", lambda: now[0])
    auth = Authenticator("h", lambda: None, ask)
    assert auth.header(scopes) == ""
    challenge = parse_challenges(['Bearer realm="https://a/t",service="s"'])
    assert auth.answer(challenge, scopes, "") == "Bearer t1"
    assert auth.header(scopes) == "Bearer t1"
    assert auth.answer(challenge, scopes, "Bearer t0") == "Bearer t1"  # another thread was quicker
    assert auth.answer(challenge, scopes, "Bearer t1") == "Bearer t2"  # that one was refused
    now[0] = 95.0
    assert auth.header(scopes) == "Bearer t3"
    assert auth.header(frozenset(("repository:y:pull",))) == "Bearer t4"
    assert dict(asked[0].fields) == {"service": "s", "scope": "repository:x:pull"}


@pytest.mark.parametrize("answer", [{}, {"token": ""}, {"token": 5}, {"token": "a b"}, {"token": "a\nb"}])
def test_bad_tokens(answer: dict[str, object]) -> None:
    auth = Authenticator("h", lambda: None, lambda _: answer)
    with pytest.raises(RegistryError, match="gave no token"):
        auth.answer(parse_challenges(['Bearer realm="https://a"']), frozenset(), "")


def test_no_credentials_to_a_token_server_in_the_clear() -> None:
    asked = list[TokenRequest]()
    auth = Authenticator("h", lambda: None, lambda r: asked.append(r) or {}, secure=True)  # type: ignore[func-returns-value]
    with pytest.raises(RegistryError, match="without encryption"):
        auth.answer(parse_challenges(['Bearer realm="http://a"']), frozenset(), "")
    assert not asked


# Addresses


@pytest.mark.parametrize(
    ("current", "location", "registry", "want"),
    [
        ("https://r.example/v2/x", "/v2/y", "r.example", "https://r.example/v2/y"),
        ("https://r.example/v2/x", "?a=b", "r.example", "https://r.example/v2/x?a=b"),
        ("https://r.example/v2/x", "https://8.8.8.8/y?sig=1", "r.example", "https://8.8.8.8/y?sig=1"),
        ("https://r.example:5000/v2/x", "http://r.example/y", "r.example:5000", "https://r.example:5000/y"),
        ("http://localhost:1/v2/x", "http://127.0.0.1:2/y", "localhost:1", "http://127.0.0.1:2/y"),
    ],
)
def test_addresses_that_are_followed(current: str, location: str, registry: str, want: str) -> None:
    assert transport.next_url(current, location, registry, "x", 307) == want


@pytest.mark.parametrize(
    "location",
    [
        *(
            "",
            "http://8.8.8.8/x",
            "file:///etc/passwd",
            "ftp://a/b",
            "javascript:1",
            "https:///x",
            "https://u@8.8.8.8/",
        ),
        *(
            "https://127.0.0.1/x",
            "https://169.254.169.254/latest",
            "https://10.0.0.1/",
            "https://[::1]/",
            "https://[x",
        ),
        *("https://localhost/x", "https://metadata.internal/", "https://plain/", "//192.168.1.1/x"),
    ],
)
def test_addresses_that_a_public_registry_may_not_send(location: str) -> None:
    with pytest.raises(RegistryError, match="refused"):
        transport.next_url("https://8.8.4.4/v2/x", location, "registry.example.com", "x", 307)


# Mirrors and certificates


def _options(tmp_path: Path, conf: str = "", **more: object) -> RegistryOptions:
    file = tmp_path / "registries.conf"
    file.write_text(conf)
    settings = {"registries_conf": file, "hosts_dir": tmp_path / "hosts", **more}
    return RegistryOptions(**settings)  # type: ignore[arg-type]


CONF = """
[[registry]]
prefix = "docker.io/library"
location = "mirror.example/hub"
[[registry]]
prefix = "*.wild.example"
insecure = true
[[registry]]
location = "up.example"
mirror-by-digest-only = true
[[registry.mirror]]
location = "m1.example:5000/up"
insecure = true
[[registry.mirror]]
location = "m2.example"
[[registry]]
prefix = "bad.example"
blocked = true
"""


def test_registries_conf(tmp_path: Path) -> None:
    options = _options(tmp_path, CONF)

    def found(host: str, repository: str) -> list[tuple[str, str, bool]]:
        return [(e.host, e.repository, e.insecure) for e in hosts.endpoints(host, repository, options)]

    assert found("docker.io", "library/x") == [("mirror.example", "hub/x", False)]
    assert found("docker.io", "user/x") == [("docker.io", "user/x", False)]
    assert found("a.wild.example", "b/c") == [("a.wild.example", "b/c", True)]
    mirrored = hosts.endpoints("up.example", "b/c", options)
    assert [(e.host, e.repository) for e in mirrored] == [
        ("m1.example:5000", "up/b/c"), ("m2.example", "b/c"), ("up.example", "b/c"),
    ]  # fmt: skip
    assert [e.serves(digest=False) for e in mirrored] == [False, False, True]
    assert [e.serves(digest=True) for e in mirrored] == [True, True, True]
    with pytest.raises(UsageError, match="blocked"):
        found("bad.example", "x")
    none = _options(tmp_path, CONF, mirrors=False)
    assert [e.host for e in hosts.endpoints("up.example", "b", none)] == ["up.example"]


def test_hosts_toml(tmp_path: Path) -> None:
    folder = tmp_path / "hosts/up.example"
    folder.mkdir(parents=True)
    (folder / "ca.pem").write_text("x")
    (folder / "hosts.toml").write_text(
        'server = "https://up.example"\n[host."https://m.example:5000/proxy"]\n'
        'capabilities = ["pull", "resolve", "push"]\n'
        'ca = "ca.pem"\nclient = [["a.crt", "a.key"]]\n[host."http://plain.example"]\ncapabilities = ["pull"]\n'
        '[host."https://raw.example/base"]\noverride_path = true\nskip_verify = true\n'
    )
    first, second, third, last = hosts.endpoints("up.example", "a/b", _options(tmp_path))
    assert hosts.base_url(first, "https") == "https://m.example:5000/proxy/v2"
    assert (first.ns, first.ca, first.client_certs) == (
        "up.example", (folder / "ca.pem",), ((folder / "a.crt", folder / "a.key"),)
    )  # fmt: skip
    assert (second.scheme, second.serves(digest=False), second.serves(digest=True)) == ("http", False, True)
    assert hosts.base_url(third, "https") == "https://raw.example/base" and third.insecure
    assert (last.host, last.ns) == ("up.example", "")


@pytest.mark.parametrize("text", ["[", '[host."ftp://x"]', '[host."https://u:p@x"]'])
def test_broken_hosts_toml(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "hosts/up.example"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(text)
    with pytest.raises(UsageError, match=r"hosts\.toml"):
        hosts.endpoints("up.example", "a/b", _options(tmp_path))


def test_certificates(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    folder.mkdir()
    (folder / "me.cert").write_text("x")
    with pytest.raises(UsageError, match=r"me\.key"):
        hosts.endpoints("a.example", "b", _options(tmp_path, cert_dir=folder))
    (folder / "me.key").write_text("x")
    (endpoint,) = hosts.endpoints("a.example", "b", _options(tmp_path, cert_dir=folder))
    with pytest.raises(UsageError, match="cannot load its certificates"):
        endpoint.ssl_context()
    with pytest.raises(UsageError, match="no such folder"):
        hosts.endpoints("a.example", "b", _options(tmp_path, cert_dir=tmp_path / "none"))


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAYERKIT_AUTHFILE", "LAYERKIT_TLS_VERIFY", "LAYERKIT_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "/a")
    assert (from_settings().authfile, from_settings().tls_verify) == (Path("/a"), None)
    monkeypatch.setenv("LAYERKIT_AUTHFILE", "/b")
    monkeypatch.setenv("LAYERKIT_TLS_VERIFY", "false")
    assert (from_settings().authfile, from_settings().tls_verify) == (Path("/b"), False)
    monkeypatch.setenv("LAYERKIT_TLS_VERIFY", "maybe")
    with pytest.raises(UsageError, match="want true or false"):
        from_settings()
