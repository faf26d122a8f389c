"""Profiles of container engines as a runtime takes them; runc and crun judge them in ``hosts/bundle``."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from layerkit.formats.runtime.seccomp import Surroundings, runtime_profile
from layerkit.hosts.bundle import container
from layerkit.model.errors import UsageError

AROUND = Surroundings("x86_64", (6, 1), ("CAP_CHOWN",))


def profile(*rules: dict[str, object], **more: object) -> dict[str, Any]:
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": list(rules), **more}


def names(found: dict[str, Any]) -> list[str]:
    return [name for rule in found["syscalls"] for name in rule["names"]]


def rule(name: str, **more: object) -> dict[str, object]:
    return {"names": [name], "action": "SCMP_ACT_ALLOW", **more}


def test_rules_are_for_a_processor_a_kernel_and_capabilities() -> None:
    given = profile(
        rule("plain"),
        rule("here", includes={"arches": ["amd64", "x32"]}),
        rule("elsewhere", includes={"arches": ["arm64"]}),
        rule("not-here", excludes={"arches": ["amd64"]}),
        rule("allowed", includes={"caps": ["CAP_CHOWN"]}),
        rule("needs-both", includes={"caps": ["CAP_CHOWN", "CAP_SYS_ADMIN"]}),
        rule("without", excludes={"caps": ["CAP_SYS_ADMIN"]}),
        rule("not-with", excludes={"caps": ["CAP_CHOWN"]}),
        rule("old-enough", includes={"minKernel": "4.8"}),
        rule("just", includes={"minKernel": "6.1"}),
        rule("too-new", includes={"minKernel": "6.10"}),
        rule("before", excludes={"minKernel": "6.10"}),
        rule("no-longer", excludes={"minKernel": "6.1"}),
    )
    assert names(runtime_profile(given, AROUND, "p")) == [
        "plain", "here", "allowed", "without", "old-enough", "just", "before",
    ]  # fmt: skip


def test_what_a_rule_says_is_kept() -> None:
    arguments = [{"index": 0, "value": 2114060288, "valueTwo": 5, "op": "SCMP_CMP_MASKED_EQ"}]
    given = profile(
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": arguments},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "errno": "ENOSYS", "args": None},
        {"name": "read", "action": "SCMP_ACT_ALLOW"},
        defaultErrnoRet=38,
        defaultErrno="EPERM",
        archMap=[
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
        ],
        flags=["SECCOMP_FILTER_FLAG_LOG"],
    )
    assert runtime_profile(given, AROUND, "p") == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": arguments},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
            {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
        ],
    }


def test_a_runtimes_own_profile_is_taken() -> None:
    given = profile(rule("read"), architectures=["SCMP_ARCH_X86_64"])
    assert runtime_profile(given, AROUND, "p") == given


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"defaultAction": "ALLOW"},
        profile(rule("x", action="no")),
        profile({"action": "SCMP_ACT_ALLOW"}),
        profile(rule("x", includes={"distribution": ["any"]})),
        profile(rule("x", includes={"minKernel": "new"})),
        profile(rule("x", errno="EWHAT")),
        profile(rule("x", args=[{"index": "0", "op": "SCMP_CMP_EQ"}])),
        profile(syscalls={}),
    ],
)
def test_what_is_not_understood_is_refused_and_never_left_out(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="no seccomp profile that layerkit understands"):
        runtime_profile(given, AROUND, "p")


def test_whose_profile_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(container, "SECCOMP_PROFILES", (one, two))
    assert container.seccomp_profile("unconfined", ()) == (None, "")
    found, said = container.seccomp_profile("auto", ())
    assert found is None
    assert "--seccomp FILE" in said
    two.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert container.seccomp_profile("auto", ()) == ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}, "")
    one.write_text('{"defaultAction": "SCMP_ACT_KILL"}')
    for wish in ("auto", str(one)):
        found, _ = container.seccomp_profile(wish, ())
        assert found is not None
        assert found["defaultAction"] == "SCMP_ACT_KILL"
    one.write_text("{")
    for wish in (str(one), str(tmp_path / "none")):
        with pytest.raises(UsageError, match="--seccomp"):
            container.seccomp_profile(wish, ())
