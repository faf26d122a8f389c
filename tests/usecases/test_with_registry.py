"""Whole commands against a real docker-registry, with skopeo and podman as judges before and after."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from needs import need_root, need_tool
from programs import skopeo
from registry_server import PASSWORD, Registry, TokenServer, docker_registry, write_auth
from typer.testing import CliRunner

from layerkit.model.errors import LayerkitError

MAP = "0:100000:65536"


@dataclass
class Done:
    stdout: str
    stderr: str


class Cli:
    """The command line, called in this process (it starts in a second on a busy machine), with its own folders."""

    def __init__(self, tmp: Path, **more: str) -> None:
        self.tmp = tmp
        foreign = [name for name in os.environ if name.startswith(("LAYERKIT_", "REGISTRY_", "DOCKER_", "XDG_"))]
        self.env: dict[str, str | None] = {
            **dict.fromkeys(foreign),
            "HOME": str(tmp / "home"), "LAYERKIT_STORE": str(tmp / "store"), "LAYERKIT_CACHE": str(tmp / "cache"),
            "LAYERKIT_TLS_VERIFY": "false", **more,
        }  # fmt: skip
        (tmp / "home").mkdir(exist_ok=True)

    def run(self, *args: str | Path, code: int = 0) -> Done:
        from layerkit.cli.main import app

        found = CliRunner().invoke(app(), [str(arg) for arg in args], env=self.env)
        error = found.exception
        if error is not None and not isinstance(error, (LayerkitError, SystemExit)):
            raise error
        exit_code = error.exit_code if isinstance(error, LayerkitError) else found.exit_code
        stderr = found.stderr + (f"layerkit: {error}" if isinstance(error, LayerkitError) else "")
        assert exit_code == code, f"{args}: exit {exit_code}\n{found.stdout}\n{stderr}"
        assert PASSWORD not in found.stdout + stderr
        return Done(found.stdout, stderr)

    def json(self, *args: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(*args, "--json").stdout)
        return found


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


def manifest_of(ref: str, *flags: str) -> bytes:
    return skopeo("inspect", "--raw", "--tls-verify=false", *flags, ref).stdout.encode()


# docker:// everywhere


def test_every_command_that_takes_a_reference(
    registry: Registry, cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    archive, ref = tiny_archive(), registry.ref("every/tiny:v1")
    digest = cli.json("copy", archive, ref)["manifest"]
    assert cli.json("inspect", ref)["manifest"] == digest
    assert cli.json("copy", ref, registry.ref("every/other:v2"))["manifest"] == digest
    assert cli.json("copy", f"{ref.removesuffix(':v1')}@{digest}", f"oci:{tmp_path}/out:x")["manifest"] == digest
    assert cli.json("verify", f"oci:{tmp_path}/out:x")["manifest"] == digest
    tree = cli.json("verify", ref)["tree_digest"]
    for command in (["flatten"], ["optimize"]):
        target = registry.ref(f"every/{command[0]}")
        cli.run(*command, ref, target)
        assert cli.json("verify", target)["tree_digest"] == tree
        skopeo("inspect", "--tls-verify=false", f"{target}:latest")
    cli.run("remap", ref, registry.ref("every/portable"), "--form", "portable", "--uid-map", MAP)
    cli.run("remap", ref, "--uid-map", MAP)
    assert cli.json("analyze", ref)["images"]
    if os.geteuid() == 0:
        cli.run("unpack", ref, tmp_path / "rootfs")
        (tmp_path / "rootfs/new").write_text("new")
        cli.run("pack", tmp_path / "rootfs", registry.ref("every/packed:1"), "--base", ref)
        skopeo("inspect", "--tls-verify=false", registry.ref("every/packed:1"))


def test_manifests_stay_byte_for_byte(
    registry: Registry, cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    """skopeo pushes, layerkit copies through the registry and back: not a byte changes."""
    skopeo("copy", "--dest-tls-verify=false", f"oci-archive:{tiny_archive()}", registry.ref("same/a:v1"))
    raw = manifest_of(registry.ref("same/a:v1"))
    cli.run("copy", registry.ref("same/a:v1"), registry.ref("same/b:v1"))
    assert manifest_of(registry.ref("same/b:v1")) == raw
    cli.run("copy", registry.ref("same/b:v1"), f"oci:{tmp_path}/layout:v1")
    skopeo("copy", "--dest-tls-verify=false", f"oci:{tmp_path}/layout:v1", registry.ref("same/c:v1"))
    assert manifest_of(registry.ref("same/c:v1")) == raw


def test_an_image_without_a_name_gets_the_tag(registry: Registry, cli: Cli, tmp_path: Path) -> None:
    from made_images import Layout, tar

    layout = Layout()
    layout.list(layout.image(tar(("a", b"a"))))
    layout.folder(tmp_path / "in")
    for target in ("nameless/a", "nameless/b:v1"):
        cli.run("copy", f"oci:{tmp_path}/in", registry.ref(target))
        skopeo("inspect", "--tls-verify=false", registry.ref(target))


def test_podman_pulls_before_and_after(
    registry: Registry, cli: Cli, tiny_archive: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    need_root()
    need_tool("podman")
    ref = registry.ref("podman/tiny:v1")
    cli.run("copy", tiny_archive(), ref)
    short = tmp_path_factory.mktemp("run")  # podman takes 50 characters at most

    def pull() -> str:
        flags = ["--root", cli.tmp / "podman", "--runroot", short, "--storage-driver", "vfs"]
        done = subprocess.run(
            ["podman", *map(str, flags), "pull", "--quiet", "--tls-verify=false", ref],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        subprocess.run(["podman", *map(str, flags), "rmi", "--all", "--force"], capture_output=True, check=False)
        return done.stdout.strip()

    before = pull()
    cli.run("index", "push", ref)
    cli.run("remap", ref, ref, "--uid-map", MAP)
    assert pull() == before


def test_all_platforms(registry: Registry, cli: Cli, tmp_path: Path) -> None:
    from made_images import INDEX, Layout, dump, tar

    layout = Layout()
    parts = [
        layout.image(tar(("name", arch.encode())), arch=arch) | {"platform": {"os": "linux", "architecture": arch}}
        for arch in ("amd64", "arm64", "s390x")
    ]
    index = layout.put(dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": parts}), INDEX)
    layout.list(index, "multi")
    layout.folder(tmp_path / "multi")
    target = registry.ref("multi/app:v1")
    report = cli.json("copy", f"oci:{tmp_path}/multi:multi", target, "--all-platforms")
    assert report["manifest"] == index["digest"] and len(report["images"]) == 3
    skopeo("inspect", "--tls-verify=false", "--override-arch", "s390x", target)
    back = cli.json("copy", target, f"oci:{tmp_path}/back:x", "--all-platforms")
    assert (back["manifest"], back["images"]) == (report["manifest"], report["images"])
    assert cli.json("inspect", target, "--platform", "linux/arm64")["platform"] == "linux/arm64"
    assert "arm64" in cli.run("inspect", target, "--platform", "linux/mips", code=1).stderr


def test_what_is_attached_comes_along(
    registry: Registry, cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    ref = registry.ref("along/a:v1")
    cli.run("copy", tiny_archive(), ref)
    artifact = cli.json("remap", ref, ref, "--uid-map", MAP)["artifact"]
    assert cli.json("copy", ref, registry.ref("along/b:v1"))["attached"] == [artifact]
    assert cli.json("verify", registry.ref("along/b:v1"))["artifacts"] == [artifact]
    assert cli.json("copy", registry.ref("along/b:v1"), f"oci:{tmp_path}/x:v1")["attached"] == [artifact]
    assert cli.json("copy", f"oci:{tmp_path}/x:v1", registry.ref("along/c"))["attached"] == [artifact]
    assert cli.json("verify", registry.ref("along/c"))["artifacts"] == [artifact]


def test_errors(registry: Registry, cli: Cli, tmp_path: Path) -> None:
    assert "no such image" in cli.run("inspect", registry.ref("no/such:v1"), code=1).stderr
    assert "--tls-verify=false" in cli.run("inspect", "--tls-verify=true", registry.ref("no/such"), code=4).stderr
    cli.run("inspect", "docker://UPPER/x:+", code=2)
    assert "--authfile" in cli.run("inspect", registry.ref("x"), "--authfile", tmp_path / "none", code=2).stderr


# Authentication and TLS


def test_basic_authentication_over_tls(tmp_path: Path, tiny_archive: Callable[..., Path]) -> None:
    cli = Cli(tmp_path, LAYERKIT_TLS_VERIFY="true")
    with docker_registry(tmp_path / "r", auth="basic", tls=True) as registry:
        assert registry.ca is not None
        certs = tmp_path / "certs"
        certs.mkdir()
        (certs / "ca.crt").write_bytes(registry.ca.read_bytes())
        auth = write_auth(tmp_path / "auth.json", registry.host)
        ref = registry.ref("a/tiny:v1")
        assert "certificate" in cli.run("copy", tiny_archive(), ref, "--authfile", auth, code=4).stderr
        assert "log in" in cli.run("copy", tiny_archive(), ref, "--cert-dir", certs, code=4).stderr
        wrong = write_auth(tmp_path / "wrong.json", registry.host, password="wrong-sentinel-0000")
        refused = cli.run("copy", tiny_archive(), ref, "--cert-dir", certs, "--authfile", wrong, code=4)
        assert "wrong-sentinel" not in refused.stderr
        digest = cli.json("copy", tiny_archive(), ref, "--cert-dir", certs, "--authfile", auth)["manifest"]
        cli.env["REGISTRY_AUTH_FILE"] = str(auth)
        cli.env["LAYERKIT_CERT_DIR"] = str(certs)
        assert cli.json("verify", ref)["manifest"] == digest
        skopeo("inspect", "--authfile", auth, "--cert-dir", certs, ref)


@pytest.mark.parametrize("identity", [False, True], ids=["password", "refresh-token"])
def test_token_authentication(tmp_path: Path, tiny_archive: Callable[..., Path], identity: bool) -> None:
    server = TokenServer(tmp_path / "tokens", anonymous_pull=True)
    try:
        with docker_registry(tmp_path / "r", auth="token", realm=server.url, token_cert=server.cert) as registry:
            cli = Cli(tmp_path)
            ref, auth = registry.ref("team/tiny:v1"), tmp_path / "auth.json"
            if identity:
                auth.write_text(json.dumps({"auths": {registry.host: {"identitytoken": server.refresh}}}))
            else:
                # The longest prefix wins: the entry for the host alone would be refused.
                write_auth(auth, registry.host, password="wrong")
                entries = json.loads(auth.read_text())["auths"]
                good = json.loads(write_auth(tmp_path / "good.json", "x").read_text())["auths"]["x"]
                auth.write_text(json.dumps({"auths": entries | {f"{registry.host}/team": good}}))
            server.fail_next = 1
            cli.run("copy", tiny_archive(), ref, "--authfile", auth)
            assert ["repository:team/tiny:pull,push"] in server.asked
            cli.run("copy", ref, registry.ref("team/copy:v1"), "--authfile", auth)
            assert any("repository:team/tiny:pull" in scopes for scopes in server.asked[2:])
            # Anonymous: reading is allowed, writing is not.
            none = tmp_path / "none.json"
            none.write_text("{}")
            cli.run("verify", ref, "--authfile", none)
            cli.run("copy", tiny_archive(), registry.ref("team/no:v1"), "--authfile", none, code=4)
            if not identity:
                write_auth(tmp_path / "bad.json", registry.host, password="bad-sentinel-1")
                refused = cli.run("verify", ref, "--authfile", tmp_path / "bad.json", code=4)
                assert "bad-sentinel" not in refused.stderr
    finally:
        server.close()


def test_tokens_are_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerkit.images.registry import auth as authentication
    from layerkit.images.registry.client import RegistryClient
    from layerkit.images.registry.options import RegistryOptions

    passed = [0.0]
    monkeypatch.setattr(authentication, "monotonic", lambda: time.monotonic() + passed[0])
    server = TokenServer(tmp_path / "tokens", life=300)
    try:
        with docker_registry(tmp_path / "r", auth="token", realm=server.url, token_cert=server.cert) as registry:
            auth = write_auth(tmp_path / "auth.json", registry.host)
            with RegistryClient(RegistryOptions(authfile=auth, tls_verify=False)) as client:
                repo = client.repository(f"{registry.host}/a/b")
                from layerkit.formats.oci import documents as oci

                repo.put_blob(oci.EMPTY_DESCRIPTOR, [b"{}"])
                asked = len(server.asked)
                assert repo.blob_size(oci.EMPTY_DESCRIPTOR.digest) == 2
                passed[0] = 295.0  # before it ends, a new one
                assert repo.blob_size(oci.EMPTY_DESCRIPTOR.digest) == 2
                assert len(server.asked) == asked + 2
    finally:
        server.close()


def test_credential_helper(tmp_path: Path, tiny_archive: Callable[..., Path]) -> None:
    with docker_registry(tmp_path / "r", auth="basic") as registry:
        from registry_server import USER

        helper = tmp_path / "bin/docker-credential-test"
        helper.parent.mkdir()
        helper.write_text(f'#!/bin/sh\nread host\necho \'{{"Username": "{USER}", "Secret": "{PASSWORD}"}}\'\n')
        helper.chmod(0o755)
        cli = Cli(tmp_path)
        cli.env |= {"PATH": f"{helper.parent}:{os.environ['PATH']}", "DOCKER_CONFIG": str(tmp_path)}
        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {registry.host: "test"}}))
        cli.run("copy", tiny_archive(), registry.ref("a/b:v1"))
        helper.write_text(f"#!/bin/sh\necho {PASSWORD}; exit 3\n")
        assert "docker-credential-test" in cli.run("inspect", registry.ref("a/b:v1"), code=4).stderr


def test_client_certificates(tmp_path: Path) -> None:
    """A server that wants a certificate of the client, by Python's own TLS."""
    import ssl
    import threading
    from http.server import ThreadingHTTPServer

    from registry_fake import Fake, Handler
    from registry_server import certificate

    cert, key = certificate(tmp_path, "localhost")
    client_cert, client_key = certificate(tmp_path, "client")
    fake = Fake()
    fake.put("a/b", "v1", b'{"schemaVersion": 2, "manifests": []}', "application/vnd.oci.image.index.v1+json")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"fake": fake}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.load_verify_locations(client_cert)
    context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        from layerkit.images.registry.client import RegistryClient
        from layerkit.images.registry.options import RegistryOptions, Retry
        from layerkit.model.errors import RegistryError

        certs = tmp_path / "certs"
        certs.mkdir()
        (certs / "ca.crt").write_bytes(cert.read_bytes())
        options = RegistryOptions(cert_dir=certs, retry=Retry(1))
        host = f"localhost:{server.server_address[1]}"
        with RegistryClient(options) as client, pytest.raises(RegistryError):
            client.repository(f"{host}/a/b").manifest("v1")
        (certs / "me.cert").write_bytes(client_cert.read_bytes())
        (certs / "me.key").write_bytes(client_key.read_bytes())
        with RegistryClient(options) as client:
            assert client.repository(f"{host}/a/b").resolve("v1").size == 37
    finally:
        server.shutdown()
        server.server_close()


