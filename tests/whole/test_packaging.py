"""What packaging/ ships is what runs: the files themselves, with paths and ports put in, before real tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hook_service import TOKEN, hook_process
from needs import need_root, need_tool
from programs import ROOT, free_port, wait_for
from pushed_images import artifacts, map_of, push
from registry_server import certificate, docker_registry

PACKAGING = ROOT / "packaging"
MANIFESTS = ("hook.yaml", "batch.yaml", "dask.yaml")
LAYERKIT = [sys.executable, "-m", "layerkit.cli.main"]
MAP = "uid=0:100000:65536;gid=0:100000:65536"


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((PACKAGING / "kubernetes" / name).read_text()))


def _everything() -> list[dict[str, Any]]:
    return [each for name in (*MANIFESTS, "servicemonitor.yaml") for each in _documents(name)]


def _one(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in _everything() if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def _pods() -> dict[str, dict[str, Any]]:
    """The pod templates of the manifests by the name of what makes them."""
    return {d["metadata"]["name"]: d["spec"]["template"] for d in _everything() if "template" in d.get("spec", {})}


def _container(name: str) -> dict[str, Any]:
    container: dict[str, Any] = _pods()[name]["spec"]["containers"][0]
    return container


# --- Kubernetes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_kubernetes_reads(name: str) -> None:
    """Every field is known to the API's own schemas, of its oldest release here and of its newest."""
    import kubernetes_validate

    for version in ("1.29", kubernetes_validate.latest_version()):
        for document in _documents(name):
            kubernetes_validate.validate(document, version, strict=True)
    document["spec"]["podSelectr"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, version, strict=True)


