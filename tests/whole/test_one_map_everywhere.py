"""What an id map, or an id, may be is the same wherever one is given: one table for all ways in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hook_service import settings
from typer.testing import CliRunner

import layerkit
from layerkit.cli.main import app
from layerkit.hosts.containerd.snapshots.layers import GID_LABEL, UID_LABEL, mapping_of
from layerkit.hosts.podman import layers, mount_program
from layerkit.idmap import Mapping
from layerkit.linux.userns import subid_map
from layerkit.model.errors import SnapshotError, UsageError

MAPS = {
    "0:100000:65536": True, "0:0:4294967295": True, "4294967294:0:1": True, "5:4294967294:1": True,
    "0:0:4294967296": False, "4294967295:0:1": False, "0:4294967295:1": False, "0:4294967290:6": False,
    "0:1:0": False, "0:1": False, "0:-1:2": False, "٠:١:٢": False, "0:1_0:2": False, "0:0x1:2": False,
    "0:1:2:3": False, " 0:1:2": False, "0:10:5:4:100:5": False, "0:10:5:5:14:5": False, "all:5": False,
    "0:1:99999999999": False,
}  # fmt: skip
IDS = {
    "0": True, "65534": True, "4294967294": True, "4294967295": False, "4294967296": False, "-1": False,
    "١": False, "1_0": False, "0x1": False, "99999999999": False,
}  # fmt: skip
Way = Callable[[str, Path], object]


def by_flag(*words: str) -> None:
    done = CliRunner().invoke(app(), ["inspect", "/nowhere/at/all", *words])
    # The image is not there, which is another error; what comes before that is the map's.
    if done.exit_code == 2 or isinstance(done.exception, UsageError):
        raise UsageError(done.output)


def by_hook(table: dict[str, object], folder: Path) -> object:
    return settings(folder, map=[{"uid_map": ["0:1:10"], **table}]).remaps


def by_labels(text: str) -> object:
    try:
        return mapping_of({UID_LABEL: text, GID_LABEL: text})
    except SnapshotError as error:
        raise UsageError(str(error)) from error


MAP_WAYS: dict[str, Way] = {
    "api": lambda text, _: layerkit.mapping([text]),
    "flag": lambda text, _: by_flag("--uid-map", text),
    "gid flag": lambda text, _: by_flag("--uid-map", "0:1:10", "--gid-map", text),
    "hook.toml": lambda text, folder: by_hook({"uid_map": [text]}, folder),
    "mount program": lambda text, _: mount_program.parse(f"lowerdir=/a,uidmapping={text}"),
    "mount program, groups": lambda text, _: mount_program.parse(f"lowerdir=/a,gidmapping=:{text}:"),
    "containerd": lambda text, _: by_labels(text),
    "mark of an upper": lambda text, _: layers.parse_shift(f"uid={text}"),
}
ID_WAYS: dict[str, Way] = {
    "api": lambda text, _: layerkit.mapping(["0:1:10"], overflow_id=int(text, 0) if text.isascii() else -1),
    "flag": lambda text, _: by_flag("--uid-map", "0:1:10", f"--overflow-id={text}"),
    "hook.toml": lambda text, folder: by_hook({"overflow_id": int(text, 0) if text.isascii() else -1}, folder),
    "overflow_id": lambda text, _: mount_program.parse(f"lowerdir=/a,overflow_id={text}"),
    "squash_to_uid": lambda text, _: mount_program.parse(f"lowerdir=/a,squash_to_uid={text}"),
    "squash_to_gid": lambda text, _: mount_program.parse(f"lowerdir=/a,squash_to_gid={text}"),
    "mark of an upper": lambda text, _: layers.parse_shift(f"gid=all:{text}"),
    "kept": lambda text, _: Mapping.parse_canonical(f"uid=0:1:1;gid=0:1:1;overflow={text}"),
}


def agrees(way: Way, text: str, good: bool, folder: Path) -> bool:
    try:
        way(text, folder)
    except UsageError:
        return not good
    return good


@pytest.mark.parametrize("way", MAP_WAYS)
def test_a_map(way: str, tmp_path: Path) -> None:
    wrong = [text for text, good in MAPS.items() if not agrees(MAP_WAYS[way], text, good, tmp_path)]
    # The kernel's own writing of an upper's mark is read with the one exception of its own word.
    assert wrong == (["all:5"] if way == "mark of an upper" else [])


@pytest.mark.parametrize("way", ID_WAYS)
def test_an_id(way: str, tmp_path: Path) -> None:
    # Where the id is a number already there is nothing to spell.
    spelled = {"1_0", "0x1"} if way in ("api", "hook.toml") else {"1_0", "١"} if way == "flag" else set()
    chosen = {text: good for text, good in IDS.items() if text not in spelled}
    assert [text for text, good in chosen.items() if not agrees(ID_WAYS[way], text, good, tmp_path)] == []


@pytest.mark.parametrize(
    ("host", "size", "good"),
    [("100000", "65536", True), ("4294967294", "1", True), ("4294967290", "6", False), ("4294967295", "1", False),
     ("-1", "5", False), ("١", "5", False), ("1_0", "5", False), ("5", "99999999999", False)],
)  # fmt: skip
def test_a_range_of_subordinate_ids(host: str, size: str, good: bool, tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text(f"ann:{host}:{size}\n")
    assert agrees(lambda _, path: subid_map("ann", "uid", path), "", good, file)
