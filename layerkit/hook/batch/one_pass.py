"""One pass over named images, for cron and CI: the same queue and worker, without a service around them."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerkit.formats.oci.remap_artifact import FORMAT_VERSION
from layerkit.hook.batch.shards import Shard, index_together, run_name
from layerkit.hook.config import Config, Registry
from layerkit.hook.queue import JobRow, Key, Queue, Target, Wish
from layerkit.hook.telemetry import Metrics
from layerkit.hook.work.access import place_in, resolve
from layerkit.hook.work.worker import make_worker
from layerkit.images.registry.names import RegistryRef
from layerkit.images.registry.sink import ATTACHED
from layerkit.model.digest import Digest
from layerkit.model.errors import NotFound, UsageError

_PREFIX = "docker://"


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass came to: its jobs, each at its end, and the references that the registry does not have."""

    rows: list[JobRow]
    missing: list[str]

    @property
    def failed(self) -> list[str]:
        """Return what went wrong, in words."""
        said = [f"{name}: not in the registry" for name in self.missing]
        for row in self.rows:
            if row.state not in ("done", "skipped"):
                names = ", ".join(each.repository for each in row.targets)
                said.append(f"{names}@{row.digest[:19]}: {row.why or row.state}")
        return said


def parse_refs(texts: Sequence[str]) -> list[RegistryRef]:
    """Return the references that ``docker://HOST/NAME[:TAG|@DIGEST]`` texts name.

    Raises:
        UsageError: another transport, or no reference.
    """
    for text in texts:
        if not text.startswith(_PREFIX):
            raise UsageError(f"{text}: the hook works on registries only; give docker://HOST/NAME[:TAG|@DIGEST]")
    return [RegistryRef.parse(text.removeprefix(_PREFIX)) for text in texts]


def parse_shard(text: str) -> tuple[int, int]:
    """Return I and N of ``I/N``.

    Raises:
        UsageError: not 0 <= I < N.
    """
    part, slash, parts = text.partition("/")
    digits = all(each.isascii() and each.isdigit() and len(each) < 7 for each in (part, parts))
    if not slash or not digits or not 0 <= int(part) < int(parts):
        raise UsageError(f"--shard {text!r}: want I/N with I from 0 to N-1, for example 0/4")
    return int(part), int(parts)


def shard_of(ref: RegistryRef, parts: int) -> int:
    """Return which of ``parts`` shards an image belongs to; images of one repository are together.

    They are likely to share layers, which one machine then reads once.
    """
    return int.from_bytes(hashlib.sha256(ref.name.encode()).digest()[:8], "big") % parts


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one pass is to do.

    Attributes:
        refs: what is meant; nothing else in the queue is touched.
        all_tags: all tags of the repositories of ``refs``.
        again: make what is there already anew.
        shard: whose images alone are done, see :func:`shard_of`; several find each other's indexes in the registry.
    """

    refs: Sequence[RegistryRef]
    all_tags: bool = False
    again: bool = False
    shard: Shard = field(default_factory=Shard)

    @property
    def ours(self) -> list[RegistryRef]:
        """Return the references of this shard."""
        return [ref for ref in self.refs if shard_of(ref, self.shard.parts) == self.shard.part]


def run(config: Config, wanted: Wanted) -> Pass:
    """Remap what is wanted for the configured maps; return what came of it.

    Raises:
        UsageError: a registry or repository that is not configured.
        RegistryError: a registry does not answer at all.
    """
    if wanted.shard.parts > 1:
        config = replace(config, apart=True)
    elif not wanted.refs:
        return Pass([], [])
    # For one pass, somebody waits for the end: what failed is tried again sooner, and given up sooner.
    policy = replace(config.policy, attempts=min(4, config.policy.attempts), first_seconds=0.5, recheck_seconds=0.0)
    with _state(config) as folder, contextlib.closing(Queue(Path(folder), policy)) as queue:
        wishes, missing = [], []
        for ref in wanted.ours:
            registry = _registry(config, ref)
            for tag, digest in _meant(registry, ref, wanted.all_tags):
                if digest is None:
                    missing.append(f"{ref.name}:{tag}")
                    continue
                target = Target(registry.name, ref.repository, tag)
                wishes += [Wish(key, target, again=wanted.again) for key in config.keys(digest)]
        if wanted.shard.parts > 1:
            everywhere = sorted({_registry(config, ref).name for ref in wanted.refs})
            name = run_name(config, wanted.refs, wanted.shard.parts)
            index_together(config, replace(wanted.shard, run=name), wishes, everywhere)
        queue.recover()
        jobs = {added.job for added in queue.add(wishes)}
        open_jobs = set(jobs)

        def finished() -> bool:
            states = queue.states(sorted(open_jobs))
            for job in [job for job in open_jobs if states.get(job) not in ("waiting", "running")]:
                open_jobs.discard(job)
                # An index leads to manifests, which are jobs of their own.
                new = _children(queue.job(job)) - jobs
                jobs.update(new)
                open_jobs.update(new)
            return not open_jobs

        make_worker(config, queue, Metrics(queue.stats)).run_until(finished)
        return Pass([queue.job(job) for job in sorted(jobs)], missing)


def _children(row: JobRow) -> set[str]:
    children = row.report.get("children", [])
    assert isinstance(children, list)
    return {Key(Digest.parse(each), row.mapping, row.options, FORMAT_VERSION).job for each in children}


def _state(config: Config) -> contextlib.AbstractContextManager[Path | str]:
    try:
        config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except PermissionError:
        return tempfile.TemporaryDirectory(prefix="layerkit-hook-")
    return contextlib.nullcontext(config.state)


def _registry(config: Config, ref: RegistryRef) -> Registry:
    for registry in config.registries.values():
        if ref.host in (registry.host, *registry.aliases):
            if not registry.serves(ref.repository):
                raise UsageError(f"{ref.name}: not among the repositories of {registry.name} that are served")
            return registry
    raise UsageError(
        f"{ref.name}: {ref.host} is not among the configured registries: {', '.join(config.registries)}"
    )


def _meant(registry: Registry, ref: RegistryRef, all_tags: bool) -> Iterator[tuple[str, Digest | None]]:
    if ref.digest is not None:
        yield ref.tag, ref.digest
        return
    tags: Iterable[str] = [ref.tag or "latest"]
    if all_tags:
        # Without those that only attach something to an image.
        tags = [tag for tag in place_in(registry, ref.repository).open().tags() if not ATTACHED.fullmatch(tag)]
    for tag in tags:
        try:
            yield tag, resolve(registry, ref.repository, tag)
        except NotFound:
            yield tag, None
