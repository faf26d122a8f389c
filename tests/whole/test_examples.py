"""The examples, run as they stand in ``examples/``: a build rule, a step for GitHub Actions, a pre-commit hook."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from needs import missing
from programs import ROOT

import layerkit

EXAMPLES = ROOT / "examples"
BINARIES = Path(sys.executable).parent


@pytest.fixture(scope="module")
def archive(tiny_archive: Callable[..., Path]) -> Path:
    """The tiny image as one file."""
    return tiny_archive()


# --- the build rule


def _artifact(path: str) -> SimpleNamespace:
    return SimpleNamespace(path=path)


class _Rule:
    """The .bzl file, evaluated: Starlark is a subset of Python, and the build system's part is small."""

    def __init__(self) -> None:
        made: dict[str, Any] = {}
        attribute = SimpleNamespace(label=lambda **facts: facts, string_list=dict)
        scope: dict[str, Any] = {
            "attr": attribute, "rule": lambda **facts: made.update(facts) or made, "depset": list,
            "DefaultInfo": SimpleNamespace, "OutputGroupInfo": SimpleNamespace,
        }  # fmt: skip
        exec(compile((EXAMPLES / "build-rule/layerkit.bzl").read_text(), "layerkit.bzl", "exec"), scope)
        self.facts = made

    def action(self, src: str, keep_base: str | None = None, uid_map: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the one action that the rule declares."""
        actions: list[dict[str, Any]] = []
        context = SimpleNamespace(
            label=SimpleNamespace(name="app_small"),
            actions=SimpleNamespace(declare_file=_artifact, run=lambda **facts: actions.append(facts)),
            file=SimpleNamespace(src=_artifact(src), keep_base=_artifact(keep_base) if keep_base else None),
            attr=SimpleNamespace(uid_map=uid_map),
            executable=SimpleNamespace(shrink="shrink_image"),
        )
        self.facts["implementation"](context)
        (action,) = actions
        return action


def _perform(action: dict[str, Any], inputs: dict[str, Path], folder: Path) -> dict[str, str]:
    """Run an action as a build system would: in a folder with its inputs alone; return the outputs' digests."""
    folder.mkdir()
    assert {one.path for one in action["inputs"]} == set(inputs)
    for name, path in inputs.items():
        shutil.copyfile(path, folder / name)
        (folder / name).chmod(0o444)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "build-rule/shrink_image.py", *action["arguments"]],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TMPDIR": str(folder.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outputs = {one.path for one in action["outputs"]}
    assert {path.name for path in folder.iterdir()} == outputs | set(inputs)
    for name, path in inputs.items():
        assert (folder / name).read_bytes() == path.read_bytes()
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in outputs}


def test_the_build_rule_is_a_function_of_its_inputs(archive: Path, tmp_path: Path) -> None:
    action = _Rule().action("app.tar")
    first = _perform(action, {"app.tar": archive}, tmp_path / "one")
    again = _perform(action, {"app.tar": archive}, tmp_path / "an-other-folder")
    assert first == again
    assert {path.name for path in tmp_path.iterdir()} == {"one", "an-other-folder"}
    report = json.loads((tmp_path / "one/app_small.json").read_text())
    assert report["file_bytes_after"] < report["file_bytes_before"]
    with (
        layerkit.open_image(str(tmp_path / "one/app_small.tar")) as small,
        layerkit.open_image(str(archive)) as old,
    ):
        assert small.tree().digest() == old.tree().digest()
        assert json.loads(small.image.config)["created"] == "1970-01-01T00:00:00Z"


def test_the_build_rule_with_a_base_and_a_map(archive: Path, tmp_path: Path) -> None:
    action = _Rule().action("app.tar", "base.tar")
    inputs = {"app.tar": archive, "base.tar": archive}
    _perform(action, inputs, tmp_path / "kept")
    report = json.loads((tmp_path / "kept/app_small.json").read_text())
    assert [layer["action"] for layer in report["layers"]] == ["keep"] * len(report["layers"])

    _perform(_Rule().action("app.tar", uid_map=("0:100000:65536",)), {"app.tar": archive}, tmp_path / "mapped")
    with layerkit.open_image(str(tmp_path / "mapped/app_small.tar")) as image:
        assert image.tree().uid.min() >= 100_000


