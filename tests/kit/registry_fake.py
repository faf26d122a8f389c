"""A registry in memory that holds clients to the letter of OCI distribution-spec 1.1, with the referrers API.

Whatever a client must not do is recorded in ``Fake.violations``, besides being refused: tests end with
``assert not fake.violations``. ``Fake.before`` may answer a request itself: that makes hostile registries.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from made_images import INDEX, MANIFEST
from made_images import digest as digest_of

_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass
class Repo:
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Fake:
    """The registry's state.

    Attributes:
        repos: by name.
        requests: (method, path with query, headers) of all that came.
        violations: what clients did that the specification forbids.
        before: asked first; returns True if it has answered.
        referrers_api: without it the path gives 404, and no OCI-Subject is sent.
        page: entries of one page of a list.
        mount: whether mounts are done, or answered with 202.
        chunk_min: sent as OCI-Chunk-Min-Length, and insisted on.
        absolute: Location headers are whole URLs.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.violations: list[str] = []
        self.before: Callable[[Handler], bool] | None = None
        self.referrers_api = True
        self.page = 1000
        self.mount = True
        self.chunk_min = 0
        self.absolute = False
        self.sessions: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.RLock()
        self.host = ""

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo())

    def put_image(self, name: str, tag: str, manifest: dict[str, Any], *blobs: bytes) -> str:
        """Put an image by hand; return the manifest's digest."""
        repo = self.repo(name)
        for blob in blobs:
            repo.blobs[digest_of(blob)] = blob
        return self.put(name, tag, json.dumps(manifest).encode(), manifest.get("mediaType", MANIFEST))

    def put(self, name: str, tag: str, data: bytes, media_type: str = MANIFEST) -> str:
        digest = digest_of(data)
        self.repo(name).manifests[digest] = (media_type, data)
        if tag:
            self.repo(name).tags[tag] = digest
        return digest

    def count(self, method: str, part: str = "") -> int:
        """Return how many requests of a method had ``part`` in their path."""
        return sum(m == method and part in p for m, p, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        fake = self.fake
        with fake.lock:
            fake.requests.append((self.command, self.path, dict(self.headers.items())))
        if fake.before is not None and fake.before(self):
            return
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.violate("chunked transfer coding, which several registries do not take")
        body = self.rfile.read(length)
        if len(body) != length:  # cut off on the way: nobody waits for an answer
            self.close_connection = True
            return
        with fake.lock:
            self._route(parts.path, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _any

    def violate(self, what: str) -> None:
        self.fake.violations.append(f"{self.command} {self.path}: {what}")

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Content_Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str, message: str = "", **headers: str) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self.reply(status, body, Content_Type="application/json", **headers)

    def _location(self, path: str) -> str:
        return f"http://{self.headers['Host']}{path}" if self.fake.absolute else path

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        fake = self.fake
        if path == "/v2/":
            return self.reply(200)
        if path == "/v2/_catalog":
            return self._page(sorted(fake.repos), "repositories", path, query)
        match = re.fullmatch(rf"/v2/({_NAME})/(manifests|blobs|tags|referrers)/(.+)", path)
        if match is None:
            return self.error(404, "NAME_INVALID")
        name, kind, rest = match.groups()
        if kind == "tags" and rest == "list":
            if name not in fake.repos:
                return self.error(404, "NAME_UNKNOWN")
            return self._page(sorted(fake.repo(name).tags), "tags", path, query, name)
        if kind == "referrers":
            return self._referrers(name, rest, path, query)
        if kind == "manifests":
            return self._manifest(name, rest, body)
        if rest.startswith("uploads/"):
            return self._upload(name, rest.removeprefix("uploads/"), query, body)
        return self._blob(name, rest)

    def _page(self, items: list[str], key: str, path: str, query: dict[str, str], name: str = "") -> None:
        last = query.get("last", "")
        after = [item for item in items if item > last]
        size = int(query.get("n") or self.fake.page)
        page, more = after[:size], len(after) > size
        headers = {"Link": f'<{path}?n={size}&last={page[-1]}>; rel="next"'} if more else {}
        document = {key: page} | ({"name": name} if name else {})
        self.reply(200, json.dumps(document).encode(), Content_Type="application/json", **headers)

    def _manifest(self, name: str, ref: str, body: bytes) -> None:
        repo = self.fake.repo(name)
        if self.command in ("GET", "HEAD"):
            found = repo.manifests.get(repo.tags.get(ref, ref))
            if found is None:
                return self.error(404, "MANIFEST_UNKNOWN", f"no {ref}")
            media_type, data = found
            if media_type not in self.headers.get("Accept", "*/*") and "*/*" not in self.headers.get(
                "Accept", "*/*"
            ):
                self.violate(f"does not accept {media_type}")
            return self.reply(200, data, Content_Type=media_type, Docker_Content_Digest=digest_of(data))
        if self.command == "DELETE":
            if repo.manifests.pop(ref, None) is None:
                return self.error(404, "MANIFEST_UNKNOWN")
            repo.tags = {tag: digest for tag, digest in repo.tags.items() if digest != ref}
            return self.reply(202)
        if self.command != "PUT":
            return self.error(405, "UNSUPPORTED")
        digest = digest_of(body)
        if ref.startswith("sha256:") and ref != digest:
            self.violate("a manifest under a digest that it has not")
            return self.error(400, "DIGEST_INVALID")
        if not ref.startswith("sha256:") and not _TAG.fullmatch(ref):
            return self.error(400, "TAG_INVALID")
        try:
            document = json.loads(body)
        except ValueError:
            return self.error(400, "MANIFEST_INVALID")
        media_type = self.headers.get("Content-Type", "")
        if document.get("mediaType", media_type) != media_type:
            self.violate(f"Content-Type {media_type!r} for a manifest that says {document.get('mediaType')!r}")
        needed = [document["config"], *document.get("layers", [])] if "config" in document else []
        missing = [d["digest"] for d in needed if d["digest"] not in repo.blobs]
        missing += [d["digest"] for d in document.get("manifests", []) if d["digest"] not in repo.manifests]
        is_list = document.get("annotations", {}).get("fallback") or re.fullmatch(r"sha256-[0-9a-f]{64}", ref)
        if missing and not is_list:
            self.violate(f"a manifest before what it names: {missing}")
            return self.error(404, "MANIFEST_BLOB_UNKNOWN", ", ".join(missing))
        repo.manifests[digest] = (media_type, body)
        if not ref.startswith("sha256:"):
            repo.tags[ref] = digest
        headers = {"Docker_Content_Digest": digest, "Location": self._location(f"/v2/{name}/manifests/{digest}")}
        if self.fake.referrers_api and document.get("subject"):
            headers["OCI_Subject"] = document["subject"]["digest"]
        return self.reply(201, b"", **headers)

    def _referrers(self, name: str, subject: str, path: str, query: dict[str, str]) -> None:
        if not self.fake.referrers_api:
            return self.error(404, "NOT_FOUND")
        if not _DIGEST.fullmatch(subject):
            return self.error(400, "DIGEST_INVALID")
        entries = []
        for digest, (media_type, data) in self.fake.repo(name).manifests.items():
            document = json.loads(data)
            if (document.get("subject") or {}).get("digest") != subject:
                continue
            kind = document.get("artifactType") or document["config"]["mediaType"]
            if query.get("artifactType") in (None, kind):
                entries.append({
                    "mediaType": media_type, "digest": digest, "size": len(data), "artifactType": kind,
                    **({"annotations": document["annotations"]} if "annotations" in document else {}),
                })  # fmt: skip
        start = int(query.get("start", 0))
        page = entries[start : start + self.fake.page]
        headers = {"OCI_Filters_Applied": "artifactType"} if "artifactType" in query else {}
        if start + self.fake.page < len(entries):
            kept = f"&artifactType={query['artifactType']}" if "artifactType" in query else ""
            headers["Link"] = f'<{path}?start={start + self.fake.page}{kept}>; rel="next"'
        body = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": page}).encode()
        return self.reply(200, body, Content_Type=INDEX, **headers)

    def _blob(self, name: str, digest: str) -> None:
        data = self.fake.repo(name).blobs.get(digest)
        if data is None:
            return self.error(404, "BLOB_UNKNOWN")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or self.command == "HEAD":
            return self.reply(200, data, Content_Type="application/octet-stream", Docker_Content_Digest=digest)
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        if first >= len(data):
            self.violate("a range beyond the end")
            return self.error(416, "RANGE_INVALID")
        part = data[first : last + 1]
        return self.reply(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}")

    def _upload(self, name: str, session: str, query: dict[str, str], body: bytes) -> None:
        fake = self.fake
        if self.command == "POST" and not session:
            digest, source = query.get("mount", ""), query.get("from", "")
            if digest and fake.mount and digest in fake.repo(source).blobs:
                fake.repo(name).blobs[digest] = fake.repo(source).blobs[digest]
                return self.reply(201, Location=self._location(f"/v2/{name}/blobs/{digest}"))
            session = uuid.uuid4().hex
            fake.sessions[session] = (name, bytearray())
            least = {"OCI_Chunk_Min_Length": str(fake.chunk_min)} if fake.chunk_min else {}
            return self.reply(202, b"", **self._at(name, session, 0), **least)
        if session not in fake.sessions or fake.sessions[session][0] != name:
            return self.error(404, "BLOB_UPLOAD_UNKNOWN")
        data = fake.sessions[session][1]
        # After a lost answer a client knows an old Location only, and may ask with it how far it got.
        if self.command != "GET" and query.get("step") != str(len(data)):
            self.violate("not the Location of the last answer")
            return self.error(400, "BLOB_UPLOAD_INVALID")
        if self.command == "GET":
            return self.reply(204, b"", **self._at(name, session, len(data)))
        if self.command == "DELETE":
            del fake.sessions[session]
            return self.reply(204)
        if self.command == "PATCH":
            said = re.fullmatch(r"(\d+)-(\d+)", self.headers.get("Content-Range", ""))
            if said is None or int(said[2]) - int(said[1]) + 1 != len(body):
                self.violate("Content-Range does not fit the body")
                return self.error(416, "BLOB_UPLOAD_INVALID")
            if int(said[1]) != len(data):
                return self.error(416, "BLOB_UPLOAD_INVALID", **self._at(name, session, len(data)))
            data += body
            return self.reply(202, b"", **self._at(name, session, len(data)))
        if self.command != "PUT":
            return self.error(405, "UNSUPPORTED")
        data += body
        digest = digest_of(bytes(data))
        del fake.sessions[session]
        if query.get("digest") != digest:
            return self.error(400, "DIGEST_INVALID", "the bytes have another digest")
        fake.repo(name).blobs[digest] = bytes(data)
        return self.reply(201, Location=self._location(f"/v2/{name}/blobs/{digest}"), Docker_Content_Digest=digest)

    def _at(self, name: str, session: str, size: int) -> dict[str, str]:
        # The step makes each Location good for one request only, as the specification allows.
        location = self._location(f"/v2/{name}/blobs/uploads/{session}?step={size}")
        return {"Location": location, "Range": f"0-{max(size - 1, 0)}"}


@contextmanager
def fake_registry() -> Iterator[Fake]:
    """Serve an empty registry on a port of its own; ``fake.host`` is where."""
    fake = Fake()
    handler = type("FakeHandler", (Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.host = f"localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
