"""A real image: Debian, Python packages and node_modules, then the layers that make images fat.

    python sample-images/app.py [OUT.tar] [--kind oci-archive|docker-archive] [--force]

Made by mmdebstrap and buildah, as root. The layers, bottom first:

1. Debian (Ubuntu on Ubuntu) with python3, from this machine's own apt sources;
2. Python packages in /opt/app/site (wheels from PyPI);
3. node_modules (npm; a generated tree of the same shape where npm is absent);
4. file capabilities, setuid and setgid files, hard links, user xattrs;
5. ``chown -R 1000:1000 /opt/app``: every file once more;
6. ``chmod -R o= /opt/app``: and once more;
7. clean-up that deletes what lower layers hold (whiteouts);
8. ACLs, written here: buildah's layers hold no POSIX ACLs.

What is the same on every build: versions of the Python and node packages, all mtimes (clamped to
``SOURCE_DATE_EPOCH``), the order in the tars, the config. What is not: Debian's packages follow the archive, so a
security update changes layer 1; the gzip bytes follow buildah's version. The same day on the same machine gives
the same diff_ids.

The result is kept in ``$LAYERKIT_TEST_SAMPLE_CACHE`` or ``sample-images/out/`` under a name made from this file, so
an edited recipe is built anew and an unchanged one never twice.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EPOCH = 1_735_689_600  # 2025-01-01
CREATED = "2025-01-01T00:00:00Z"
NAME = "layerkit.example/app:latest"

# Pure Python wheels only: they run on any Python of the base and any machine.
PYTHON_PACKAGES = (
    "asgiref==3.8.1", "certifi==2024.8.30", "charset-normalizer==3.4.0", "django==5.1.4", "idna==3.10",
    "mpmath==1.3.0", "pygments==2.18.0", "requests==2.32.3", "sqlparse==0.5.3", "sympy==1.13.3", "urllib3==2.2.3",
)  # fmt: skip
# Without dependencies of their own, so that the tree is the same on every build.
NODE_PACKAGES = ("lodash@4.17.21", "date-fns@3.6.0")

Run = subprocess.run


def _sources() -> tuple[str, list[Path]]:
    """Return the release of this machine and its apt source files, the distribution's own archive only."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite = release.get("VERSION_CODENAME", "").strip('"')
    if not suite or not Path("/etc/apt").is_dir():
        return "bookworm", []
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    # Other people's archives name another component than main, or a suite of their own.
    one_line = re.compile(rf"deb\s+(\[.*?\]\s+)?\S+\s+{suite}(-updates|-security)?\s+(.*\s)?main\b")
    chosen = []
    for file in files:
        if not file.is_file() or file.suffix not in (".list", ".sources"):
            continue
        text = file.read_text()
        stanzas = re.search(rf"(?m)^Suites:.*\b{suite}\b", text) and re.search(r"(?m)^Components:.*\bmain\b", text)
        if (file.suffix == ".sources" and stanzas) or (
            file.suffix == ".list" and any(one_line.match(line.strip()) for line in text.splitlines())
        ):
            chosen.append(file)
    return suite, chosen


