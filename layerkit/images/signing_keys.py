"""Keys in files, for signatures: PEM as openssl writes it, and cosign's own encrypted form.

Needs the package ``cryptography`` (the extra ``sign``); without it the import is an UnsupportedHost. Keys are
ECDSA on P-256 with SHA-256 (cosign's choice) or Ed25519.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from layerkit.formats import secretbox
from layerkit.formats.oci.intoto import Verifier
from layerkit.formats.strict_json import load_object
from layerkit.model.errors import InvalidImage, UnsupportedHost, UsageError

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_der_private_key,
        load_pem_private_key,
        load_pem_public_key,
    )
except ImportError:
    raise UnsupportedHost("signatures", "pip install 'layerkit[sign]' brings the package cryptography") from None

_COSIGN = (b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----", b"-----BEGIN ENCRYPTED COSIGN PRIVATE KEY-----")
_FILE_BYTES = 1 << 20
PASSWORD_VARIABLES = ("LAYERKIT_KEY_PASSWORD", "COSIGN_PASSWORD")
# scrypt's memory is 128 * N * r bytes; cosign's own parameters need 32 MiB.
_SCRYPT_BYTES = 256 << 20


class FileSigner:
    """A private key from a file, as a :class:`~layerkit.formats.oci.intoto.Signer`.

    Attributes:
        hint: names the public key: base64 of the sha256 of its DER form.
    """

    def __init__(self, path: Path) -> None:
        """Read the key; its password comes from ``LAYERKIT_KEY_PASSWORD`` or ``COSIGN_PASSWORD``.

        Raises:
            UsageError: no such file, a wrong password, or a key of another kind.
        """
        self._key = _private(path)
        self.hint = _hint(self._key.public_key())

    def sign(self, data: bytes) -> bytes:
        """Return the signature of ``data``."""
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(data, ec.ECDSA(hashes.SHA256()))
        assert isinstance(self._key, ed25519.Ed25519PrivateKey)
        return self._key.sign(data)


def verifier(path: Path) -> Verifier:
    """Return what verifies with the public key (PEM) in a file.

    Raises:
        UsageError: no such file, or no key of a kind that is known.
    """
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path}: no public key in PEM; `cosign public-key --key …` writes one") from None
    _check(key, path)

    def verify(data: bytes, signature: bytes) -> bool:
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
            else:
                assert isinstance(key, ed25519.Ed25519PublicKey)
                key.verify(signature, data)
        except InvalidSignature:
            return False
        return True

    return verify


def _private(path: Path) -> PrivateKeyTypes:
    data = _read(path)
    given = next((os.environ[name] for name in PASSWORD_VARIABLES if name in os.environ), None)
    password = None if given is None else given.encode()
    try:
        if data.lstrip().startswith(_COSIGN):
            key = load_der_private_key(_cosign(data, password or b"", path), None)
        else:
            try:
                key = load_pem_private_key(data, password)
            except TypeError:  # a password for a key that has none, or the other way round
                if password is None:
                    raise UsageError(f"{path}: is encrypted; set {PASSWORD_VARIABLES[0]}") from None
                key = load_pem_private_key(data, None)
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(
            f"{path}: no private key in PEM, or a wrong password ({' or '.join(PASSWORD_VARIABLES)})"
        ) from None
    _check(key.public_key(), path)
    return key


def _cosign(data: bytes, password: bytes, path: Path) -> bytes:
    """Return the PKCS 8 key in a file of cosign's: scrypt, and NaCl's secretbox."""
    try:
        body = base64.b64decode(b"".join(data.strip().splitlines()[1:-1]), validate=True)
        document: dict[str, Any] = load_object(body, str(path))
        kdf, cipher = document["kdf"], document["cipher"]
        if kdf["name"] != "scrypt" or cipher["name"] != "nacl/secretbox":
            raise ValueError(f"{kdf['name']}, {cipher['name']}")
        parameters = kdf["params"]
        secret = hashlib.scrypt(
            password, salt=base64.b64decode(kdf["salt"]), n=int(parameters["N"]), r=int(parameters["r"]),
            p=int(parameters["p"]), maxmem=_SCRYPT_BYTES, dklen=32,
        )  # fmt: skip
        return secretbox.open_box(
            base64.b64decode(document["ciphertext"]), base64.b64decode(cipher["nonce"]), secret
        )
    except (KeyError, TypeError, InvalidImage) as error:
        raise ValueError(str(error)) from None


def _check(key: PublicKeyTypes, path: Path) -> None:
    curve = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else ""
    if curve != "secp256r1" and not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{path}: want a key of ECDSA P-256 or Ed25519")


def _hint(key: PublicKeyTypes) -> str:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; want a file with a key") from None
