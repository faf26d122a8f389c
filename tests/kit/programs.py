"""Programs as a user runs them, ours and others', and waiting for what they do."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

KIT = Path(__file__).resolve().parent
"""Modules and programs that tests share; on the path of every test."""

ROOT = KIT.parents[1]
"""The checkout."""

LAYERKIT = (sys.executable, "-m", "layerkit.cli.main")
"""The words that start our command."""


def command(*words: object) -> list[str]:
    """Return the whole command line of ``layerkit`` with ``words``."""
    return [*LAYERKIT, *map(str, words)]


def run(
    *words: object,
    code: int | None = 0,
    env: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; ``env`` is added to the environment.

    It must end with ``code``; None takes any. Bytes of its output that are no text are kept. The time that it has
    is a bound for what hangs, not a measure.
    """
    done = subprocess.run(
        list(map(str, words)), env={**os.environ, **(env or {})}, stdin=stdin, cwd=cwd, capture_output=True,
        encoding="utf-8", errors="surrogateescape", timeout=300, check=False,
    )  # fmt: skip
    said = f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert code is None or done.returncode == code, said
    return done


def run_layerkit(
    *words: object,
    code: int | None = 0,
    env: Mapping[str, str] | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
) -> subprocess.CompletedProcess[str]:
    """Run our command to its end, as :func:`run` does."""
    return run(*LAYERKIT, *words, code=code, env=env, stdin=stdin)


def answer(*words: object, env: Mapping[str, str] | None = None) -> Any:
    """Return what our command answers to ``--json``."""
    return json.loads(run_layerkit(*words, "--json", env=env).stdout)


class Cli:
    """Our command with a store of a test's own, and more of an environment where given."""

    def __init__(self, store: Path, **env: str) -> None:
        self.env = {"LAYERKIT_STORE": str(store), "COLUMNS": "200", **env}

    def __call__(
        self,
        *words: object,
        code: int | None = 0,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end, as :func:`run` does."""
        return run_layerkit(*words, code=code, env={**self.env, **(env or {})}, stdin=stdin)

    def json(self, *words: object, **env: str) -> Any:
        """Return what it answers to ``--json``."""
        return answer(*words, env={**self.env, **env})

    def refusal(self, *words: object, code: int, **env: str) -> str:
        """Return what it says where it ends with ``code``."""
        return self(*words, code=code, env=env).stderr


def skopeo(*words: object) -> subprocess.CompletedProcess[str]:
    """Run skopeo, which asks no policy; it must succeed."""
    return run("skopeo", "--insecure-policy", *words)


def wait_for(condition: Callable[[], object], what: str = "waited in vain", seconds: float = 120.0) -> None:
    """Return when ``condition`` holds; raise TimeoutError after ``seconds``, a bound for what hangs."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)


def free_port() -> int:
    """Return a port of this machine that nobody listens at.

    It is none of those that the kernel gives to connections: one of them could have it before it is listened at.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, max(first, 20_000)), 1000):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")