# Mirrors


@pytest.mark.parametrize("kind", ["registries.conf", "hosts.toml"])
def test_mirrors(tmp_path: Path, registry: Registry, tiny_archive: Callable[..., Path], kind: str) -> None:
    """What is in the mirror comes from it, what is not from the registry; pushes never go to the mirror."""
    from fault_proxy import fault_proxy

    cli = Cli(tmp_path)
    cli.env["LAYERKIT_TLS_VERIFY"] = None
    with docker_registry(tmp_path / "mirror") as mirror, fault_proxy(mirror.host) as watched:
        if kind == "registries.conf":
            conf = tmp_path / "registries.conf"
            conf.write_text(
                f'[[registry]]\nprefix = "{registry.host}/mirrored"\nlocation = "{registry.host}/mirrored"\n'
                f'insecure = true\n[[registry.mirror]]\nlocation = "{watched.host}/mirrored"\ninsecure = true\n'
            )
            cli.env["LAYERKIT_REGISTRIES_CONF"] = str(conf)
        else:
            cli.env["LAYERKIT_TLS_VERIFY"] = "false"
            folder = tmp_path / "certs.d" / registry.host
            folder.mkdir(parents=True)
            (folder / "hosts.toml").write_text(
                f'server = "http://{registry.host}"\n[host."http://{watched.host}"]\n'
                'capabilities = ["pull", "resolve"]\n'
            )
            cli.env["LAYERKIT_HOSTS_DIR"] = str(tmp_path / "certs.d")
        ref = registry.ref(f"mirrored/{kind[:5]}:v1")
        cli.run("copy", tiny_archive(), ref)
        assert not [m for m, _, _ in watched.seen if m not in ("GET", "HEAD")]
        cli.run("verify", ref)  # the mirror has nothing: the registry serves it
        skopeo(
            "copy",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            ref,
            ref.replace(registry.host, mirror.host),
        )
        watched.seen.clear()
        cli.run("verify", ref)
        blobs = [path for _, path, passed in watched.seen if "/blobs/" in path and passed]
        assert len(blobs) >= 4
        assert all(("ns=" in path) is (kind == "hosts.toml") for path in blobs)


