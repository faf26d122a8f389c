"""Build the container image of layerkit, by layerkit: no docker, no registry, nothing pulled.

    python packaging/image/build.py [OUT.tar] [--flat] [--cache DIR]

As root on Debian or Ubuntu, with mmdebstrap. What happens:

1. mmdebstrap makes a Debian with python3 from this machine's own apt sources (kept in ``--cache``);
2. ``layerkit pack`` makes it the first layer of an image that had none;
3. the wheel of this checkout and its dependencies (``constraints.txt``, wheels only) are installed into it, for the
   image's Python, and compiled;
4. ``layerkit pack`` makes that the second layer;
5. ``layerkit optimize --keep-base`` writes the result, so that a new version of layerkit is one new layer and
   no more; with ``--flat`` ``layerkit flatten`` makes one layer of both.

Every time stamp is clamped to ``SOURCE_DATE_EPOCH`` (2025-01-01 without it): the same checkout, constraints and
Debian packages give the same digest. Debian's packages follow the archive, so a security update changes layer 1.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build/image"
EPOCH = 1_735_689_600  # 2025-01-01
EXTRAS = "hook,fleet,sign"
USER = 65532
FOLDERS = ("var/lib/layerkit", "var/lib/layerkit-hook")
"""The store and the queue: where volumes belong, since all else may be read-only."""
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = "python3,ca-certificates"
WITHOUT = ("man", "locale", "doc", "info", "lintian")

LAUNCHER = """#!/usr/bin/python3
from layerkit.cli.main import run

