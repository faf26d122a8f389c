"""`layerkit setup containerd`, and that the protocol modules are those of the .proto files."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT
from typer.testing import CliRunner

from layerkit.cli.main import app
from layerkit.model.errors import UsageError


def run(*words: object) -> Any:
    found = CliRunner().invoke(app(), ["setup", "containerd", *map(str, words)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


@pytest.fixture
def flags(tmp_path: Path) -> list[object]:
    return ["--config", tmp_path / "config.toml", "--unit", tmp_path / "x.service"]


def test_written_and_taken_back(flags: list[object], tmp_path: Path) -> None:
    config, unit = tmp_path / "config.toml", tmp_path / "x.service"
    before = '# mine\nversion = 2\n\n[proxy_plugins.other]\n  type = "snapshot"\n  address = "/run/other.sock"\n'
    config.write_text(before)
    config.chmod(0o640)
    said = json.loads(run(*flags, "--json", "--store", "/srv/lk").stdout)
    assert said["changed"] == [str(config), str(unit)] and said["notes"]
    plugins = tomllib.loads(config.read_text())["proxy_plugins"]
    assert plugins["layerkit"] == {
        "type": "snapshot", "address": "/run/layerkit/snapshotter.sock", "capabilities": ["remap-ids"],
    }  # fmt: skip
    assert plugins["other"]["address"] == "/run/other.sock" and config.read_text().startswith(before)
    assert config.stat().st_mode & 0o777 == 0o640
    start = next(line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
    assert " snapshotter " in start and "--store /srv/lk" in start
    assert json.loads(run(*flags, "--json", "--store", "/srv/lk").stdout)["changed"] == []
    run(*flags, "--address", "/run/new.sock")
    assert tomllib.loads(config.read_text())["proxy_plugins"]["layerkit"]["address"] == "/run/new.sock"
    run(*flags, "--undo")
    assert config.read_text() == before and not unit.exists()


def test_a_new_file_goes_with_undo(flags: list[object], tmp_path: Path) -> None:
    printed = run(*flags, "--print").stdout
    assert "version = 2" in printed and "[Service]" in printed and not (tmp_path / "config.toml").exists()
    run(*flags)
    assert tomllib.loads((tmp_path / "config.toml").read_text())["version"] == 2
    run(*flags, "--undo")
    assert list(tmp_path.iterdir()) == []


def test_containerd_2_unpacks_in_its_daemon(flags: list[object], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("version = 3\n")
    run(*flags)
    [plugin] = tomllib.loads(config.read_text())["plugins"].values()
    assert [each["snapshotter"] for each in plugin["unpack_config"]] == ["overlayfs", "layerkit"]
    run(*flags, "--undo")
    assert config.read_text() == "version = 3\n"


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("version = \n", [], "cannot read it either"),
        ('[proxy_plugins.layerkit]\naddress = "/x"\n', [], "another --name"),
        ('[proxy_plugins.a]\naddress = "/run/layerkit/snapshotter.sock"\n', [], "--root of its own"),
        ("", ["--address", "rel.sock"], "absolute"),
    ],
)
def test_refusals(flags: list[object], tmp_path: Path, text: str, words: list[str], said: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        run(*flags, *words)
    assert (tmp_path / "config.toml").read_text() == text


def test_the_module_is_made_from_the_proto_file(tmp_path: Path) -> None:
    """What protoc makes of the file now describes the same messages; its text differs between versions."""
    protoc = pytest.importorskip("grpc_tools.protoc")
    from google.protobuf import descriptor_pb2

    path = "layerkit/hosts/containerd/messages.proto"
    well_known = Path(protoc.__file__).parent / "_proto"
    words = ["protoc", f"-I{ROOT}", f"-I{well_known}", f"--descriptor_set_out={tmp_path / 'set'}", path]
    assert protoc.main(words) == 0
    made = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file[0]
    module = importlib.import_module("layerkit.hosts.containerd.messages_pb2")
    kept = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    _without_json_names(made.message_type)
    assert kept == made, "run `make proto`"


def _without_json_names(messages: Any) -> None:
    """Take out what protoc writes into a set of descriptors and not into a module."""
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        _without_json_names(message.nested_type)
