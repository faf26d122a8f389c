"""A real docker-registry for tests: its own folder and port, with no, basic or token authentication, and TLS."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from needs import need_tool
from programs import free_port, wait_for

USER = "sentinel-user"
PASSWORD = "sentinel-password-9f2c"
_HTPASSWD = f"{USER}:$2b$04$sBD55n6RWFWahN9i/K1mfuMbEPAm04cL72K0k2HEa3SIjNqXF2OGy\n"
ISSUER, SERVICE = "test-issuer", "test-registry"


class Registry:
    """A running registry.

    Attributes:
        host: ``HOST:PORT`` for references.
        ca: file of the certificate to trust, None without TLS.
    """

    def __init__(self, port: int, root: Path, ca: Path | None) -> None:
        self.port, self.root, self.ca = port, root, ca
        self.host = f"localhost:{port}"

    def ref(self, name: str) -> str:
        return f"docker://{self.host}/{name}"


@contextlib.contextmanager
def docker_registry(
    folder: Path,
    *,
    auth: str = "",
    tls: bool = False,
    realm: str = "",
    token_cert: Path | None = None,
    more: str = "",
) -> Iterator[Registry]:
    """Run Debian's docker-registry over ``folder``; ``auth`` is "", ``basic`` or ``token``; ``more`` is YAML."""
    need_tool("docker-registry")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    for attempt in range(3):  # somebody else may take the port between its choice and its use
        port = free_port()
        ca = None
        config = f"""version: 0.1
log: {{level: error}}
storage:
  filesystem: {{rootdirectory: {folder}/data}}
  delete: {{enabled: true}}
http:
  addr: 127.0.0.1:{port}
  secret: not-a-secret
"""
        if tls:
            cert, key = certificate(folder, "localhost")
            ca = cert
            config += f"  tls: {{certificate: {cert}, key: {key}}}\n"
        if auth == "basic":
            (folder / "htpasswd").write_text(_HTPASSWD)
            config += f"auth:\n  htpasswd: {{realm: test, path: {folder}/htpasswd}}\n"
        elif auth == "token":
            config += (
                f"auth:\n  token: {{realm: '{realm}', service: {SERVICE}, issuer: {ISSUER}, "
                f"rootcertbundle: {token_cert}}}\n"
            )
        (folder / "config.yml").write_text(config + more)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log,
                env={"PATH": os.environ["PATH"], "HOME": str(folder), "OTEL_TRACES_EXPORTER": "none"},
            )  # fmt: skip
        try:
            if not _answers(process, port):
                if attempt == 2:
                    raise RuntimeError(f"docker-registry does not answer:\n{(folder / 'log').read_text()}")
                continue
            yield Registry(port, folder, ca)
            return
        finally:
            process.terminate()
            process.wait(10)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    def there() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return process.poll() is not None

    wait_for(there)
    return process.poll() is None


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a self-signed certificate for ``name`` and 127.0.0.1; return its file and that of its key."""
    need_tool("openssl")
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", key, "-out", cert, "-days", "3", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


class TokenServer:
    """A real token server: it checks the password and signs tokens for what the user may do (distribution's JWT).

    Attributes:
        url: the realm.
        cert: of the key that signs, for the registry.
        asked: the scopes of each request, in order.
        life: seconds that a token is good for.
        refresh: an identity token that is accepted, "" for none.
    """

    def __init__(self, folder: Path, *, life: int = 300, anonymous_pull: bool = False) -> None:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        folder.mkdir(parents=True, exist_ok=True)
        self.cert, key = certificate(folder, "token")
        self._key = load_pem_private_key(key.read_bytes(), None)
        self._chain = base64.b64encode(subprocess.run(
            ["openssl", "x509", "-in", self.cert, "-outform", "DER"], check=True, capture_output=True
        ).stdout).decode()  # fmt: skip
        self.asked: list[list[str]] = []
        self.life, self.anonymous_pull, self.refresh = life, anonymous_pull, "sentinel-refresh-77aa"
        self.fail_next = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                given = self.headers.get("Authorization", "")
                want = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                outer._answer(self, query, given == want, bool(given))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                query = parse_qs(self.rfile.read(length).decode())
                good = query.get("grant_type") == ["refresh_token"] and query.get("refresh_token") == [
                    outer.refresh
                ]
                outer._answer(self, {**query, "scope": query.get("scope", [""])[0].split()}, good, True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _answer(
        self, handler: BaseHTTPRequestHandler, query: dict[str, list[str]], known: bool, tried: bool
    ) -> None:
        scopes = query.get("scope", [])
        self.asked.append(scopes)
        if self.fail_next:
            self.fail_next -= 1
            _reply(handler, 503, {})
            return
        if tried and not known:
            _reply(handler, 401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]})
            return
        access: list[dict[str, object]] = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            allowed = (
                actions.split(",")
                if known
                else [a for a in actions.split(",") if a == "pull" and self.anonymous_pull]
            )
            access.append({"type": kind, "name": name, "actions": allowed})
        _reply(handler, 200, {"token": self.token(access), "expires_in": self.life})

    def token(self, access: list[dict[str, object]], *, good: bool = True) -> str:
        """Return a signed token for ``access``."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        now = datetime.now(UTC)
        head = {"typ": "JWT", "alg": "ES256", "x5c": [self._chain]}
        claims = {
            "iss": ISSUER, "sub": USER, "aud": SERVICE, "jti": os.urandom(8).hex(), "access": access,
            "nbf": int((now - timedelta(minutes=1)).timestamp()), "iat": int(now.timestamp()),
            "exp": int((now + timedelta(seconds=self.life if good else -600)).timestamp()),
        }  # fmt: skip
        text = f"{_b64(json.dumps(head).encode())}.{_b64(json.dumps(claims).encode())}"
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        r, s = decode_dss_signature(self._key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _reply(handler: BaseHTTPRequestHandler, status: int, body: object) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def write_auth(path: Path, host: str, user: str = USER, password: str = PASSWORD) -> Path:
    """Write a containers auth.json with one entry."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path