def test_the_build_rule_reports_a_damaged_image(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no image")
    words = ["--src", "bad.tar", "--dst", "o.tar", "--report", "r.json"]
    command = [sys.executable, str(EXAMPLES / "build-rule/shrink_image.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (2, 3)
    assert "bad.tar" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o.tar").exists()


# --- the step for GitHub Actions


def _run_action(folder: Path, **given: str) -> tuple[int, dict[str, str], str]:
    """Run the ``run:`` steps of action.yml as the runner does; return exit code, outputs and summary."""
    action = yaml.safe_load((EXAMPLES / "github-action/action.yml").read_text())
    inputs = {name: given.get(name, facts.get("default", "")) for name, facts in action["inputs"].items()}
    for name, facts in action["inputs"].items():
        assert inputs[name] or not facts.get("required")
    output, summary = folder / "output", folder / "summary"
    output.touch()
    summary.touch()
    code = 0
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"], "an input pasted into a script is code"
        condition = step.get("if", "")
        if condition and not inputs[re.fullmatch(r"inputs\.([\w-]+) != ''", condition)[1]]:  # type: ignore[index]
            continue
        environment = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: inputs[found[1]], text)
            for name, text in step.get("env", {}).items()
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=folder, text=True,
            capture_output=True, timeout=120,
            env={**os.environ, "PATH": f"{BINARIES}:{os.environ['PATH']}", **environment,
                 "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)},
        )  # fmt: skip
        code = done.returncode
        if code:
            break
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return code, outputs, summary.read_text()


def test_the_github_step_passes_and_fails_by_the_limit(archive: Path, tmp_path: Path) -> None:
    for limit, expected in (("90%", 0), ("1KB", 1)):
        folder = tmp_path / limit
        folder.mkdir()
        # A name that would be shell code if it were pasted.
        image = folder / "$(touch pwned) image.tar"
        shutil.copyfile(archive, image)
        code, outputs, summary = _run_action(folder, image=str(image), package="", **{"fail-over": limit})
        assert code == expected
        assert int(outputs["wasted-bytes"]) > 1000
        assert outputs["wasted-bytes"] in summary
        assert (folder / "layerkit-report.html").read_text().startswith("<!")
        assert not (folder / "pwned").exists()


def test_the_github_step_tells_a_broken_image_from_a_fat_one(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no image")
    code, outputs, _ = _run_action(tmp_path, image="bad.tar", package="")
    assert code > 1 and not outputs


# --- the pre-commit hook


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A git repository with the hook; the result runs a command in it."""
    if shutil.which("git") is None:
        missing("git is not installed")
    folder = tmp_path / "repository"
    folder.mkdir()
    environment = {
        **os.environ, "PATH": f"{BINARIES}:{os.environ['PATH']}", "PRE_COMMIT_HOME": str(tmp_path / "cache"),
        "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.com", "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.com",
    }  # fmt: skip
    for name in [name for name in environment if name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")]:
        del environment[name]

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )

    assert run("git", "init", "-q").returncode == 0
    shutil.copyfile(EXAMPLES / "pre-commit/pre-commit-config.yaml", folder / ".pre-commit-config.yaml")
    done = run("pre-commit", "install")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "images").mkdir()
    return run


def test_the_hook_refuses_a_wasteful_image_and_takes_its_small_one(
    repository: Callable[..., subprocess.CompletedProcess[str]], archive: Path, tmp_path: Path
) -> None:
    image = tmp_path / "repository/images/app.tar"
    shutil.copyfile(archive, image)
    repository("git", "add", ".")
    done = repository("git", "commit", "-q", "-m", "fat")
    assert done.returncode != 0
    assert "image waste below 5 %" in done.stdout + done.stderr
    assert repository("git", "rev-parse", "--verify", "HEAD").returncode != 0

    with layerkit.open_image(str(archive), settings=layerkit.Settings(store=tmp_path / "store")) as opened:
        layerkit.optimize(opened).apply(f"oci-archive:{image}.new")
    Path(f"{image}.new").replace(image)
    repository("git", "add", ".")
    done = repository("git", "commit", "-q", "-m", "small")
    assert done.returncode == 0, done.stdout + done.stderr


# --- the two steps of optimize, which the rule is built on


def test_a_plan_can_be_looked_at_stopped_and_applied(archive: Path, tmp_path: Path) -> None:
    settings = layerkit.Settings(store=tmp_path / "store")
    seen: list[str] = []
    with layerkit.open_image(str(archive), settings=settings) as image:
        plan = layerkit.optimize(image, progress=lambda what, done, total: seen.append(what))
        assert plan.changes and plan.saved_file_bytes > 0 and plan.report.manifest == ""
        assert seen

        def stop(what: str, done: int, total: int) -> None:
            raise layerkit.Cancelled("enough")

        target = tmp_path / "layout"
        with pytest.raises(layerkit.Cancelled):
            plan.apply(f"oci:{target}:small", progress=stop)
        assert not (target / "index.json").exists()
        report = plan.apply(f"oci:{target}:small", created="0")
        again = plan.apply(f"oci-archive:{tmp_path}/small.tar", created="0")
    assert report.manifest == again.manifest
    with layerkit.open_image(f"oci:{target}:small", settings=settings) as small:
        assert str(small.image.descriptor.digest) == report.manifest
        assert not layerkit.optimize(small).changes


def test_a_plan_goes_into_a_sink_of_the_callers_own(archive: Path, tmp_path: Path) -> None:
    from layerkit.model.descriptor import Descriptor
    from layerkit.model.digest import Digest
    from layerkit.model.ports import ImageSink

    class Memory(ImageSink):
        def __init__(self) -> None:
            self.blobs: dict[Digest, bytes] = {}
            self.names: dict[str, Digest] = {}
            self.committed = False

        def has_blob(self, digest: Digest) -> bool:
            return digest in self.blobs

        def put_blob(self, descriptor: Descriptor, chunks: Any) -> None:
            data = b"".join(bytes(chunk) for chunk in chunks)
            assert Digest.of(data) == descriptor.digest
            self.blobs[descriptor.digest] = data

        def put_manifest(self, descriptor: Descriptor, data: bytes, name: str = "") -> None:
            self.blobs[descriptor.digest] = data
            self.names[name] = descriptor.digest

        def commit(self) -> None:
            self.committed = True

        def abort(self) -> None:
            self.blobs.clear()

    sink = Memory()
    with layerkit.open_image(str(archive), settings=layerkit.Settings(store=tmp_path / "store")) as image:
        report = layerkit.optimize(image).apply(sink, name="mine")
    assert sink.committed and str(sink.names["mine"]) == report.manifest
    manifest = json.loads(sink.blobs[sink.names["mine"]])
    assert all(Digest.parse(layer["digest"]) in sink.blobs for layer in manifest["layers"])
