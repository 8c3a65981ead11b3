"""The report of a study: one HTML file that needs nothing else, and a page for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from clicktrain.files import write_atomic
from reproductions import comparison, kernels, matching, paths, plots, retained, wording
from reproductions.matching import Match
from reproductions.preset import MethodRow
from reproductions.store import Run, Study
from reproductions.summary import MethodSummary, check, stored_verdicts, summarize, with_evidence

PAGES = "runs"
"""Folder beside a report with the pages of its runs."""


@dataclass(frozen=True)
class Group:
    """What the report says of the methods that one dense method is compared with.

    Attributes
    ----------
    dense : str
        That method.
    methods : list of MethodSummary
        Their figures.
    plots : list of (str, str)
        Drawings and their captions.
    matches : list of Match
        Rivals, and the quickest subjects that are as good.
    patterns : list of Run
        A run of each method that chose patterns, with the pool that it chose.
    """

    dense: str
    methods: list[MethodSummary]
    plots: list[tuple[str, str]]
    matches: list[Match]
    patterns: list[Run]


def write(study: Study, path: Path) -> None:
    """Write the report of a study, and beside it a page for each run."""
    pages = {run.spec.label: f"{PAGES}/{run.result['config_id'][:16]}-{run.spec.seed}.html" for run in study.runs}
    if pages:
        (path.parent / PAGES).mkdir(parents=True, exist_ok=True)
    for run in study.runs:
        write_atomic(path.parent / pages[run.spec.label], render_run(study, run, path.name))
    write_atomic(path, render(study, pages))


def write_comparison(left: Study, right: Study, path: Path) -> None:
    """Write two studies side by side."""
    text = _rendered(
        "compare.html",
        left=left,
        right=right,
        claims=comparison.claims(left, right),
        methods=comparison.methods(left, right),
    )
    write_atomic(path, text)


def render(study: Study, pages: Mapping[str, str] | None = None) -> str:
    """Return the report of a study as HTML: styles and plots inside, no script, nothing from a network.

    Parameters
    ----------
    study : Study
        The study.
    pages : mapping of str to str, optional
        Where the page of a run lies, by its label.
    """
    claims, evidence = check(study), stored_verdicts(study)
    return _rendered(
        "report.html",
        study=study,
        preset=study.preset,
        claims=with_evidence(claims, evidence),
        unmeasured=[row for row in claims if row.verdict.estimate is None and row.claim.id not in evidence],
        groups=_groups(study),
        retained=retained.rows(retained.read(study.directory)),
        remarks=remarks(study),
        machines=sorted({machine(run) for run in study.runs}),
        accountings=_accountings(),
        arithmetic_note=wording.accountings_note(),
        kernels=[(benchmark, plots.kernel_bars(benchmark)) for benchmark in kernels.stored()],
        pages=pages or {},
    )


def render_run(study: Study, run: Run, report: str) -> str:
    """Return the page of a run, which leads back to the report."""
    drawings = {"accuracy": plots.run_accuracy(run), "layers": plots.run_layers(run)}
    return _rendered("run.html", study=study, run=run, report=report, **drawings)


def _rendered(template: str, **values: object) -> str:
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
        "tally": wording.tally,
    }
    environment.globals |= {
        "measured": wording.measured,
        "command": command,
        "details": details,
        "accuracy_tolerance": matching.ACCURACY_TOLERANCE,
        "few": wording.FEW,
    }
    text: str = environment.get_template(template).render(**values)
    return text


@cache
def _accountings() -> str:
    """Return the one drawing that is the same for all studies."""
    return plots.accountings()


def _groups(study: Study) -> list[Group]:
    by_name = {summary.row.name: summary for summary in summarize(study)}
    return [
        Group(
            dense,
            [by_name[row.name] for row in rows],
            _plots(study, rows),
            matching.matches(study, rows),
            _with_patterns(study, rows),
        )
        for dense, rows in study.preset.groups.items()
    ]


def _plots(study: Study, rows: Sequence[MethodRow]) -> list[tuple[str, str]]:
    drawn = [
        (plots.accuracy_over_time(study, rows), "Test accuracy over training time; dots begin a stage."),
        (plots.accuracy_over_compression(study, rows), "Test accuracy over compression."),
        (plots.accuracy_against_time(study, rows), "Test accuracy over the time of the whole training."),
        (plots.seconds_by_stage(study, rows), "Training time by stage."),
        (plots.flops_by_stage(study, rows), "Training FLOPs by stage, as they were computed."),
    ]
    layers = plots.layer_density(study, rows)
    return drawn + ([(layers, "Weights kept in each layer.")] if layers else [])


def _with_patterns(study: Study, rows: Sequence[MethodRow]) -> list[Run]:
    first = [next((run for run in study.of(row.name) if run.result.get("patterns")), None) for row in rows]
    return [run for run in first if run is not None]


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
        "processes": (record.get("distributed") or {"processes": 1})["processes"],
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
