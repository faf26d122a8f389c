"""What refers to a manifest: the referrers API, and the tag that stands in for it.

distribution-spec 1.1, "Listing Referrers" and "Referrers Tag Schema". Registries before 1.1 (docker-registry
2.8, for one) keep manifests with a subject and do not list them; then the client keeps the list, an image
index under the tag ``sha256-HEX``. Two writers of such a list could lose each other's entries: they take turns
by a lock on this host, and look afterwards whether their entry is still there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerkit.formats.oci import documents as oci
from layerkit.formats.strict_json import JsonObject
from layerkit.images.registry.listing import NoSuchList
from layerkit.images.registry.names import fallback_tag
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage, NotFound, RegistryError
from layerkit.model.limits import Limits

if TYPE_CHECKING:
    from layerkit.images.registry.client import Repository

_ATTEMPTS = 8


def find(repo: Repository, subject: Digest, artifact_type: str, limits: Limits) -> list[Descriptor]:
    """Return what is attached to ``subject``, by the API or by the tag; see ``Repository.referrers``."""
    found = repo.referrers_api(subject, artifact_type)
    if not found:
        # A registry that learnt the API later still has lists that were kept by tag.
        listed = _by_tag(repo, subject, limits)
        known = {entry.digest for entry in found or ()}
        found = [*(found or ()), *(entry for entry in listed[1] if entry.digest not in known)]
    return [e for e in found if not artifact_type or e.artifact_type in ("", artifact_type)]


def from_api(documents: Iterator[JsonObject], what: str, limits: Limits) -> list[Descriptor] | None:
    """Return the entries of the API's pages, None where there is no such API."""
    entries: list[Descriptor] = []
    try:
        for document in documents:
            listed = document.get("manifests")
            if not isinstance(listed, list):
                raise RegistryError(what, 200, "its answer is no image index")
            for at, value in enumerate(listed):
                entries.append(oci.descriptor(value, what, f"manifests[{at}]"))
                limits.check("manifests_per_index", len(entries), what)
    except NoSuchList:
        return None
    return entries


def list_by_tag(repo: Repository, manifest: oci.Manifest, descriptor: Descriptor, limits: Limits) -> None:
    """Add ``descriptor``, whose manifest is ``manifest`` and has a subject, to the list kept by tag.

    Raises:
        RegistryError: other writers kept taking the entry out.
    """
    assert manifest.subject is not None
    subject = manifest.subject.digest
    if repo.referrers_api(subject, "") is not None:
        return  # the registry lists it by itself
    entry = replace(
        descriptor,
        artifact_type=manifest.artifact_type or manifest.config.media_type,
        annotations=dict(manifest.annotations),
    )
    tag = fallback_tag(subject)
    with _turn(f"{repo.name}:{tag}"):
        for _ in range(_ATTEMPTS):
            document, entries = _by_tag(repo, subject, limits)
            if any(each.digest == entry.digest for each in entries):
                return
            repo.put_manifest(oci.index_json([*entries, entry], document), oci.INDEX, tag)
    raise RegistryError(
        f"{repo.name}:{tag}", 0, "other writers keep replacing this list; try again", temporary=True
    )


def _by_tag(repo: Repository, subject: Digest, limits: Limits) -> tuple[JsonObject | None, tuple[Descriptor, ...]]:
    try:
        descriptor, data = repo.manifest(fallback_tag(subject))
    except NotFound:
        return None, ()
    if descriptor.media_type not in oci.INDEX_TYPES:
        return None, ()
    what = f"{repo.name}:{fallback_tag(subject)}"
    try:
        parsed = oci.parse_index(data, what, media_type=descriptor.media_type, limits=limits)
    except InvalidImage as error:
        raise RegistryError(what, 200, f"the list of referrers is malformed: {error}") from None
    return parsed.document, parsed.manifests


@contextlib.contextmanager
def _turn(key: str) -> Iterator[None]:
    """Have the list called ``key`` to oneself among the processes and threads of this user."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"layerkit-registry-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RegistryError(key, 0, f"{folder} belongs to somebody else; set XDG_RUNTIME_DIR to a folder of yours")
    name = hashlib.sha256(key.encode()).hexdigest()[:2]  # few files that stay, each for many lists
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


__all__ = ["find", "from_api", "list_by_tag"]
