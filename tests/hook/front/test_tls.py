"""`hook serve` as a process, over TLS: only clients of the CA get to show a token at all."""

from __future__ import annotations

import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hook_service import BEARER, MAP_A, TOKEN, hook_process
from needs import need_tool


def make(folder: Path, name: str) -> tuple[Path, Path]:
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", key, "-out", cert, "-days", "3", "-subj",
         f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def ask(url: str, ca: Path, pair: tuple[Path, Path] | None, headers: dict[str, str]) -> int:
    context = ssl.create_default_context(cafile=str(ca))
    if pair is not None:
        context.load_cert_chain(*pair)
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), context=context, timeout=20
        ) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


def test_mutual_tls(tmp_path: Path) -> None:
    need_tool("openssl")
    server, client, stranger = (make(tmp_path, name) for name in ("server", "client", "stranger"))
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    config = tmp_path / "hook.toml"
    config.write_text(f"""
listen = "127.0.0.1:0"
state = "state"
store = "store"
token_file = "token"
[tls]
certificate = "{server[0]}"
key = "{server[1]}"
client_ca = "{client[0]}"
[[registry]]
host = "registry.example"
[[map]]
uid_map = ["{MAP_A}"]
""")
    with hook_process(config, log=tmp_path / "log") as (_, url):
        assert url.startswith("https://")
        assert ask(f"{url}/health", server[0], client, BEARER) == 200
        assert ask(f"{url}/health", server[0], client, {}) == 401  # a certificate does not replace the token
        for pair in (None, stranger):
            with pytest.raises((OSError, ssl.SSLError)):
                ask(f"{url}/healthz", server[0], pair, BEARER)
        with pytest.raises(OSError):
            ask(url.replace("https:", "http:") + "/healthz", server[0], None, {})
    assert TOKEN not in (tmp_path / "log").read_text()
