"""Every setting: its key, its variable, what it may be, and where its value comes from.

A value comes from the flag or argument; else from the variable ``LAYERKIT_*``; else from the user's
``$XDG_CONFIG_HOME/layerkit/config.toml``; else from ``/etc/layerkit/config.toml``; else it is the default. Commands
and the Python API ask here alone. What a registry's hook is told stands in its own file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from layerkit.formats.toml_settings import nearest
from layerkit.model.errors import UsageError
from layerkit.model.limits import Limits

SYSTEM_FILE = Path("/etc/layerkit/config.toml")

_FALSE, _TRUE = frozenset(("0", "false", "no", "off")), frozenset(("1", "true", "yes", "on"))
_LIMITS = "limits"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        key: in config.toml; ``limits.NAME`` stands in the table ``[limits]``.
        parse: makes the value of a text or of what TOML gives; raises ValueError with what is wanted.
        help: one sentence.
        default: the value where nothing sets it; None where it is found out when it is needed.
        others: variables of other tools that are honoured after ours.
    """

    key: str
    parse: Callable[[object], Any]
    help: str
    default: object = None
    others: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        """Return the variable of the environment."""
        table, _, name = self.key.rpartition(".")
        return f"LAYERKIT_{'LIMIT_' if table else ''}{name.upper()}"

    def read(self, value: object, where: str) -> Any:
        """Return what ``value`` says; ``where`` is what an error puts before it, such as ``NAME=``.

        Raises:
            UsageError: a value that this cannot be.
        """
        try:
            return self.parse(value)
        except ValueError as error:
            raise UsageError(f"{where}{value!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class Configured:
    """What a setting is, and why.

    Attributes:
        value: as :attr:`Setting.parse` makes it.
        origin: the variable, the file, or ``default``.
    """

    value: Any
    origin: str


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ValueError("want true or false")


def _text(value: object, what: str = "text") -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"want a {what}")
    return value


def _path(value: object) -> Path:
    return Path(_text(value, "path")).expanduser()


def _choice(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError(f"want {', '.join(choices[:-1])} or {choices[-1]}")
        return str(value)

    return parse


def _number(least: int, most: int | None = None) -> Callable[[object], int]:
    want = f"want a whole number from {least}" + ("" if most is None else f" to {most}")

    def parse(value: object) -> int:
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if type(value) is not int or value < least or (most is not None and value > most):
            raise ValueError(want)
        return value

    return parse


SETTINGS: Mapping[str, Setting] = {
    setting.key: setting
    for setting in (
        Setting("store", _path, "the local store"),
        Setting("cache", _path, "folder of unproven indexes"),
        Setting("data", _choice("auto", "tar", "objects"), "how file data is kept", "auto"),
        Setting("rendering", _choice("auto", "erofs", "directory", "fuse"), "how metadata is mounted", "auto"),
        Setting("jobs", _number(1, 64), "layers read at the same time, threads that compress"),
        Setting("strict", _truth, "refuse overlay xattrs that an image brings", False),
        Setting("published", _truth, "use published indexes instead of layers if nothing is mounted", True),
        Setting("platform", _text, "which image of an image index"),
        Setting(
            "compression", _choice("gzip", "zstd", "zstd:chunked", "none"), "how new layers are compressed", "gzip"
        ),
        Setting("compression_level", _number(1, 22), "level of the compression"),
        Setting("authfile", _path, "credentials of registries", others=("REGISTRY_AUTH_FILE",)),
        Setting("tls_verify", _truth, "false accepts any certificate, and plain HTTP"),
        Setting("cert_dir", _path, "certificates for registries"),
        Setting(
            "registries_conf", _path, "the file with mirrors of registries", others=("CONTAINERS_REGISTRIES_CONF",)
        ),
        Setting("hosts_dir", _path, "containerd's folder of hosts.toml"),
        Setting("mirrors", _truth, "ask mirrors of registries", True),
        *(
            Setting(f"{_LIMITS}.{field.name}", _number(0), "a limit on input", field.default)
            for field in fields(Limits)
        ),
    )
}

ENVIRONMENT_ONLY = frozenset(
    ("LAYERKIT_HOOK_CONFIG", "LAYERKIT_HOOK_TOKEN", "LAYERKIT_KEY_PASSWORD", "LAYERKIT_SHARD")
)
"""Variables without a key: secrets, and what names the work of one process."""


def user_file() -> Path:
    """Return the user's own file; it need not exist."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "layerkit/config.toml"


def configured(key: str) -> Any:
    """Return the value of the setting ``key``.

    Raises:
        UsageError: a value that it cannot be, or a file that cannot be understood.
    """
    return _find(SETTINGS[key], _from_files()).value


def everything() -> dict[str, Configured]:
    """Return each setting with its value and where that comes from."""
    given = _from_files()
    return {key: _find(setting, given) for key, setting in SETTINGS.items()}


def limits() -> Limits:
    """Return the bounds on input: the defaults, and those that are set."""
    given = _from_files()
    return Limits(
        **{field.name: _find(SETTINGS[f"{_LIMITS}.{field.name}"], given).value for field in fields(Limits)}
    )


def unknown_variables() -> list[str]:
    """Return for each ``LAYERKIT_*`` variable that means nothing a sentence that says so.

    Those of the tests, and those that Kubernetes sets for a service called layerkit, are left alone.
    """
    known = ENVIRONMENT_ONLY | {setting.variable for setting in SETTINGS.values()}
    return [
        f"{name}: there is no such variable{nearest(name, known)}"
        for name in sorted(os.environ)
        if name.startswith("LAYERKIT_") and name not in known and not name.startswith("LAYERKIT_TEST_")
        if "_SERVICE_" not in name and "_PORT" not in name
    ]


def _find(setting: Setting, given: Mapping[str, Configured]) -> Configured:
    for name in (setting.variable, *setting.others):
        if text := os.environ.get(name):
            return Configured(setting.read(text, f"{name}="), name)
    return given.get(setting.key) or Configured(setting.default, "default")


def _from_files() -> dict[str, Configured]:
    found: dict[str, Configured] = {}
    for path in (SYSTEM_FILE, user_file()):
        try:
            state = os.stat(path)
            found |= _read(path, state.st_mtime_ns, state.st_size)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue
    return found


@cache
def _read(path: Path, _mtime_ns: int, _size: int) -> dict[str, Configured]:
    import tomllib

    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    return {
        setting.key: Configured(setting.read(value, f"{path}: {setting.key} = "), str(path))
        for setting, value in _known(values, path)
    }


def _known(values: dict[str, object], path: Path) -> Iterator[tuple[Setting, object]]:
    table = values.pop(_LIMITS, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {_LIMITS} is a table: write [{_LIMITS}], and one bound in each line below it")
    for key, value in (values | {f"{_LIMITS}.{name}": value for name, value in table.items()}).items():
        if key not in SETTINGS:
            raise UsageError(f"{path}: there is no setting {key!r}{nearest(key, SETTINGS)}")
        yield SETTINGS[key], value