run()
"""


def _run(
    *words: str | Path, env: dict[str, str] | None = None, stdout: int | None = None
) -> subprocess.CompletedProcess[str]:
    # What commands say is not the result of this one, which alone goes to standard output.
    out = sys.stderr.fileno() if stdout is None else stdout
    return subprocess.run([*map(str, words)], check=True, text=True, env=env, stdout=out)


def _sample() -> Any:
    """Load the recipe of the sample image: it knows this machine's apt sources, and how time stamps are clamped."""
    spec = importlib.util.spec_from_file_location("sample_app", ROOT / "sample-images/app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing() -> list[str]:
    """Return what this machine lacks for a build, in words."""
    lacks = [name for name in ("mmdebstrap", "tar", "chroot") if shutil.which(name) is None]
    if os.geteuid() != 0:
        lacks.append("root")
    if platform.machine() not in MACHINES:
        lacks.append(f"a machine of these: {', '.join(MACHINES)}")
    return lacks


def base_tar(cache: Path, epoch: int) -> Path:
    """Return the tar of the Debian with python3, made once for each recipe and list of sources."""
    suite, sources = _sample()._sources()
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=essential", f"--include={PACKAGES}",
        *(f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in WITHOUT),
        "--skip=output/dev", suite,
    ]  # fmt: skip
    recipe = [*command, str(epoch), *(file.read_text() for file in sources)]
    path = cache / f"base-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}.tar"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part.tar")
        try:
            _run(*command, part, *sources, env=os.environ | {"SOURCE_DATE_EPOCH": str(epoch)})
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def unpack_base(tar: Path, root: Path) -> None:
    """Unpack the base and take out what is this machine's, or differs from build to build."""
    root.mkdir()
    _run("tar", "-x", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", root, "-f", tar)
    for name in ("etc/resolv.conf", "etc/hostname", "etc/machine-id", "var/cache/ldconfig/aux-cache"):
        (root / name).unlink(missing_ok=True)
    for name in ("var/log", "var/lib/apt/lists", "var/cache/apt", "tmp"):
        for left in (root / name).iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def scratch(folder: Path, config: dict[str, Any], created: str) -> None:
    """Write an OCI layout with an image without layers: all that ``layerkit pack`` needs to begin with."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(kind: str, document: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    described = put("config.v1+json", {
        "architecture": MACHINES[platform.machine()], "os": "linux", "created": created, "config": config,
        "rootfs": {"type": "layers", "diff_ids": []}, "history": [],
    })  # fmt: skip
    manifest = put("manifest.v1+json", {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": described,
        "layers": [],
    })  # fmt: skip
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    listed = manifest | {"annotations": {"org.opencontainers.image.ref.name": "scratch"}}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [listed]}))


def config_of(version: str, suite: str) -> dict[str, Any]:
    """Return the config of containers of the image."""
    return {
        "User": f"{USER}:{USER}",
        "Entrypoint": ["layerkit"],
        "Cmd": ["--help"],
        "WorkingDir": "/var/lib/layerkit",
        "Env": [
            "PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/var/lib/layerkit", "LAYERKIT_STORE=/var/lib/layerkit",
            "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1",
        ],
        "Labels": {
            "org.opencontainers.image.title": "layerkit",
            "org.opencontainers.image.description":
                "Change who owns files in container images by writing metadata only",
            "org.opencontainers.image.version": version,
            "org.opencontainers.image.licenses": "Apache-2.0",
            "org.opencontainers.image.base.name": f"debian:{suite}",
        },
    }  # fmt: skip


def install(root: Path, work: Path, epoch: int) -> str:
    """Install this checkout and what it needs into ``root``, for its Python; return the version."""
    # The Python of the image, which need not be the one that runs this.
    python = (root / "usr/bin/python3").readlink().name
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0"}
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
    _run(*pip, "wheel", "--no-deps", "--wheel-dir", work, ROOT, env=environment)
    (wheel,) = work.glob("layerkit-*.whl")
    target = root / f"usr/local/lib/{python}/dist-packages"
    locked = HERE / "constraints.txt"
    # All that the image holds is in there. pip would look for what the Python that runs it depends on, whatever
    # version it is told to fetch; so that is only for a new list, and for a Python as new as the image's.
    wanted = ("--no-deps", "--requirement", locked, wheel) if locked.exists() else (f"{wheel}[{EXTRAS}]",)
    _run(
        *pip, "install", "--no-compile", "--target", target, "--python-version", python.removeprefix("python"),
        "--implementation", "cp", "--only-binary=:all:", "--upgrade", "--root-user-action=ignore", *wanted,
        env=environment,
    )  # fmt: skip
    _tidy(target)
    _run(
        "chroot", root, "/usr/bin/python3", "-m", "compileall", "-q", "-j", "1", "--invalidation-mode",
        "unchecked-hash", "/" + str(target.relative_to(root)), env=environment | {"PATH": PATH},
    )  # fmt: skip
    launcher = root / "usr/local/bin/layerkit"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    for name, line in (
        ("passwd", f"layerkit:x:{USER}:{USER}:layerkit:/var/lib/layerkit:/usr/sbin/nologin\n"),
        ("group", f"layerkit:x:{USER}:\n"),
    ):
        with (root / "etc" / name).open("a") as file:
            file.write(line)
    for folder in FOLDERS:
        (root / folder).mkdir()
        os.chown(root / folder, USER, USER)
        (root / folder).chmod(0o700)
    return wheel.name.split("-")[1]


def _tidy(target: Path) -> None:
    """Take out what runs nowhere, or names this machine, and what the lists of files then say too much of."""
    shutil.rmtree(target / "bin", ignore_errors=True)  # their first line names the Python that ran pip
    for tests in sorted(target.glob("**/tests")):
        shutil.rmtree(tests, ignore_errors=True)
    for record in target.glob("*.dist-info/RECORD"):
        (record.parent / "direct_url.json").unlink(missing_ok=True)
        lines = record.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line[0] == '"' or (target / line.split(",")[0]).exists()]
        record.write_text("".join(kept))


def build(dest: Path, *, flat: bool = False, cache: Path = CACHE) -> dict[str, Any]:
    """Write the image as an OCI archive to ``dest``.

    Args:
        dest: a file, replaced if it is there.
        flat: one layer instead of two.
        cache: folder that keeps the base.

    Returns:
        What the last command of layerkit reports, and ``version``.

    Raises:
        SystemExit: this machine lacks something.
        subprocess.CalledProcessError: a command failed; what it said is on standard error.
    """
    if lacks := missing():
        raise SystemExit(f"cannot build an image here: needs {', '.join(lacks)}")
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or EPOCH)
    sample = _sample()
    sample.EPOCH = epoch
    tar = base_tar(cache, epoch)
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch)}
    with tempfile.TemporaryDirectory(prefix="lk-image-", dir=cache) as folder:
        work = Path(folder)
        root, layout = work / "root", f"oci:{work}/layout"
        layerkit = (sys.executable, "-m", "layerkit.cli.main")
        store = ("--store", work / "store", "--quiet")

        unpack_base(tar, root)
        sample._clamp(root)
        # The version is known only when the wheel is there; config and layers are one image's, so ask before.
        version = _version()
        created = datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        scratch(work / "scratch", config_of(version, sample._sources()[0]), created)
        words: list[str | Path] = ["pack", root, f"{layout}:base", "--base", f"oci:{work}/scratch:scratch"]
        _run(*layerkit, *words, "--message", f"Debian with {PACKAGES}", *store, env=environment)

        built = install(root, work, epoch)
        if built != version:
            raise SystemExit(f"the wheel is of version {built}, pyproject.toml says {version}")
        sample._clamp(root)
        words = ["pack", root, f"{layout}:app", "--base", f"{layout}:base", "--message", f"layerkit {version}"]
        _run(*layerkit, *words, *store, env=environment)

        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.unlink(missing_ok=True)
        last = ["flatten"] if flat else ["optimize", "--keep-base", f"{layout}:base"]
        to = f"oci-archive:{dest}:layerkit:{version}"
        done = _run(
            *layerkit, *last, f"{layout}:app", to, "--json", *store, env=environment, stdout=subprocess.PIPE
        )
    return {**json.loads(done.stdout), "version": version}


def _version() -> str:
    import tomllib

    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def main() -> int:
    """Build the image that the command line asks for."""
    parser = argparse.ArgumentParser(description="Build the container image of layerkit by layerkit.")
    parser.add_argument("dest", type=Path, nargs="?", default=CACHE / "layerkit.tar", metavar="OUT.tar")
    parser.add_argument("--flat", action="store_true", help="one layer instead of two")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="keeps the base [build/image]")
    args = parser.parse_args()
    report = build(args.dest, flat=args.flat, cache=args.cache)
    sys.stdout.write(json.dumps({"file": str(args.dest), **report}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
