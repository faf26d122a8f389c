"""What containerd's config.toml and systemd need for `layerkit snapshotter`, put in and taken out again."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from layerkit.hosts.setup_file import Change, parse, read
from layerkit.model.errors import UsageError

BEGIN = "# BEGIN layerkit setup containerd: take out with --undo"
END = "# END layerkit setup containerd"
_OURS = re.compile(rf"(?ms)(?:^[^\S\n]*\n)*^{re.escape(BEGIN)}$.*?(?:^{re.escape(END)}$\n?|\Z)")

_TRANSFER = "io.containerd.transfer.v1.local"
_CONFIG_OF_2 = 3
"""Version of config.toml from containerd 2.0 on; it reads older ones too."""


def proxy_plugin(name: str, address: Path, *, unpack: bool = False) -> str:
    """Return the tables of config.toml that let containerd (1.6 and later) use the snapshotter as ``name``.

    ``unpack`` lets the daemon itself unpack with it, as "ctr images pull" and "import" of 2.x ask it to. The list
    stands for the default one, so overlayfs is in it too; and the differ is named, since 2.1 may else take the one
    for EROFS, which unpacks for no other snapshotter.
    """
    more = "".join(
        f"""
[[plugins.{json.dumps(_TRANSFER)}.unpack_config]]
  platform = "linux"
  snapshotter = {json.dumps(each)}
  differ = "walking"
"""
        for each in ("overlayfs", name)
        if unpack
    )
    return f"""{BEGIN}
[proxy_plugins.{json.dumps(name)}]
  type = "snapshot"
  address = {json.dumps(str(address))}
  # From 1.7 on: without it containerd chowns a copy of the image for each id map. 1.6 does not read it.
  capabilities = ["remap-ids"]
{more}{END}
"""


def unit(command: list[str]) -> str:
    """Return the systemd unit of the snapshotter; ``command`` is how it is started."""
    text = " ".join(shlex.quote(word) for word in command)
    return f"""[Unit]
Description=layerkit snapshotter for containerd
Documentation=https://github.com/containerd/containerd/blob/main/docs/PLUGINS.md
After=network.target local-fs.target
Before=containerd.service

[Service]
Type=notify
ExecStart={text}
Restart=always
RestartSec=1
# Its mounts must be seen by containerd: no mount namespace of its own (PrivateMounts, ProtectSystem and the like).
# Containers do not depend on this process, and go on while it is replaced.
KillMode=mixed
LimitNOFILE=1048576
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"""


def add(path: Path, name: str, address: Path) -> Change:
    """Return the change that names the snapshotter in the config.toml at ``path``, which may be missing.

    Raises:
        UsageError: no TOML, or the name is another plugin's.
    """
    old = _without(read(path))
    settings = parse(old, path, "containerd")
    plugins = settings.get("proxy_plugins", {})
    if name in plugins:
        raise UsageError(f"{path}: has proxy_plugins.{name} already, not by layerkit; choose another --name")
    for other, table in plugins.items():
        if isinstance(table, dict) and table.get("address") == str(address):
            raise UsageError(
                f"{path}: proxy_plugins.{other} has the address {address} too; two names over one snapshotter "
                "would remove each other's snapshots: give each an --address and --root of its own"
            )
    notes = [
        "restart containerd: systemctl restart containerd (containers go on)",
        f"try it: ctr images pull --snapshotter {name} IMAGE; "
        f"ctr run --snapshotter {name} --remap-labels --uidmap 0:100000:65536 --gidmap 0:100000:65536 IMAGE NAME",
    ]
    disabled = settings.get("disabled_plugins", [])
    if isinstance(disabled, list) and any("grpc.v1.cri" in str(each) for each in disabled):
        notes.append(f"{path}: the CRI plugin is switched off there, so Kubernetes cannot use this containerd")
    of_2 = settings.get("version") == _CONFIG_OF_2
    unpack = of_2 and "unpack_config" not in settings.get("plugins", {}).get(_TRANSFER, {})
    if not unpack:
        notes.append(
            f'containerd 2.x: "ctr images pull --snapshotter {name}" also needs an unpack_config of the plugin '
            f"{_TRANSFER} in {path}, see docs/containerd.md"
        )
    text = old if old.strip() else "version = 2\n"
    new = text.rstrip("\n") + "\n\n" + proxy_plugin(name, address, unpack=unpack)
    parse(new, path, "containerd")
    return Change(path, new, tuple(notes))


def remove(path: Path) -> Change:
    """Return the change that takes out what :func:`add` put in; a file that held no more goes."""
    text = _without(read(path))
    parse(text, path, "containerd")
    return Change(path, "" if text.strip() in ("", "version = 2") else text)


def _without(text: str) -> str:
    """Return ``text`` without our tables and the empty lines before them."""
    rest = _OURS.sub("", text)
    return rest + "\n" * (bool(rest) and not rest.endswith("\n"))
