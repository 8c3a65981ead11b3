"""The report of a study: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from clicktrain.files import write_atomic
from reproductions import paths, plots, retained, wording
from reproductions.store import Run, Study
from reproductions.summary import check, stored_verdicts, summarize


def write(study: Study, path: Path) -> None:
    """Write the report of a study."""
    write_atomic(path, render(study))


def render(study: Study) -> str:
    """Return the report of a study as HTML: styles and plots inside, no script, nothing from a network."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "spread": wording.spread,
        "interval": wording.interval,
        "published": wording.published,
        "stored": wording.stored,
    }
    environment.globals["measured"] = wording.measured
    return environment.get_template("report.html").render(
        study=study,
        preset=study.preset,
        methods=summarize(study),
        claims=check(study),
        evidence=stored_verdicts(study),
        retained=retained.rows(retained.read(study.directory)),
        remarks=remarks(study),
        machines=sorted({machine(run) for run in study.runs}),
        command=command,
        details=details,
        accuracy_over_time=plots.accuracy_over_time(study),
        accuracy_over_compression=plots.accuracy_over_compression(study),
        seconds_by_stage=plots.seconds_by_stage(study),
    )


def remarks(study: Study) -> list[str]:
    """Return what a reader must know before trusting the figures."""
    planned = len(study.preset.runs())
    found = []
    if len(study.runs) < planned:
        found.append(f"Unfinished: {len(study.runs)} of {planned} runs are done.")
    if shared := wording.shared_epochs(study.runs):
        found.append(shared)
    if any(not run.exclusive for run in study.runs):
        found.append("Some runs shared the machine with others: their times decide nothing.")
    commits = {commit for run in study.runs for commit in _commits(run)}
    if len(commits) > 1:
        found.append(f"The runs come from {len(commits)} states of the code: {', '.join(sorted(commits))}.")
    if any(commit.endswith("changed") for commit in commits):
        found.append("Some runs were made from code with uncommitted changes.")
    if len({machine(run) for run in study.runs}) > 1:
        found.append("The runs come from several machines: their times are not compared fairly.")
    return found


def machine(run: Run) -> str:
    """Return what a run was computed on."""
    cpu, gpu = run.provenance["cpu"], run.provenance["gpu"]
    threads = run.provenance["threads"]["torch"]
    on_cpu = f"{cpu['model'] or 'unknown CPU'}, {cpu['usable']} cores, {threads} threads"
    return f"{gpu['model']}, {on_cpu}" if gpu else on_cpu


def command(study: Study, run: Run) -> str:
    """Return the command that repeats a run, from the root of the project."""
    config = f"{study.directory.path}/{run.result['config_id']}/seed_{run.spec.seed}/{run.directory.config.name}"
    return f"python -m clicktrain train --config {config} --seed {run.spec.seed} --out runs/again"


def details(run: Run) -> dict[str, Any]:
    """Return the provenance that the report shows of a run, by heading."""
    record = run.provenance
    began = run.began_from
    return {
        "started": record["started"],
        "epochs shared": f"{began['epochs']} with {began['method']}, {began['seconds']:.1f} s" if began else "none",
        "code": "; ".join(_commits(run)),
        "machine": machine(run),
        "platform": record["platform"],
        "packages": ", ".join(f"{name} {version}" for name, version in record["packages"].items()),
        "data": record["data_fingerprint"],
        "other runs at the same time": record["concurrency"]["declared"],
        "configuration": run.result["config_id"],
    }


def _commits(run: Run) -> list[str]:
    """Return the states of the code that trained the epochs of a run, each once."""
    codes = [segment["code"] for segment in run.segments] + (run.began_from["code"] if run.began_from else [])
    return list(dict.fromkeys(map(_commit, codes)))


def _commit(code: dict[str, Any] | None) -> str:
    if code is None:
        return "unknown"
    return f"{code['commit'][:12]}{', changed' if code['dirty'] else ''}"
