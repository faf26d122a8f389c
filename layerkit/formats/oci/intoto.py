"""Statements about what was done, and their signatures: in-toto, DSSE, sigstore bundles.

The statement is an in-toto one (Statement v1) with SLSA's provenance predicate (v1): from which image, by which
map, this artifact was made. It holds no time, so the same work gives the same bytes. A signed one is wrapped as
DSSE asks (secure-systems-lab/dsse, protocol.md) in a sigstore bundle (v0.3) with a plain key, as ``cosign`` reads
them with ``--key`` and no transparency log.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import remap_artifact as artifact
from layerkit.formats.strict_json import JsonObject, dumps, load_object
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.errors import InvalidImage
from layerkit.model.image import Image
from layerkit.model.limits import DEFAULT, Limits

STATEMENT = "application/vnd.in-toto+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:layerkit:remap:v1"

_CONTENT_KEY, _PREDICATE_KEY = "dev.sigstore.bundle.content", "dev.sigstore.bundle.predicateType"


class Signer(Protocol):
    """A private key."""

    hint: str

    def sign(self, data: bytes) -> bytes:
        """Return the signature of ``data``."""
        ...


Verifier = Callable[[bytes, bytes], bool]
"""Called as (data, signature); returns whether the key that it stands for has signed the data."""


@dataclass(frozen=True, slots=True)
class Attestation:
    """A statement as it is attached to what it is about: a blob, and the manifest that refers to it."""

    blob: Descriptor
    data: bytes
    manifest: bytes
    descriptor: Descriptor


def statement(image: Image, where: str, made: Descriptor, found: artifact.RemapArtifact, version: str) -> bytes:
    """Return the statement that the remap artifact ``made`` comes from ``image``.

    Args:
        image: what was remapped.
        where: its name, for people.
        made: the artifact's descriptor.
        found: what the artifact's manifest says.
        version: of layerkit.
    """
    layers: list[object] = [
        {"name": "layer", "digest": {diff_id.algorithm: diff_id.hex}} for diff_id in found.diff_ids
    ]
    source = image.descriptor.digest
    document: JsonObject = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": made.artifact_type, "digest": {made.digest.algorithm: made.digest.hex}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "map": found.mapping, "namespace": found.namespace, "rendering": found.rendering,
                },
                "internalParameters": {"formatVersion": found.format_version},
                "resolvedDependencies": [
                    {"name": "image", "uri": where, "digest": {source.algorithm: source.hex}}, *layers,
                ],
            },
            "runDetails": {"builder": {"id": "urn:layerkit", "version": {"layerkit": version}}},
        },
    }  # fmt: skip
    return dumps(document)


def attestation(payload: bytes, subject: Descriptor, signer: Signer | None = None) -> Attestation:
    """Return the statement ``payload`` ready to be attached to ``subject``, signed where there is a ``signer``."""
    media_type, data, annotations = STATEMENT, payload, {_PREDICATE_KEY: PREDICATE_TYPE}
    if signer is not None:
        media_type, data = BUNDLE, bundle(payload, signer)
        annotations[_CONTENT_KEY] = "dsse-envelope"
    blob = Descriptor.of(media_type, data)
    manifest, descriptor = oci.artifact(media_type, [blob], dict(sorted(annotations.items())), subject)
    return Attestation(blob, data, manifest, descriptor)


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that DSSE signs (its "PAE")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def bundle(payload: bytes, signer: Signer) -> bytes:
    """Return the sigstore bundle of a signed statement."""
    signature = signer.sign(pre_authentication(STATEMENT, payload))
    return dumps({
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": signer.hint}},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": STATEMENT,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    })  # fmt: skip


def open_bundle(data: bytes, verify: Verifier, what: str, *, limits: Limits = DEFAULT) -> bytes:
    """Return the statement in a bundle, whose signature is verified.

    Raises:
        InvalidImage: malformed, or not signed by that key.
    """
    document = load_object(data, what, limits)
    envelope = document.get("dsseEnvelope")
    if not isinstance(envelope, dict) or envelope.get("payloadType") != STATEMENT:
        raise InvalidImage(f"{what}: want a DSSE envelope of {STATEMENT}")
    try:
        payload = base64.b64decode(str(envelope.get("payload")), validate=True)
        listed = envelope.get("signatures")
        signatures = [
            base64.b64decode(str(each.get("sig")), validate=True)
            for each in (listed if isinstance(listed, list) else ())
            if isinstance(each, dict)
        ]
    except binascii.Error:
        raise InvalidImage(f"{what}: want base64") from None
    signed = pre_authentication(STATEMENT, payload)
    if not any(verify(signed, signature) for signature in signatures[:16]):
        raise InvalidImage(f"{what}: is not signed by this key")
    return payload


def check_statement(payload: bytes, image: Image, made: Digest, found: artifact.RemapArtifact, what: str) -> None:
    """Raise unless ``payload`` says that ``made``, with this map, comes from ``image``.

    Raises:
        InvalidImage: it is about something else.
    """
    document = load_object(payload, what)
    subjects = document.get("subject")
    about = [s.get("digest") for s in subjects if isinstance(s, dict)] if isinstance(subjects, list) else []
    if document.get("_type") != STATEMENT_TYPE or {made.algorithm: made.hex} not in about:
        raise InvalidImage(f"{what}: a statement about something else than {made}")
    definition = _inside(document, "predicate", "buildDefinition")
    said = _inside(definition, "externalParameters")
    needed = definition.get("resolvedDependencies")
    images = [d.get("digest") for d in needed if isinstance(d, dict)] if isinstance(needed, list) else []
    source = image.descriptor.digest
    if {source.algorithm: source.hex} not in images[:1] or said.get("map") != found.mapping:
        raise InvalidImage(f"{what}: a statement about another image or map")


def _inside(value: JsonObject, *names: str) -> JsonObject:
    for name in names:
        found = value.get(name)
        value = found if isinstance(found, dict) else {}
    return value
