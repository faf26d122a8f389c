"""``layerkit config``: every setting, its value, and where that comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, table


def config(
    every: Annotated[bool, typer.Option("--all", help="Also show limits that have their default value.")] = False,
    json: o.Json = False,
) -> None:
    """Show every setting, its value, and where the value comes from.

    A value comes from the flag, else from the variable, else from the user's config.toml, else from
    /etc/layerkit/config.toml.

    Examples:
    `layerkit config`

    `LAYERKIT_JOBS=4 layerkit config --json`
    """
    from layerkit.linux import configuration

    found = configuration.everything()
    rows = {
        key: {
            "value": value.value if isinstance(value.value, (bool, int)) else _shown(value.value),
            "origin": value.origin, "variable": configuration.SETTINGS[key].variable,
        }
        for key, value in found.items()
    }  # fmt: skip
    files = [str(configuration.user_file()), str(configuration.SYSTEM_FILE)]
    if Output(json).told("config", {"files": files, "settings": rows}):
        return
    table(
        "",
        ["SETTING", "VALUE", "FROM", "MEANING"],
        [
            (key, _shown(value.value) or "", value.origin, configuration.SETTINGS[key].help)
            for key, value in found.items()
            if every or not key.startswith("limits.") or value.origin != "default"
        ],
    )


def _shown(value: object) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)
