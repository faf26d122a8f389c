"""``layerkit doctor``: what this host can do, what fits it best, and why."""

from __future__ import annotations

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, table


def doctor(store: o.StoreDir = None, json: o.Json = False) -> None:
    """Probe this host and the store's filesystem, and say which way of remapping fits best.

    Then, for each container runtime: whether the kernel's idmapped mounts do the job (use them), or layerkit does
    and how to switch it on, or neither and why; and whether an open for writing copies data there. Nothing is
    decided by the kernel's version: every feature is tried.

    Example: `layerkit doctor --store /srv/layerkit`
    """
    from layerkit.hosts.diagnosis.doctor import examine

    report = examine(o.store_dir(store))
    if Output(json).told("doctor", report.to_dict()):
        return
    table(
        "",
        ["FEATURE", "HERE", "WHAT FOR", "IF ABSENT"],
        [(r.feature, "yes" if r.present else "no", r.why, "" if r.present else r.hint) for r in report.rows],
    )
    fields(report.conclusions())
    table(
        "",
        ["RUNTIME", "BEST HERE", "WHY", "HOW", "COPY-UP"],
        [
            (
                r.name + (f" {r.version}" if r.version else " (not installed)"),
                r.answer, r.why, r.how, "not known" if r.clone is None else "a clone" if r.clone else "a copy",
            )
            for r in report.runtimes
        ],
    )  # fmt: skip
