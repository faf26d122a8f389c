"""The lines of storage.conf: put in, taken out, and what cannot go with them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerkit.cli.main import app
from layerkit.hosts.podman import storage_conf as sc
from layerkit.model.errors import UsageError

PROGRAM = Path("/opt/bin/layerkit-mount-program")
FILES = {
    "none": "",
    "plain": '[storage]\ndriver = "overlay"\ngraphroot = "/x" # mine\n',
    "no driver": '# a comment\n[storage]\nrunroot = "/r"\n[storage.options]\nsize = ""\n',
    "fuse-overlayfs": '[storage]\ndriver="overlay"\n[storage.options.overlay] # here\n'
    '  mount_program = "/usr/bin/fuse-overlayfs"\n',
    "no end of line": '[storage]\ndriver = "overlay"',
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_in_and_out(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c/storage.conf"
    if text:
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o640)
    assert sc.add(path, PROGRAM).apply()
    found = tomllib.loads(path.read_text())["storage"]
    assert found["driver"] == "overlay"
    assert found["options"]["overlay"]["mount_program"] == str(PROGRAM)
    once = path.read_text()
    assert not sc.add(path, PROGRAM).apply(), "a second time changes nothing"
    assert path.read_text() == once
    assert sc.remove(path).apply()
    if text:
        assert path.read_text().rstrip("\n") == text.rstrip("\n")
        assert path.stat().st_mode & 0o777 == 0o640
    else:
        assert not path.exists()
    assert not sc.remove(path).apply()


def test_no_link_that_lies_beside_it_is_written_through(tmp_path: Path) -> None:
    path, victim = tmp_path / "storage.conf", tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".storage.conf.layerkit").symlink_to(victim)
    assert sc.add(path, PROGRAM).apply()
    assert victim.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".storage.conf.layerkit", "storage.conf", "victim"]


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    path = tmp_path / "storage.conf"
    path.write_text('[storage]\ndriver = "overlay"\n[storage.options.overlay]\nmountopt = "nodev,metacopy=on"\n')
    assert sc.add(path, PROGRAM).notes == (f"{path}: mountopt metacopy=on has no effect with a mount program",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[storage]\ndriver = "vfs"\n', "driver = 'vfs'"),
        ('[storage]\ndriver = "overlay"\n[storage.options.overlay]\nforce_mask = "shared"\n', "force_mask"),
        ("[storage\n", "podman cannot read it either"),
    ],
)
def test_what_cannot_go_with_it(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "storage.conf"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        sc.add(path, PROGRAM)
    assert path.read_text() == text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "storage.conf"
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(path))
    (tmp_path / "layerkit-mount-program").write_text("#!/bin/sh\n")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "layerkit")])
    shown = CliRunner().invoke(app(), ["setup", "podman", "--print"])
    assert shown.exit_code == 0 and not path.exists()
    assert f'mount_program = "{tmp_path}/layerkit-mount-program"' in shown.stdout
    assert CliRunner().invoke(app(), ["setup", "podman"]).exit_code == 0
    assert "layerkit-mount-program" in path.read_text()
    done = CliRunner().invoke(app(), ["setup", "podman", "--undo", "--json"])
    assert '"changed": true' in done.stdout and not path.exists()