def test_pods_run_without_privileges_or_a_writable_root() -> None:
    assert set(_pods()) == {
        "layerkit-hook", "layerkit-batch", "layerkit-scheduler", "layerkit-workers", "layerkit-dask-batch",
    }  # fmt: skip
    for name, pod in _pods().items():
        spec = pod["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 65532, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert "memory" in each["resources"]["limits"] and ":" in each["image"], name


def test_manifests_agree_with_each_other() -> None:
    """What one names another makes: volumes, config maps, labels, ports, and the Secrets that the docs create."""
    docs = (PACKAGING.parent / "docs/deployment.md").read_text()
    made = {d["metadata"]["name"] for d in _everything() if d["kind"] == "ConfigMap"}
    for name, pod in _pods().items():
        spec = pod["spec"]
        claims = [c["metadata"] for d in _everything() for c in d.get("spec", {}).get("volumeClaimTemplates", [])]
        volumes = {v["name"] for v in (*spec["volumes"], *(claims if name == "layerkit-hook" else ()))}
        assert {m["name"] for c in spec["containers"] for m in c["volumeMounts"]} == volumes, name
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in made
            if "secret" in volume:
                assert volume["secret"]["secretName"] in docs
                assert volume["secret"]["defaultMode"] & 0o007 == 0, "the hook refuses a token that all may read"
    labels = [pod["metadata"]["labels"] for pod in _pods().values()]
    for document in _everything():
        if document["kind"] == "Service":
            assert any(document["spec"]["selector"].items() <= each.items() for each in labels)
        selector = document.get("spec", {}).get("selector", {})
        if "template" in document.get("spec", {}) and selector:
            assert selector["matchLabels"] == document["spec"]["template"]["metadata"]["labels"]
    (endpoint,) = _one("ServiceMonitor", "layerkit-hook")["spec"]["endpoints"]
    service = _one("Service", "layerkit-hook")
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert (
        _one("ServiceMonitor", "layerkit-hook")["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    )
    job = _one("Job", "layerkit-batch")["spec"]
    assert job["completions"] == int(_option(_container("layerkit-batch")["args"], "--shard").split("/")[1])


def _option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("name", sorted(_pods()))
def test_no_flag_is_made_up(name: str) -> None:
    """The command lines are parsed by the programs themselves, and each flag is in what they say of themselves."""
    container = _container(name)
    program = [sys.executable if word == "python3" else word for word in container.get("command", LAYERKIT)]

    def said(code: int, *more: str) -> str:
        words = [*program, *container["args"], *more, "--help"]
        # Wide, so that no name of a flag is cut.
        wide = os.environ | {"COLUMNS": "200"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=wide)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    known = set(re.findall(r"--[a-z-]+", said(0)))
    assert {word for word in container["args"] if word.startswith("--")} <= known
    if program == LAYERKIT:  # dask takes any flag there is for a preload
        said(2, "--made-up")


def _settings(folder: Path, config_map: str, host: str, *replace: tuple[str, str]) -> Path:
    """Write hook.toml of a config map into ``folder``, for a registry of the tests."""
    text = _one("ConfigMap", config_map)["data"]["hook.toml"]
    text = text.replace('host = "registry.registry.svc.cluster.local:5000"', f'host = "{host}"\ntls_verify = false')
    (folder / "auth").mkdir(exist_ok=True)
    (folder / "auth/.dockerconfigjson").write_text('{"auths": {}}')
    for old, new in (
        ("/var/lib/", f"{folder}/"), ("/run/secrets/registry", f"{folder}/auth"),
        ("/run/secrets/layerkit/token", f"{folder}/token"), *replace,
    ):  # fmt: skip
        assert old in text or old.endswith("token"), old
        text = text.replace(old, new)
    path = folder / "hook.toml"
    path.write_text(text)
    return path


def test_the_hook_of_the_manifest_serves_and_its_probes_answer(tmp_path: Path) -> None:
    import urllib.request

    with docker_registry(tmp_path / "registry") as registry:
        listen = ("0.0.0.0:8765", "127.0.0.1:0")
        config = _settings(tmp_path, "layerkit-hook", registry.host, listen)
        (tmp_path / "token").write_text(TOKEN)
        (tmp_path / "token").chmod(0o440)
        words = _container("layerkit-hook")["args"][1:]
        assert words == ["serve", "--config", "/etc/layerkit/hook.toml"]
        with hook_process(config, *words[:1], log=tmp_path / "log") as (_, url):
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                path = _container("layerkit-hook")[probe]["httpGet"]["path"]
                wait_for(lambda path=path: urllib.request.urlopen(url + path, timeout=10).status == 200)  # type: ignore[misc]


def test_the_shards_of_the_indexed_job_do_all_images(tmp_path: Path) -> None:
    """The Job's own command line, for each index, as Kubernetes puts that in: together they do every image."""
    with docker_registry(tmp_path / "registry") as registry:
        pushed = [push(registry.host, number) for number in range(4)]
        config = _settings(tmp_path, "layerkit-hook", registry.host)
        images = tmp_path / "images.txt"
        images.write_text("# all\n" + "".join(f"{registry.ref(each.name)}:v1\n" for each in pushed))
        pods = []
        for index in range(2):
            words = [
                word.replace("$(JOB_COMPLETION_INDEX)/16", f"{index}/2")
                .replace("/etc/layerkit-images/images.txt", str(images))
                .replace("/etc/layerkit/hook.toml", str(config))
                for word in _container("layerkit-batch")["args"]
            ]
            # Together, as the Job starts its pods, each with a disk of its own.
            words += ["--store", str(tmp_path / f"store{index}"), "--state", str(tmp_path / f"state{index}")]
            pods.append(
                subprocess.Popen([*LAYERKIT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        counts = []
        for index, pod in enumerate(pods):
            out, err = pod.communicate(timeout=180)
            assert pod.returncode == 0, err
            report = json.loads(out)
            assert (report["shard"], report["shards"], report["failed"]) == (index, 2, [])
            counts.append(report["images"])
        assert sum(counts) == len(pushed)
        for each in pushed:
            assert [map_of(document) for document in artifacts(registry.host, each)] == [MAP]


def test_the_dask_variant_does_its_images_over_tls(tmp_path: Path) -> None:
    """Scheduler, worker and driver with the manifests' own words; a client without a certificate gets nowhere."""
    need_tool("openssl")
    cert, key = certificate(tmp_path, "dask")
    for source, name in ((cert, "ca.crt"), (cert, "tls.crt"), (key, "tls.key")):
        shutil.copy(source, tmp_path / name)
    port = free_port()

    def words(name: str) -> list[str]:
        container = _container(name)
        changed = [
            word.replace("/run/secrets/dask", str(tmp_path)).replace("layerkit-scheduler:8786", f"127.0.0.1:{port}")
            for word in container["args"]
        ]
        for flag, value in (
            ("--port", str(port)), ("--local-directory", str(tmp_path / "dask")), ("--nworkers", "1"),
            ("--worker-port", "0"), ("--nanny-port", "0"),
        ):  # fmt: skip
            if flag in changed:
                changed[changed.index(flag) + 1] = value
        return [sys.executable, *container["command"][1:], *changed, "--host", "127.0.0.1"]

    with ExitStack() as stack:
        for name in ("layerkit-scheduler", "layerkit-workers"):
            stack.enter_context(_running(words(name), tmp_path / f"{name}.log"))
        registry = stack.enter_context(docker_registry(tmp_path / "registry"))
        each = push(registry.host, 1)
        (tmp_path / "images.txt").write_text(f"{registry.ref(each.name)}:v1\n")
        wait_for(lambda: "Register" in (tmp_path / "layerkit-scheduler.log").read_text())
        config = _settings(
            tmp_path, "layerkit-dask", registry.host, ("/run/secrets/dask", str(tmp_path)),
            ("layerkit-scheduler:8786", f"127.0.0.1:{port}"),
        )  # fmt: skip
        driver = [
            word.replace("/etc/layerkit-images", str(tmp_path)).replace("/etc/layerkit/hook.toml", str(config))
            for word in _container("layerkit-dask-batch")["args"]
        ]
        done = subprocess.run([*LAYERKIT, *driver], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [map_of(document) for document in artifacts(registry.host, each)] == [MAP]


@contextmanager
def _running(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


# --- compose -------------------------------------------------------------------------------------------------


def test_a_push_to_the_registry_of_the_compose_file_is_remapped(tmp_path: Path) -> None:
    """Its three files, with paths and ports of this machine: a registry that tells, and the hook that hears it."""
    compose = yaml.safe_load((PACKAGING / "compose/compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (PACKAGING / "compose" / source).is_file() or source in compose["volumes"], volume
    assert services["hook"]["user"] == "65532:65532"
    assert services["hook"]["command"] == ["hook", "serve", "--config", "/etc/layerkit/hook.toml"]

    port = free_port()
    told = services["registry"]["environment"]["REGISTRY_NOTIFICATIONS_ENDPOINTS"]
    told = re.sub(r"\$\{LAYERKIT_HOOK_TOKEN:\?[^}]*\}", TOKEN, told).replace("hook:8765", f"127.0.0.1:{port}")
    assert "$" not in told
    text = (PACKAGING / "compose/registry.yml").read_text()
    with _registry(tmp_path, text, told) as host:
        (tmp_path / "token").write_text(TOKEN)
        (tmp_path / "token").chmod(0o400)
        toml = (PACKAGING / "compose/hook.toml").read_text()
        for old, new in (
            ("0.0.0.0:8765", f"127.0.0.1:{port}"), ("/var/lib/", f"{tmp_path}/"), ("registry:5000", host),
            ("/run/secrets/layerkit-token", str(tmp_path / "token")),
        ):  # fmt: skip
            assert old in toml
            toml = toml.replace(old, new)
        (tmp_path / "hook.toml").write_text(toml)
        with hook_process(tmp_path / "hook.toml", log=tmp_path / "log"):
            pushed = push(host, 1)
            wait_for(lambda: artifacts(host, pushed))
            assert [map_of(document) for document in artifacts(host, pushed)] == [MAP]


@contextmanager
def _registry(folder: Path, text: str, endpoints: str) -> Iterator[str]:
    """Run docker-registry with ``text`` as its configuration, and what the compose file sets besides."""
    need_tool("docker-registry")
    port = free_port()
    for old, new in (("/var/lib/registry", f"{folder}/registry"), ("0.0.0.0:5000", f"127.0.0.1:{port}")):
        assert old in text
        text = text.replace(old, new)
    (folder / "registry.yml").write_text(text)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OTEL_TRACES_EXPORTER": "none"}
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", folder / "registry.yml"], stdout=log, stderr=log,
            env=environment | {"REGISTRY_NOTIFICATIONS_ENDPOINTS": endpoints},
        )  # fmt: skip
        try:
            wait_for(lambda: _speaks(process, port))
            yield f"localhost:{port}"
        finally:
            process.terminate()
            process.wait(10)


def _speaks(process: subprocess.Popen[bytes], port: int) -> bool:
    import socket

    assert process.poll() is None, "docker-registry ended"
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


# --- systemd -------------------------------------------------------------------------------------------------


def _unit(name: str, folder: Path) -> Path:
    """Write a unit with a program that is there, which systemd asks for."""
    path = folder / name
    text = (PACKAGING / "systemd" / name).read_text()
    assert "/usr/local/bin/layerkit " in text
    path.write_text(text.replace("/usr/local/bin/layerkit ", "/usr/bin/true "))
    return path


def _lines(name: str, key: str) -> list[str]:
    text = (PACKAGING / "systemd" / name).read_text()
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


@pytest.mark.parametrize(("name", "most"), [("layerkit-hook.service", 1.5), ("layerkit-snapshotter.service", 6.0)])
def test_systemd_takes_the_units_and_finds_them_hardened(name: str, most: float, tmp_path: Path) -> None:
    """``most`` is of systemd's own measure: 0 is without any right, 10 is a service without a line about it."""
    need_tool("systemd-analyze")
    unit = _unit(name, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
    words = ["systemd-analyze", "security", "--offline=yes", f"--threshold={int(most * 10)}", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["layerkit-hook.service", "layerkit-snapshotter.service"])
def test_the_units_start_what_layerkit_knows(name: str) -> None:
    (start,) = _lines(name, "ExecStart")
    done = subprocess.run([*LAYERKIT, *start.split()[1:], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _allowed(filters: list[str]) -> set[str]:
    """The system calls that lines of ``SystemCallFilter=`` leave, by what systemd itself says of its sets."""
    said = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    sets: dict[str, list[str]] = {}
    for line in said.splitlines():
        if line.startswith("@"):
            members = sets.setdefault(line.strip(), [])
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())

    def expand(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        return {each for member in sets[name] for each in expand(member)}

    allowed: set[str] = set()
    for line in filters:
        named = {call for word in line.removeprefix("~").split() for call in expand(word)}
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


def test_the_hook_does_its_work_with_what_the_unit_leaves_it(tmp_path: Path) -> None:
    """No capability, no new privileges, no writable code: an image is remapped, by allowed system calls."""
    need_root()
    need_tool("systemd-analyze", "strace", "setpriv")
    allowed = _allowed(_lines("layerkit-hook.service", "SystemCallFilter"))
    assert "mount" not in allowed and "openat" in allowed
    # PR_SET_MDWE (prctl(2), Linux 6.3) is what MemoryDenyWriteExecute= amounts to.
    inside = "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    with docker_registry(tmp_path / "registry") as registry:
        pushed = push(registry.host, 1)
        done = subprocess.run(
            [
                *("strace", "-f", "--summary-only", "-U", "name,calls", "-o", str(tmp_path / "calls")),
                *("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
                *(sys.executable, "-c", inside, *LAYERKIT, "hook", "run", f"{registry.ref(pushed.name)}:v1"),
                *("--tls-verify=false", "--uid-map", "0:100000:65536", "--workers", "1"),
                *("--store", str(tmp_path / "store"), "--state", str(tmp_path / "state")),
            ],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(artifacts(registry.host, pushed)) == 1
    rows = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    used = {row[0] for row in rows if len(row) == 2 and row[1].isdigit()} - {"total"}
    assert {"openat", "connect", "execve"} <= used
    # Those of setpriv, before it is the service's process.
    assert used - allowed - {"capset", "prctl"} == set()


def test_the_snapshotter_serves_containerd_with_what_the_unit_leaves_it(tmp_path: Path) -> None:
    """Our test of two maps by containerd, the snapshotter with the unit's capabilities and system calls."""
    need_root()
    need_tool("systemd-analyze", "strace", "setpriv", "containerd", "ctr", "runc")
    (line,) = _lines("layerkit-snapshotter.service", "CapabilityBoundingSet")
    kept = ",".join(word.lower().replace("cap_", "+") for word in line.split())
    real, calls = shutil.which("setpriv"), tmp_path / "calls"
    # The tests start daemons by setpriv: one before it in PATH sees which of them is the snapshotter.
    wrapper = tmp_path / "bin/setpriv"
    wrapper.parent.mkdir()
    wrapper.write_text(f"""#!/bin/sh
case "$*" in
*snapshotter*--address*)
    exec strace -D -f --summary-only -U name,calls -o {calls} \\
        {real} --bounding-set=-all,{kept} --no-new-privs "$@" ;;
*) exec {real} "$@" ;;
esac
""")
    wrapper.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    tests = ROOT / "tests/hosts/containerd/test_run.py"
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path}/pytest",
        "-k",
        "two_maps and added",
        str(tests),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, timeout=300, check=False,
        cwd=PACKAGING.parent, env=environment | {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:]
    wait_for(calls.exists)
    wait_for(lambda: "total" in calls.read_text())
    rows = [line.split() for line in calls.read_text().splitlines()]
    used = {row[0] for row in rows if len(row) == 2 and row[1].isdigit()} - {"total"}
    assert {"openat", "fsopen"} <= used
    assert used - _allowed(_lines("layerkit-snapshotter.service", "SystemCallFilter")) == set()


# --- the image -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_root()
    need_tool("mmdebstrap", "skopeo")
    if built := os.environ.get("LAYERKIT_IMAGE"):  # one that is there already
        return Path(built)
    archive: Path = tmp_path_factory.mktemp("image") / "layerkit.tar"
    _build(archive)
    return archive


def _build(archive: Path) -> dict[str, Any]:
    words = [sys.executable, str(PACKAGING / "image/build.py"), str(archive)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _inspect(archive: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        ["skopeo", "inspect", *more, f"oci-archive:{archive}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.timeout(900)
def test_the_image_runs_as_nobody_with_a_read_only_root(image: Path) -> None:
    from engines import podman, podman_run

    need_tool("podman")
    config = _inspect(image, "--config")["config"]
    assert config["Entrypoint"] == ["layerkit"] and config["User"] == "65532:65532"
    assert config["Labels"]["org.opencontainers.image.title"] == "layerkit"
    with podman() as engine:
        name = engine("load", "--quiet", "--input", image).split(": ", 1)[1].strip()

        def inside(*words: str, code: int = 0) -> str:
            hardened = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--tmpfs", "/tmp")
            more = ("--security-opt", "no-new-privileges")
            said: str = engine(*podman_run(*hardened, *more, *words), code=code)
            return said

        version = config["Labels"]["org.opencontainers.image.version"]
        assert inside(name, "--version").strip() == f"layerkit {version}"
        assert "--config" in inside(name, "hook", "serve", "--help")
        assert "--shard" in inside(name, "batch", "--help")
        assert inside("--entrypoint", "id", name, "-u").strip() == "65532"
        for module in ("distributed.cli.dask_scheduler", "distributed.cli.dask_worker"):
            assert "--tls-ca-file" in inside("--entrypoint", "python3", name, "-m", module, "--help")
        inside("--entrypoint", "touch", name, "/tmp/x")
        for place in ("/var/lib/layerkit/x", "/usr/local/bin/x"):
            inside("--entrypoint", "touch", name, place, code=1)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not (os.environ.get("LAYERKIT_TEST_BUILD_TWICE") or os.environ.get("CI")),
    reason="long: LAYERKIT_TEST_BUILD_TWICE=1 runs it",
)
def test_the_same_checkout_gives_the_same_image(image: Path, tmp_path: Path) -> None:
    time.sleep(2)  # so that no clock says the same
    _build(tmp_path / "again.tar")
    assert _inspect(image)["Digest"] == _inspect(tmp_path / "again.tar")["Digest"]
