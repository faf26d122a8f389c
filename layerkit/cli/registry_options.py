"""The options about registries, which every command has that takes a reference.

They are the environment's variables under another name, so a command hands nothing on: the client reads them.
"""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption
from typer.models import CommandInfo

_PANEL = "Registries"
_TAKES_REFERENCE = frozenset(("o.Ref", "o.Refs"))


def add_to_commands(app: typer.Typer) -> None:
    """Give the options to those commands of ``app`` whose arguments are references."""
    for info in app.registered_commands:
        if _takes_reference(info):
            info.cls = RegistryCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_to_commands(group.typer_instance)


def _takes_reference(info: CommandInfo) -> bool:
    kinds = getattr(info.callback, "__annotations__", {}).values()
    return bool(_TAKES_REFERENCE.intersection(map(str, kinds)))


def _setting(name: str) -> Any:
    """Return a callback that sets the variable ``name`` for as long as the command runs."""

    def callback(ctx: Any, _param: Any, value: object) -> None:
        if value is None:
            return
        before = os.environ.get(name)

        def restore() -> None:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before

        ctx.call_on_close(restore)
        os.environ[name] = str(value)

    return callback


class RegistryCommand(TyperCommand):
    """A command with ``--authfile``, ``--tls-verify`` and ``--cert-dir``."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **kwargs: Any) -> None:
        """As :class:`TyperCommand`."""
        more = [
            TyperOption(
                param_decls=["--authfile"], metavar="FILE", expose_value=False, rich_help_panel=_PANEL,
                callback=_setting("LAYERKIT_AUTHFILE"), show_default=False,
                help="Credentials, as `podman login` writes them [default: podman's, then docker's].",
            ),
            TyperOption(
                param_decls=["--tls-verify"], metavar="true|false", expose_value=False, rich_help_panel=_PANEL,
                callback=_setting("LAYERKIT_TLS_VERIFY"), show_default=False,
                help="false takes any certificate of a registry, and plain HTTP if it speaks nothing else.",
            ),
            TyperOption(
                param_decls=["--cert-dir"], metavar="DIR", expose_value=False, rich_help_panel=_PANEL,
                callback=_setting("LAYERKIT_CERT_DIR"), show_default=False,
                help="CA (`*.crt`) and client (`*.cert`, `*.key`) certificates [default: certs.d].",
            ),
        ]  # fmt: skip
        super().__init__(*args, params=[*(params or ()), *more], **kwargs)