# Indexes, remaps, pull


def test_remap_from_published_indexes_reads_no_layer(registry: Registry, cli: Cli, app_image: Path) -> None:
    """The real image: bytes and requests are counted by a proxy between layerkit and the registry."""
    from fault_proxy import fault_proxy

    ref = registry.ref("indexed/app:v1")
    cli.run("copy", app_image, ref)
    with fault_proxy(registry.host) as watched:
        through = ref.replace(registry.host, watched.host)
        pushed = cli.json("index", "push", through)
        assert pushed["layers_read"] == 8 and pushed["bytes"] <= pushed["image_bytes"] / 100
        again = cli.json("index", "push", through)
        assert (again["artifact"], again["blobs"]) == (pushed["artifact"], 0)
        layers = json.loads(manifest_of(ref))["layers"]
        # Two maps; the second reads nothing more than the first.
        for uid_map in (MAP, "0:300000:65536"):
            watched.seen.clear()
            report = cli.json("remap", through, through, "--uid-map", uid_map)
            assert report["layers_read"] == 0
            assert any("unproven: 8 of 8 layers" in text for text in report["warnings"])
            gets = [path for method, path, _ in watched.seen if method == "GET"]
            assert not [path for path in gets for layer in layers if layer["digest"] in path]
            read = sum(passed for _, _, passed in watched.seen)
            assert read <= pushed["image_bytes"] / 100, f"{read} of {pushed['image_bytes']}"
    # The layers prove it: both are what the image itself gives.
    assert len(cli.json("verify", ref)["artifacts"]) == 2


