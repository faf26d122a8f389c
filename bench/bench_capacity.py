"""What images of a registry cost: processor time, requests, and bytes in the registry, for docs/capacity.md.

A real docker-registry, and ``layerkit batch`` as a process of its own. Three kinds of image: *small* (three layers
of a few files, shared between images: what an image costs before its content counts), *whole* (the real sample
image, none of whose layers were seen before) and *build* (the same and one small layer more: a new build of what is
known). Requests go through a counting proxy in this process, so processor time, which is batch's and its workers'
alone, is right, and wall time would not be; none is reported.

    python bench/bench_capacity.py            # prints the rows
    python bench/bench_capacity.py --write    # and writes the tables of docs/capacity.md
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
PAGE = HERE.parent / "docs/capacity.md"
BEGIN, END = "<!-- BEGIN measured: python bench/bench_capacity.py --write -->", "<!-- END measured -->"

SMALL, BUILDS = 40, 8
MAP_A, MAP_B, MAP_C, MAP_D = (f"0:{first}:65536" for first in (100_000, 300_000, 500_000, 700_000))
MIX = (("build", 0.9), ("whole", 0.1))
"""Of every ten images of a registry nine are builds of what is known, one brings layers of its own."""


@dataclass
class Cost:
    """What one image costs, the mean of a pass.

    Attributes:
        cpu: seconds of processor time of batch and its workers, without their start.
        requests: to the registry.
        read: bytes from it.
        meta: bytes of the map's metadata, as it is stored.
        index: bytes of the index blobs that the image adds, as they are stored.
        disk: bytes of the registry's disk, with its own files and their blocks.
    """

    cpu: float
    requests: float
    read: float
    meta: float
    index: float
    disk: float


def rows(work: Path) -> list[dict[str, Any]]:
    """Return one row for each kind of image and pass; ``work`` lies on the disk that is measured."""
    return [
        {"what": f"{name}: {3600 / cost.cpu:,.0f} images an hour and core, {cost.requests:.0f} requests, "
                 f"{_size(cost.meta + cost.index)} of artifacts",
         "ours_s": cost.cpu, "peer": "", "peer_s": None, "ratio": None, "target": ""}
        for name, cost in measure(work).items()
    ]  # fmt: skip


def measure(work: Path) -> dict[str, Cost]:
    """Return the cost of an image of each kind, for its first map, for its second, and looked at again."""
    from fault_proxy import fault_proxy
    from pushed_images import push
    from registry_server import docker_registry

    work.mkdir(exist_ok=True)
    costs = {}
    with docker_registry(work / "registry") as registry, fault_proxy(registry.host) as wire:
        bench = _Bench(work, registry.host, wire)
        bench.passed([f"{push(registry.host, 1000 + n).name}:v1" for n in range(2)], MAP_A)
        small = [f"{push(registry.host, n).name}:v1" for n in range(SMALL)]
        costs["small, first map"] = bench.passed(small, MAP_A)
        costs["small, second map"] = bench.passed(small, MAP_B)
        costs["small, nothing to do"] = bench.passed(small, MAP_B)
        _push_real(registry.host)
        costs["whole, first map"] = bench.passed(["real/app:v0"], MAP_A)
        costs["whole, second map"] = bench.passed(["real/app:v0"], MAP_B)
        builds = [_push_build(registry.host, n) for n in range(BUILDS)]
        costs["build, first map"] = bench.passed(builds, MAP_A)
        costs["build, second map"] = bench.passed(builds, MAP_B)
        # One shard reads the layers, another one with a store of its own comes after it.
        for kind, names in (("small", small), ("whole", ["real/app:v0"])):
            bench.passed(names, MAP_C, store="one", shared=True)
            costs[f"{kind}, shared layers"] = bench.passed(names, MAP_D, store="other", shared=True)
    return costs


class _Bench:
    def __init__(self, work: Path, host: str, wire: Any) -> None:
        self.work, self.host, self.wire = work, host, wire
        self.data = work / "registry/data"
        # Their start: a pass over nothing but one image that is done.
        self.start = 0.0

    def passed(self, names: list[str], uid_map: str, *, store: str = "store", shared: bool = False) -> Cost:
        """Run batch over ``names`` and return the mean cost of one."""
        indexes_in = "layerkit/indexes" if shared else ""
        config = self.work / "hook.toml"
        config.write_text(
            f'state = "state"\nstore = "{store}"\nworkers = 2\npublish_indexes = true\n'
            f'[[registry]]\nname = "main"\n'
            f'host = "{self.wire.host}"\ntls_verify = false\nindex_repository = "{indexes_in}"\n'
            f'[[map]]\nuid_map = ["{uid_map}"]\n'
        )
        images = self.work / "images.txt"

        def once(listed: list[str]) -> float:
            images.write_text("".join(f"docker://{self.wire.host}/{name}\n" for name in listed))
            before = _children_seconds()
            words = ["batch", "--from", str(images), "--config", str(config), "--json"]
            done = subprocess.run(
                [sys.executable, "-m", "layerkit.cli.main", *words], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert not json.loads(done.stdout)["failed"]
            return _children_seconds() - before

        if not self.start:
            once(names)
            self.start = once(names[:1])
        seen, disk, (metas, indexes) = len(self.wire.seen), _disk(self.data), self._stored()
        seconds = once(names)
        new_metas, new_indexes = self._stored()
        count = len(names)
        requests = self.wire.seen[seen:]
        return Cost(
            cpu=max(1e-6, seconds - self.start) / count,
            requests=len(requests) / count,
            read=sum(passed for method, _, passed in requests if method == "GET") / count,
            meta=(new_metas - metas) / count,
            index=(new_indexes - indexes) / count,
            disk=(_disk(self.data) - disk) / count,
        )

    def _stored(self) -> tuple[int, int]:
        """The size of all distinct blobs of META and of indexes in the registry, read from its folder."""
        found: dict[str, Counter[str]] = {"remap": Counter(), "index": Counter()}
        for path in self.data.glob("docker/registry/v2/blobs/sha256/*/*/data"):
            if path.stat().st_size < 1 << 20 and (data := path.read_bytes())[:1] == b"{":
                document = json.loads(data)
                kind = document.get("artifactType", "").removeprefix("application/vnd.layerkit.").split(".")[0]
                if kind in found:
                    found[kind] |= Counter({layer["digest"]: layer["size"] for layer in document["layers"]})
        return found["remap"].total(), found["index"].total()


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _disk(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _push_real(host: str) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("sample_app", HERE.parent / "sample-images/app.py")
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    app.ensure("oci-archive")
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci-archive:{app.cached_path('oci-archive')}",
         f"docker://{host}/real/app:v0"],
        check=True,
    )  # fmt: skip


def _push_build(host: str, number: int) -> str:
    """Push the real image with one small layer of its own on top."""
    from made_images import LAYER, MANIFEST, descriptor, digest, dump, tar
    from pushed_images import ask

    manifest = json.loads(ask(host, "real/app/manifests/v0", Accept=MANIFEST)[1])
    config = json.loads(ask(host, f"real/app/blobs/{manifest['config']['digest']}")[1])
    layer = tar((f"opt/build{number}", b"%d" % number * 100_000))
    packed = gzip.compress(layer, mtime=0)
    config["rootfs"]["diff_ids"].append(digest(layer))
    config["history"] = []
    data = dump(config)
    for blob in (data, packed):
        place = ask(host, "real/app/blobs/uploads/", "POST", b"")[2]
        mark = "&" if "?" in place else "?"
        octets = "application/octet-stream"
        assert ask(host, f"{place}{mark}digest={digest(blob)}", "PUT", blob, Content_Type=octets)[0] == 201
    manifest["config"] = descriptor(data, manifest["config"]["mediaType"])
    manifest["layers"].append(descriptor(packed, LAYER + "+gzip"))
    body = dump(manifest)
    assert ask(host, f"real/app/manifests/v{number + 1}", "PUT", body, Content_Type=MANIFEST)[0] == 201
    return f"real/app:v{number + 1}"


# --- the page ------------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if count >= 9.95 or unit == "B" else f"{count:.1f} {unit}"


def _hours(count: float) -> str:
    return f"{count:,.0f}" if count >= 9.95 else f"{count:.1f}"


def tables(costs: dict[str, Cost]) -> str:
    """Return the page's tables: what was measured, and what follows for many images."""
    lines = [
        "| an image | CPU | images an hour and core | requests | read | META | indexes | registry's disk |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, cost in costs.items():
        sizes = " | ".join(_size(value) for value in (cost.read, cost.meta, cost.index, cost.disk))
        speed = f"{cost.cpu * 1000:,.0f} ms | {3600 / cost.cpu:,.0f} | {cost.requests:.0f}"
        lines.append(f"| {name} | {speed} | {sizes} |")
    lines += [
        "",
        "| registry | CPU, core hours | with 16 cores | requests | read | META | indexes | registry's disk |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for images in (100_000, 10_000_000):
        for pass_ in ("first map", "second map"):
            mean = {
                field: images * sum(part * getattr(costs[f"{kind}, {pass_}"], field) for kind, part in MIX)
                for field in Cost.__dataclass_fields__
            }
            hours = mean["cpu"] / 3600
            sizes = " | ".join(_size(mean[field]) for field in ("read", "meta", "index", "disk"))
            title = f"{images:,} images, {'first map' if pass_ == 'first map' else 'each further map'}"
            took = f"{_hours(hours / 16)} hours" if hours < 16 * 48 else f"{hours / 16 / 24:,.0f} days"
            lines.append(
                f"| {title} | {_hours(hours)} | {took} | {mean['requests'] / 1e6:,.1f} million | {sizes} |"
            )
    lines += ["", f"{datetime.date.today().isoformat()}; {_machine()}."]
    return "\n".join(lines)


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{os.cpu_count()} cores ({model or platform.machine()}), {memory:.0f} GB of memory, Linux "
        f"{platform.release().split('-')[0]}, Python {platform.python_version()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what images of a registry cost.")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/capacity.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lk-capacity-", dir="/var/tmp") as folder:
        text = tables(measure(Path(folder)))
    print(text)
    if args.write:
        page = PAGE.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
