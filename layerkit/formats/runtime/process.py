"""What an image's config says of the process to run: parsed once, refused where it cannot mean anything."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

import msgspec

from layerkit.formats.oci.documents import parse_config
from layerkit.model.errors import InvalidImage
from layerkit.model.limits import DEFAULT, Limits


class _Process(msgspec.Struct):
    """The ``config`` member (image-spec, config.md); Go writes what is empty as null."""

    User: str | None = None
    Env: list[str] | None = None
    Entrypoint: list[str] | None = None
    Cmd: list[str] | None = None
    WorkingDir: str | None = None
    Volumes: dict[str, Any] | None = None
    ExposedPorts: dict[str, Any] | None = None
    Labels: dict[str, str] | None = None
    StopSignal: str | None = None


class _Facts(msgspec.Struct):
    config: _Process | None = None
    os: str | None = None
    architecture: str | None = None
    variant: str | None = None
    os_version: str | None = msgspec.field(default=None, name="os.version")
    os_features: list[str] | None = msgspec.field(default=None, name="os.features")
    author: str | None = None
    created: str | None = None


@dataclass(frozen=True, slots=True)
class ImageProcess:
    """How an image wants to be run.

    Attributes:
        user: as written: ``""``, ``user``, ``uid``, ``user:group`` …
        env: ``NAME=value`` each.
        entrypoint, cmd: words of the command.
        working_dir: absolute and normal; "" where the image does not say.
        volumes: absolute and normal paths, rising.
        annotations: the implicit ones of conversion.md, with the image's labels over them.
    """

    user: str
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    working_dir: str
    volumes: tuple[str, ...]
    annotations: dict[str, str]


def image_process(config: bytes, what: str, *, limits: Limits = DEFAULT) -> ImageProcess:
    """Return what the image config ``config`` says of its process.

    Raises:
        InvalidImage: malformed; the message names ``what`` and the field.
    """
    document = parse_config(config, what, limits=limits).document
    try:
        facts = msgspec.convert(document, _Facts)
    except msgspec.ValidationError as error:
        raise InvalidImage(f"{what}: {error}") from None
    process = facts.config or _Process()
    if facts.os not in (None, "", "linux"):
        raise InvalidImage(f"{what}: os: want 'linux', found {facts.os!r}; no runtime here runs it")
    for entry in process.Env or []:
        if "=" not in entry or entry.startswith("="):
            raise InvalidImage(f"{what}: config.Env: want NAME=value, found {entry!r}")
    texts = [process.User or "", process.WorkingDir or "", process.StopSignal or "", *(process.Env or [])]
    texts += [*(process.Entrypoint or []), *(process.Cmd or []), *(process.Volumes or {})]
    for text in texts:
        if "\0" in text:
            raise InvalidImage(f"{what}: config: a NUL byte in {text!r}")
    return ImageProcess(
        user=process.User or "",
        env=tuple(process.Env or ()),
        entrypoint=tuple(process.Entrypoint or ()),
        cmd=tuple(process.Cmd or ()),
        working_dir=_inside(process.WorkingDir) if process.WorkingDir else "",
        volumes=tuple(sorted({_inside(path) for path in process.Volumes or {}})),
        annotations=_annotations(facts, process),
    )


def _inside(path: str) -> str:
    """Return ``path`` absolute and normal; a relative one is below the root, as the engines take it."""
    return posixpath.normpath("/" + path.lstrip("/"))


def _annotations(facts: _Facts, process: _Process) -> dict[str, str]:
    # conversion.md, "Annotation Fields" and "Config.ExposedPorts"; an explicit label wins.
    prefix = "org.opencontainers.image."
    implicit = {
        "os": facts.os,
        "architecture": facts.architecture,
        "variant": facts.variant,
        "os.version": facts.os_version,
        "os.features": ",".join(facts.os_features or ()),
        "author": facts.author,
        "created": facts.created,
        "stopSignal": process.StopSignal,
        "exposedPorts": ",".join(sorted(process.ExposedPorts or {})),
    }
    return {prefix + name: value for name, value in implicit.items() if value} | (process.Labels or {})