def test_indexes_are_shared_between_images(registry: Registry, cli: Cli, tiny_archive: Callable[..., Path]) -> None:
    from fault_proxy import fault_proxy

    with fault_proxy(registry.host) as watched:
        for name in ("share/a:v1", "share/b:v1"):
            cli.run("copy", tiny_archive(), f"docker://{watched.host}/{name}")
        cli.run("index", "push", f"docker://{watched.host}/share/a:v1")
        watched.seen.clear()
        cli.run("index", "push", f"docker://{watched.host}/share/b:v1", "--mount-from", "share/a")
        posts = [path for method, path, _ in watched.seen if method == "POST"]
        puts = [path for method, path, _ in watched.seen if method == "PUT" and "/blobs/" in path]
        assert len(posts) == 5 and all("mount=" in path for path in posts)
        assert not puts
    assert cli.json("index", "pull", registry.ref("share/b:v1"))["layers"][0]["origin"] == "artifact"


def test_index_pull_keeps_what_is_unproven_apart(
    registry: Registry, cli: Cli, tiny_archive: Callable[..., Path]
) -> None:
    ref = registry.ref("apart/tiny:v1")
    cli.run("copy", tiny_archive(), ref)
    assert "layerkit index push" in cli.run("index", "pull", ref, code=1).stderr
    cli.run("index", "push", ref)
    assert {x["origin"] for x in cli.json("index", "pull", ref)["layers"]} == {"artifact"}
    assert {x["origin"] for x in cli.json("index", "pull", ref)["layers"]} == {"cache"}
    assert not (cli.tmp / "store").exists()
    # A mount's way into the store reads the layers; only then are they proven.
    assert cli.json("remap", ref, "--uid-map", MAP)["layers_read"] == 4
    assert {x["origin"] for x in cli.json("index", "pull", ref)["layers"]} == {"store"}


