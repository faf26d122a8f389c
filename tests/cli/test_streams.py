"""The command under shells, terminals and pipes that are not as one would wish."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_images import simple

Shell = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Return a runner of shell lines in a folder with the image ``image.tar``; ``layerkit`` is our command."""
    simple("one").archive(tmp_path / "image.tar")
    # Buffered, as for everybody who does not say otherwise: then it is the exit that writes.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}

    def run(line: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
        command = f'layerkit() {{ {shlex.quote(sys.executable)} -m layerkit.cli.main "$@"; }}; {line}'
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, timeout=60, stdin=subprocess.DEVNULL, capture_output=True,
            env={**env, "LAYERKIT_STORE": str(tmp_path / "store"), **variables},
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    "words", ["inspect image.tar", "inspect image.tar --json", "--version", "copy image.tar -"]
)
@pytest.mark.parametrize(("where", "why"), [(">&-", b"Bad file"), (">/dev/full", b"No space")])
def test_output_that_cannot_be_written_is_an_error(shell: Shell, words: str, where: str, why: bytes) -> None:
    done = shell(f"layerkit {words} {where}")
    assert done.returncode == 1
    assert done.stderr.startswith(b"layerkit: " + why)
    assert done.stderr.count(b"\n") == 1


def test_errors_do_not_go_to_standard_output_where_standard_error_is_closed(shell: Shell) -> None:
    done = shell("layerkit inspect absent.tar 2>&-")
    assert (done.returncode, done.stdout) == (1, b"")
    assert shell("layerkit copy image.tar - 2>&- | tar t | head -1").stdout == b"oci-layout\n"


def test_closed_standard_input_is_no_archive(shell: Shell) -> None:
    done = shell("layerkit inspect - <&-")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"layerkit: Bad file descriptor\n"
    assert shell("layerkit inspect image.tar <&-").returncode == 0


def test_nothing_is_said_when_the_reader_of_the_output_goes_away(shell: Shell) -> None:
    for words in ("inspect image.tar", "inspect image.tar --json", "inspect --help", "copy image.tar -"):
        done = shell(f"layerkit {words} | head -c 1 | wc -c")
        assert (done.stdout, [line for line in done.stderr.splitlines() if b"rror" in line]) == (b"1\n", [])


def test_paths_that_are_no_utf8_are_shown_where_standard_output_is_strict(shell: Shell) -> None:
    # What every locale of a language has; only C, POSIX and C.UTF-8 let such bytes through.
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    made = shell("mv image.tar $'i\\xff.tar' && layerkit unpack $'i\\xff.tar' $'r\\xff'", **strict)
    assert made.returncode == 0, made.stderr
    assert rb"/r\xff" in made.stdout
    for words in ("inspect", "verify", "analyze"):
        done = shell(f"layerkit {words} $'i\\xff.tar'", **strict)
        assert done.returncode == 0, done.stderr
        assert rb"i\xff" in done.stdout
    packed = shell("touch $'r\\xff/n\\xff' && layerkit pack $'r\\xff' $'p\\xff.tar' --base $'i\\xff.tar'", **strict)
    assert packed.returncode == 0, packed.stderr
    assert rb"p\xff.tar" in packed.stdout


def test_characters_that_an_encoding_lacks_do_not_stop_a_table(shell: Shell) -> None:
    done = shell("layerkit inspect image.tar", PYTHONIOENCODING="latin-1", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, b"")
