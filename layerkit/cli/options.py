"""Options that several commands share, declared once, with their settings from the environment and files.

Order of precedence: the flag, ``LAYERKIT_*``, ``$XDG_CONFIG_HOME/layerkit/config.toml``,
``/etc/layerkit/config.toml``.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from layerkit.errors import UsageError


@cache
def _file_settings() -> dict[str, object]:
    import tomllib

    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    settings: dict[str, object] = {}
    for path in (Path("/etc/layerkit/config.toml"), home / "layerkit/config.toml"):
        try:
            settings |= tomllib.loads(path.read_text())
        except (FileNotFoundError, PermissionError):
            continue
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error}") from None
    return settings


Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="An image: a file or folder, or `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, "
        "`docker-archive:FILE[:NAME]`, `docker-daemon:NAME[:TAG]`, `docker://HOST/NAME[:TAG]`, `store:NAME`; "
        "`-` is an archive on standard input.",
    ),
]
UidMap = Annotated[
    list[str] | None,
    typer.Option(
        "--uid-map", metavar="C:H:N", help="Container id, host id, count; repeat it or use commas.",
    ),
]  # fmt: skip
GidMap = Annotated[
    list[str] | None,
    typer.Option("--gid-map", metavar="C:H:N", help="The same for groups; without it the uid map is used."),
]
SubuidName = Annotated[
    str | None,
    typer.Option("--subuid-name", metavar="NAME", help="Take the map from /etc/subuid and /etc/subgid for NAME."),
]
OverflowId = Annotated[
    int | None,
    typer.Option("--overflow-id", metavar="N", help="Give owners outside the map this host id, not an error."),
]
Squash = Annotated[
    bool, typer.Option("--squash", help="Allow several container ids to share one host id (many-to-one).")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse overlay xattrs that the image brings, instead of escaping them.")
]
StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", envvar="LAYERKIT_STORE",
        help="The local store [default: /var/lib/layerkit for root, else $XDG_DATA_HOME/layerkit].",
    ),
]  # fmt: skip
Data = Annotated[
    str,
    typer.Option(
        "--data", envvar="LAYERKIT_DATA", metavar="auto|tar|objects",
        help="How file data is kept: raw layer tars under EROFS, or content-addressed files.",
    ),
]  # fmt: skip
PlatformOption = Annotated[
    str | None,
    typer.Option("--platform", metavar="OS/ARCH[/VARIANT]", envvar="LAYERKIT_PLATFORM",
                 help="Which image of a multi-platform one [default: this host's]."),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, max=64, envvar="LAYERKIT_JOBS", help="Layers read at the same time.")
]


def store_dir(given: Path | None) -> Path:
    """Return the store that the flag, the environment or a settings file names, or the default one."""
    if given is not None:
        return given
    named = _file_settings().get("store")
    if isinstance(named, str):
        return Path(named).expanduser()
    if named is not None:
        raise UsageError(f"config.toml: store = {named!r}: want a string")
    from layerkit.api import default_store

    return default_store()