def test_pull_verifies_what_is_published(
    registry: Registry, cli: Cli, tiny_archive: Callable[..., Path], tmp_path: Path
) -> None:
    ref = registry.ref("pull/tiny:v1")
    cli.run("copy", tiny_archive(), ref)
    alone = cli.json("pull", ref, "--uid-map", MAP)
    assert (alone["published"], alone["refused"]) == ("", [])
    assert "no published remap" in cli.run("pull", ref, "--uid-map", MAP, "--require-published", code=3).stderr
    artifact = cli.json("remap", ref, ref, "--uid-map", MAP)["artifact"]
    found = cli.json("pull", ref, "--uid-map", MAP, "--require-published", "--own-meta")
    assert (found["published"], found["signed"], found["refused"]) == (artifact, False, [])
    assert cli.json("pull", ref, "--uid-map", "0:5:65536")["published"] == ""
    if os.geteuid() == 0:
        target = tmp_path / "mnt"
        target.mkdir()
        cli.run("mount", found["remap"]["next_ref"], target, "--uid-map", MAP)
        try:
            assert (target / "etc").stat().st_uid == 100000
        finally:
            cli.run("umount", target)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Return a private and a public key made by openssl."""
    need_tool("openssl")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    made: list[str | Path] = [
        "openssl",
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        private,
    ]
    subprocess.run(made, check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


def test_signed_statements(
    registry: Registry, cli: Cli, tiny_archive: Callable[..., Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    import base64

    private, public = keys
    ref = registry.ref("signed/tiny:v1")
    cli.run("copy", tiny_archive(), ref)
    artifact = cli.json("remap", ref, ref, "--uid-map", MAP)["artifact"]
    unsigned = cli.json("pull", ref, "--uid-map", MAP, "--key", public)
    assert not unsigned["published"] and "signed" in unsigned["refused"][0]
    assert cli.json("remap", ref, ref, "--uid-map", MAP, "--sign-key", private)["artifact"] == artifact
    found = cli.json("pull", ref, "--uid-map", MAP, "--key", public, "--require-published")
    assert (found["published"], found["signed"]) == (artifact, True)
    # openssl agrees about the signature over what DSSE says is signed.
    cli.run("copy", ref, f"oci:{tmp_path}/layout:x")
    blobs = [p.read_bytes() for p in (tmp_path / "layout/blobs/sha256").iterdir() if p.stat().st_size < 1 << 20]
    bundles = [json.loads(b) for b in blobs if b.startswith(b'{"mediaType":"application/vnd.dev.sigstore.bundle')]
    assert len(bundles) == 1
    envelope = bundles[0]["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    (tmp_path / "signed").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    check: list[str | Path] = [
        "openssl",
        "dgst",
        "-sha256",
        "-verify",
        public,
        "-signature",
        tmp_path / "sig",
        tmp_path / "signed",
    ]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    said = json.loads(payload)
    assert said["subject"][0]["digest"]["sha256"] == artifact.removeprefix("sha256:")
    assert said["predicate"]["buildDefinition"]["externalParameters"]["map"].startswith("uid=0:100000")
    # Another key has signed nothing.
    other = tmp_path / "other.pub"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ED25519", "-out", tmp_path / "o.pem"], check=True, capture_output=True
    )
    subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "o.pem", "-pubout", "-out", other], check=True, capture_output=True
    )
    refused = cli.json("pull", ref, "--uid-map", MAP, "--key", other)
    assert not refused["published"] and "not signed by this key" in refused["refused"][0]


def test_statement_without_a_key(registry: Registry, cli: Cli, tiny_archive: Callable[..., Path]) -> None:
    ref = registry.ref("stated/tiny:v1")
    cli.run("copy", tiny_archive(), ref)
    cli.run("remap", ref, ref, "--uid-map", MAP, "--statement")
    assert len(cli.json("copy", ref, registry.ref("stated/copy:v1"))["attached"]) == 2


# Tables of contents


def exact(data: bytes) -> bytes:
    """A tar with no more than two blocks of zeros at its end: skopeo 1.9 drops the others, and so the diff_id."""
    end = len(data.rstrip(b"\0"))
    return data[: end + -end % 512] + bytes(1024)


def test_zstd_chunked_layers_are_indexed_by_range(registry: Registry, cli: Cli, tmp_path: Path) -> None:
    """Layers that skopeo itself compressed as zstd:chunked."""
    from fault_proxy import fault_proxy
    from made_images import simple, special, tar

    layout = simple()
    lower = tar(special("d", b"5", mode=0o2755, uid=7), ("d/big", os.urandom(3_000_000)), ("d/empty", b""))
    upper = tar(
        ("d/other", b"x"), special("hard", b"1", "d/other"), special("d/link", b"2", "big"), ("d/.wh.empty", b"")
    )
    image = layout.image(exact(lower), exact(upper))
    layout.list(image, "big")
    layout.folder(tmp_path / "in")
    skopeo(
        "copy", "--dest-tls-verify=false", "--dest-compress-format", "zstd:chunked", f"oci:{tmp_path}/in:big",
        registry.ref("toc/big:v1"),
    )  # fmt: skip
    with fault_proxy(registry.host) as watched:
        ref = f"docker://{watched.host}/toc/big:v1"
        report = cli.json("remap", ref, ref, "--uid-map", MAP)
        assert report["layers_read"] == 0
        assert any("unproven: 2 of 2" in text for text in report["warnings"])
        assert sum(passed for _, _, passed in watched.seen) < 20_000
        assert {x["origin"] for x in cli.json("index", "pull", ref)["layers"]} == {"toc"}
    # What skopeo's table says is what the layers hold: the artifact agrees with them.
    assert cli.json("verify", registry.ref("toc/big:v1"))["artifacts"] == [report["artifact"]]
