"""From a seccomp profile as podman and docker have it to what an OCI runtime takes. Pure.

The engines' profiles say more than a runtime's: which rules hold for which processor, kernel and capabilities. Here
those are decided. Format: the README of docker's and of containers/common's seccomp packages (``seccomp.json``);
result: runtime-spec, config-linux.md, "Seccomp".
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection
from dataclasses import dataclass

from layerkit.formats.strict_json import JsonObject
from layerkit.model.errors import UsageError

_NATIVE = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"), "i686": ("x86", "SCMP_ARCH_X86"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"), "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "loongarch64": ("loong64", "SCMP_ARCH_LOONGARCH64"),
}  # fmt: skip
_ACTION = re.compile(r"SCMP_ACT_[A-Z_]+")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What rules may depend on.

    Attributes:
        machine: as ``uname -m`` says it.
        kernel: (major, minor).
        capabilities: of the container's bounding set, ``CAP_CHOWN`` and so on.
    """

    machine: str
    kernel: tuple[int, int]
    capabilities: Collection[str]


def runtime_profile(profile: JsonObject, around: Surroundings, what: str) -> JsonObject:
    """Return ``linux.seccomp`` of a config.json.

    Args:
        profile: the engines' profile; one of a runtime, which says less, is taken as well.
        around: what its rules may depend on.
        what: names it in errors.

    Raises:
        UsageError: it is none. A rule that is not understood is never left out: it may be one that forbids.
    """
    reader = _Reader(what)
    out: JsonObject = {"defaultAction": reader.action(profile.get("defaultAction"), "defaultAction")}
    number = reader.errno(profile, "defaultErrno", "defaultErrnoRet")
    if number is not None:
        out["defaultErrnoRet"] = number
    architectures = _architectures(profile, around, reader)
    if architectures:
        out["architectures"] = architectures
    if profile.get("flags"):
        out["flags"] = reader.strings(profile, "flags")
    rules = []
    for place, rule in enumerate(reader.objects(profile, "syscalls")):
        where = _Reader(f"{what}, syscalls[{place}]")
        if _holds(rule, around, where):
            rules.append(_rule(rule, where))
    out["syscalls"] = rules
    return out


def _architectures(profile: JsonObject, around: Surroundings, reader: _Reader) -> list[str]:
    """Return the native one with those that the profile has with it; none means the native one."""
    _, native = _NATIVE.get(around.machine, ("", ""))
    for entry in reader.objects(profile, "archMap"):
        if entry.get("architecture") == native:
            return [native, *reader.strings(entry, "subArchitectures")]
    return reader.strings(profile, "architectures")


def _holds(rule: JsonObject, around: Surroundings, reader: _Reader) -> bool:
    """Return whether a rule is one for these surroundings."""
    arch, _ = _NATIVE.get(around.machine, (around.machine, ""))
    kept, left = reader.object(rule, "includes"), reader.object(rule, "excludes")
    arches, caps = reader.strings(kept, "arches"), reader.strings(kept, "caps")
    if (arches and arch not in arches) or any(cap not in around.capabilities for cap in caps):
        return False
    oldest, first_without = reader.kernel(kept), reader.kernel(left)
    if (oldest and around.kernel < oldest) or (first_without and around.kernel >= first_without):
        return False
    return arch not in reader.strings(left, "arches") and not any(
        cap in around.capabilities for cap in reader.strings(left, "caps")
    )


def _rule(rule: JsonObject, reader: _Reader) -> JsonObject:
    names = reader.strings(rule, "names") + ([rule["name"]] if isinstance(rule.get("name"), str) else [])
    if not names:
        raise reader.error("no names")
    out: JsonObject = {"names": names, "action": reader.action(rule.get("action"), "action")}
    number = reader.errno(rule, "errno", "errnoRet")
    if number is not None:
        out["errnoRet"] = number
    arguments = []
    for one in reader.objects(rule, "args"):
        index, value, second = (one.get(name, 0) for name in ("index", "value", "valueTwo"))
        if not all(isinstance(n, int) for n in (index, value, second)) or not isinstance(one.get("op"), str):
            raise reader.error(f"args: {one!r}")
        arguments.append({"index": index, "value": value, "valueTwo": second, "op": one["op"]})
    if arguments:
        out["args"] = arguments
    return out


class _Reader:
    """Gets typed fields out of a document called ``what``."""

    def __init__(self, what: str) -> None:
        self._what = what

    def error(self, why: str) -> UsageError:
        return UsageError(f"{self._what}: no seccomp profile that layerkit understands: {why}")

    def action(self, value: object, name: str) -> str:
        if not isinstance(value, str) or not _ACTION.fullmatch(value):
            raise self.error(f"{name}: {value!r}, want SCMP_ACT_…")
        return value

    def strings(self, within: JsonObject, name: str) -> list[str]:
        found = [] if within.get(name) is None else within[name]
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise self.error(f"{name}: {found!r}, want a list of strings")
        return list(found)

    def objects(self, within: JsonObject, name: str) -> list[JsonObject]:
        found = [] if within.get(name) is None else within[name]
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self.error(f"{name}: want a list of objects")
        return list(found)

    def object(self, within: JsonObject, name: str) -> JsonObject:
        found = {} if within.get(name) is None else within[name]
        if not isinstance(found, dict):
            raise self.error(f"{name}: want an object")
        unknown = set(found) - {"arches", "caps", "minKernel"}
        if unknown:
            raise self.error(f"{name}: {sorted(unknown)[0]!r} is none of arches, caps, minKernel")
        return found

    def errno(self, within: JsonObject, by_name: str, by_number: str) -> int | None:
        name, number = within.get(by_name), within.get(by_number)
        if name:
            found = getattr(errno, name, None) if isinstance(name, str) and name.startswith("E") else None
            if not isinstance(found, int):
                raise self.error(f"{by_name}: {name!r}, want the name of an errno")
            return found
        if number is not None and not isinstance(number, int):
            raise self.error(f"{by_number}: {number!r}, want a number")
        return number

    def kernel(self, within: JsonObject) -> tuple[int, int] | None:
        text = within.get("minKernel")
        if not text:
            return None
        found = re.fullmatch(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
        if found is None:
            raise self.error(f"minKernel: {text!r}, want such as 4.8")
        return int(found[1]), int(found[2])