class _Builder:
    """buildah with a storage of its own in a temporary folder; one layer per :meth:`layer`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.command = ["buildah", "--root", str(work / "r"), "--runroot", str(work / "rr")]
        self.image = "scratch"
        self.count = 0
        for driver in ("overlay", "vfs"):
            self.driver = ["--storage-driver", driver]
            done = Run([*self.command, *self.driver, "from", "scratch"], capture_output=True, text=True)
            if done.returncode == 0:
                self._buildah("rm", done.stdout.strip())
                return
            shutil.rmtree(work / "r", ignore_errors=True)
        raise SystemExit(f"buildah cannot make a container here:\n{done.stderr}")

    def _buildah(self, *arguments: str) -> str:
        done = Run([*self.command, *self.driver, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()

    @contextlib.contextmanager
    def layer(self, what: str) -> Iterator[Path]:
        """Yield the root folder to change, then commit the change as one layer."""
        start = time.monotonic()
        name = self._buildah("from", "--pull-never", self.image)
        try:
            root = Path(self._buildah("mount", name))
            yield root
            _clamp(root)
            self._buildah("umount", name)
            self.count += 1
            self.image = f"localhost/layer{self.count}"
            self._buildah("commit", "--quiet", "--format", "oci", name, self.image)
        finally:
            self._buildah("rm", name)
        print(f"  {what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)

    def export(self, layout: Path) -> None:
        self._buildah("push", "--quiet", self.image, f"oci:{layout}:latest")


def _clamp(root: Path) -> None:
    """Set every mtime later than the epoch to it; deepest first, so that folders stay as set."""
    found = subprocess.check_output(["find", root, "-xdev", "-depth", "-newermt", f"@{EPOCH}", "-print0"])
    Run(["xargs", "-0", "-r", "touch", "-h", "-d", f"@{EPOCH}"], input=found, check=True)


def _debian(root: Path) -> None:
    suite, sources = _sources()
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=essential",
        "--include=python3-minimal,python3,iputils-ping",
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--skip=output/dev", suite, "-", *map(str, sources),
    ]  # fmt: skip
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)}
    tar = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    Run(
        ["tar", "-x", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", root], stdin=tar.stdout, check=True
    )
    if tar.wait():
        raise SystemExit("mmdebstrap failed; does apt-get update work on this machine?")
    # What is this machine's and not the image's, or differs from build to build.
    for name in ("etc/resolv.conf", "etc/hostname", "etc/machine-id", "var/cache/ldconfig/aux-cache"):
        (root / name).unlink(missing_ok=True)
    for name in ("var/log", "var/lib/apt/lists", "var/cache/apt"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "var/log").mkdir()
    for file in (root / "etc/apt").glob("sources.list*/*"):
        file.unlink()
    (root / "etc/apt/sources.list").unlink(missing_ok=True)


def _python_packages(root: Path) -> None:
    options = (
        "--quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile "
        "--only-binary=:all: --platform=any --implementation=py --abi=none --python-version=3.11"
    )
    target = root / "opt/app/site"
    Run(
        [sys.executable, "-m", "pip", "install", *options.split(), "--target", target, *PYTHON_PACKAGES], check=True
    )
    (root / "opt/app/main.py").write_text(
        "import sys\nsys.path.insert(0, '/opt/app/site')\nsys.dont_write_bytecode = True\n"
        "import django, requests, sympy\n"
        "print('django', django.__version__, 'requests', requests.__version__, 'sympy', sympy.__version__)\n"
    )


def _node_modules(root: Path) -> None:
    target = root / "opt/app"
    if shutil.which("npm"):
        Run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", target,
             *NODE_PACKAGES],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        return
    for package in range(40):
        folder = target / f"node_modules/package-{package:02d}"
        for part in ("lib", "dist/esm", "dist/cjs", "types"):
            (folder / part).mkdir(parents=True)
            for n in range(30):
                text = f"export const value{n} = {package};\n" * (1 + (package * n) % 200)
                (folder / part / f"module-{n:02d}.js").write_text(text)


def _privileges(root: Path) -> None:
    tools = root / "opt/tools"
    tools.mkdir(mode=0o755)
    true = root / "usr/bin/true"
    for name in ("plain", "setuid", "setgid", "capable"):
        shutil.copy2(true, tools / name)
    os.chown(tools / "setuid", 33, 33)
    (tools / "setuid").chmod(0o4755)
    os.chown(tools / "setgid", 0, 33)
    (tools / "setgid").chmod(0o2755)
    Run(["setcap", "cap_net_bind_service,cap_net_raw+ep", tools / "capable"], check=True)
    Run(["setcap", "cap_net_raw+ep", root / "usr/bin/ping"], check=True)
    for n in range(20):
        (tools / f"link-{n:02d}").hardlink_to(tools / "plain")
    os.setxattr(tools / "plain", b"user.origin", b"copied from /usr/bin/true")
    (root / "srv/drop").mkdir(mode=0o755)
    (root / "srv/drop").chmod(0o3777)
    os.chown(root / "srv/drop", 0, 1000)


def _clean_up(root: Path) -> None:
    shutil.rmtree(root / "usr/share/doc")
    shutil.rmtree(root / "opt/app/site/sympy/physics")
    for file in sorted((root / "opt/app/site").glob("*.dist-info/RECORD")):
        file.unlink()


def _tiny() -> Any:
    spec = importlib.util.spec_from_file_location("sample_tiny", HERE / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _acl_layer() -> bytes:
    tiny = _tiny()
    folder = {b"system.posix_acl_default": tiny.DEFAULT_ACL, b"user.note": b"default ACL"}
    members = [
        tiny.entry(b"srv/shared/", tiny.DIR, mode=0o775, gid=33, mtime=str(EPOCH), xattrs=folder),
        *(
            tiny.entry(b"srv/shared/report-%02d" % n, data=b"shared %d\n" % n, mode=0o664, uid=1000, gid=33,
                       mtime=f"{EPOCH}.{n:09d}", xattrs={b"system.posix_acl_access": tiny.ACCESS_ACL})
            for n in range(50)
        ),
    ]  # fmt: skip
    return b"".join(members) + bytes(1024)


def _with_clamped_times(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            member.mtime = min(member.mtime, EPOCH)
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    return out.getvalue()


def _finish(layout: Path) -> None:
    """Append the ACL layer, and take the time of the build out of the config."""
    blobs = layout / "blobs/sha256"

    def put(data: bytes) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    def take(digest: str) -> Any:
        path = blobs / digest.removeprefix("sha256:")
        value = json.loads(path.read_bytes())
        path.unlink()
        return value

    index = json.loads((layout / "index.json").read_bytes())
    manifest = take(index["manifests"][0]["digest"])
    config = take(manifest["config"]["digest"])
    # The clean-up layer's whiteouts carry the time of the build, out of reach for `touch`.
    tar = _with_clamped_times(gzip.decompress((blobs / manifest["layers"][-1]["digest"][7:]).read_bytes()))
    (blobs / manifest["layers"][-1]["digest"][7:]).unlink()
    manifest["layers"][-1] |= put(gzip.compress(tar, mtime=0))
    config["rootfs"]["diff_ids"][-1] = "sha256:" + hashlib.sha256(tar).hexdigest()
    tar = _acl_layer()
    layer_type = "application/vnd.oci.image.layer.v1.tar+gzip"
    manifest["layers"].append({"mediaType": layer_type, **put(gzip.compress(tar, mtime=0))})
    config["rootfs"]["diff_ids"].append("sha256:" + hashlib.sha256(tar).hexdigest())
    config["created"] = CREATED
    config["config"] = {"Cmd": ["python3", "/opt/app/main.py"], "Env": ["PATH=/usr/bin:/bin"], "User": "1000:1000"}
    steps = ("debian", "python packages", "node_modules", "privileges", "chown -R 1000:1000 /opt/app",
             "chmod -R o= /opt/app", "clean-up", "acls")  # fmt: skip
    config["history"] = [{"created": CREATED, "created_by": step} for step in steps]
    manifest["config"] |= put(json.dumps(config).encode())
    # buildah adds annotations with names of temporary things.
    manifest.pop("annotations", None)
    index["manifests"][0] |= put(json.dumps(manifest).encode())
    (layout / "index.json").write_text(json.dumps(index))


def _pack(layout: Path, dest: Path) -> None:
    """Write the layout as an archive, whole or not at all."""
    temporary = dest.with_name(f".{dest.name}.{os.getpid()}")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(layout.rglob("*")):
            if path.is_file():
                info = tarfile.TarInfo(str(path.relative_to(layout)))
                info.size, info.mtime = path.stat().st_size, EPOCH
                with path.open("rb") as file:
                    tar.addfile(info, file)
    temporary.replace(dest)


def build(dest: Path) -> None:
    """Build the image and write it to ``dest`` as an OCI archive."""
    if os.geteuid() != 0:
        raise SystemExit("the real sample image is built as root (mmdebstrap, setcap); tiny.py needs no root")
    missing = [tool for tool in ("mmdebstrap", "buildah", "setcap", "tar") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}; `make tools` installs them on Debian and Ubuntu")
    print("building the real sample image (once; kept for later runs)", file=sys.stderr, flush=True)
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Not under dest: that may lie on a filesystem where overlay has no upper.
    with tempfile.TemporaryDirectory(prefix="lk-", dir=os.environ.get("TMPDIR", "/tmp")) as folder:
        work = Path(folder)
        builder = _Builder(work)
        for what, step in (
            ("debian", _debian),
            ("python packages", _python_packages),
            ("node_modules", _node_modules),
            ("privileges", _privileges),
            ("chown", lambda root: Run(["chown", "-R", "1000:1000", root / "opt/app"], check=True)),
            ("chmod", lambda root: Run(["chmod", "-R", "o=", root / "opt/app"], check=True)),
            ("clean-up", _clean_up),
        ):
            with builder.layer(what) as root:
                step(root)
        builder.export(work / "layout")
        _finish(work / "layout")
        _pack(work / "layout", dest)
        # buildah's overlay driver keeps a bind mount on its folder, which would stop the removal.
        Run(["umount", "--quiet", work / "r/overlay"], check=False, stderr=subprocess.DEVNULL)


def cached_path(kind: str = "oci-archive") -> Path:
    """Return where the built image is kept; the name follows the recipe's text."""
    recipe = hashlib.sha256((HERE / "app.py").read_bytes() + (HERE / "tiny.py").read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("LAYERKIT_TEST_SAMPLE_CACHE") or HERE / "out")
    suffix = {"oci-archive": "", "docker-archive": "-docker"}[kind]
    return folder / f"app-{recipe}{suffix}.tar"


def ensure(kind: str = "oci-archive") -> Path:
    """Return the image as ``kind``, built only if it is not there yet."""
    path = cached_path(kind)
    if path.exists():
        return path
    if kind == "oci-archive":
        build(path)
        return path
    source = ensure("oci-archive")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    Run(
        ["skopeo", "copy", "--quiet", "--insecure-policy", f"oci-archive:{source}",
         f"docker-archive:{temporary}:{NAME}"],
        check=True,
    )  # fmt: skip
    temporary.replace(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the real sample image.")
    parser.add_argument("dest", type=Path, nargs="?", metavar="OUT", help="a copy of the archive")
    parser.add_argument("--kind", default="oci-archive", choices=("oci-archive", "docker-archive"))
    parser.add_argument("--force", action="store_true", help="build even if it is there")
    args = parser.parse_args()
    if args.force:
        cached_path(args.kind).unlink(missing_ok=True)
    path = ensure(args.kind)
    if args.dest is not None:
        args.dest.parent.mkdir(parents=True, exist_ok=True)
        args.dest.unlink(missing_ok=True)
        try:
            args.dest.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, args.dest)
        path = args.dest
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
