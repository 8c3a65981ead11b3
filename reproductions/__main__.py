"""The command line: ``python -m reproductions run|status|report|retained|export|tables``."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clicktrain.errors import ClickTrainError, InvalidArgument
from reproductions import evidence, paths, preset, report, retained, tables, terminal
from reproductions.estimates import estimate
from reproductions.executors import Local, Ray
from reproductions.paths import StudyDirectory
from reproductions.runner import Runner, select
from reproductions.store import Study, load_study, state

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run the paper's claims as experiments, and report what came out.",
)


class Where(StrEnum):
    """Executors by name."""

    LOCAL = "local"
    RAY = "ray"


PresetName = Annotated[str, typer.Argument(metavar="PRESET", help="Name of a preset, or the path of a .toml file.")]
StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="Name of a study in the results directory, or the path of its preset.")
]
Results = Annotated[Path, typer.Option(help="Directory of all studies.")]


@app.command()
def run(
    name: PresetName,
    results: Results = paths.RESULTS,
    data: Annotated[str | None, typer.Option(help="Data set in place of the preset's own.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="CLAIM|METHOD[/SEED]", help='Some runs only; repeatable, as in "*/0".')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, their times and costs; run none.")] = False,
    price: Annotated[float | None, typer.Option(help="Of an hour of the machine, for --dry-run.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Prove that all runs, in seconds; decides nothing.")] = False,
    jobs: Annotated[int, typer.Option(help="Runs at the same time; claims about time allow one.")] = 1,
    shared: Annotated[bool, typer.Option("--shared", help="Other work runs beside: times decide nothing.")] = False,
    no_sharing: Annotated[
        bool, typer.Option("--no-sharing", help="Train every epoch of every run, also those equal to the dense run's.")
    ] = False,
    executor: Annotated[Where, typer.Option(help="Where runs go: this machine, or a Ray cluster.")] = Where.LOCAL,
    gpus: Annotated[float | None, typer.Option(help="GPUs of a run on Ray; default: 1 where there are any.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each run, with torchrun.")] = 1,
) -> None:
    """Run a study from wherever it stands, then show and report it."""
    source = preset.find(name)
    directory = StudyDirectory(results / (f"{source.stem}-smoke" if smoke else source.stem))
    loaded = preset.load(source, data, smoke=smoke)
    if dry_run:
        estimates = estimate(directory, loaded, select(loaded, only or []), sharing=not no_sharing)
        return terminal.console().print(terminal.estimates_table(estimates, jobs, price))
    runner = Runner(
        directory,
        loaded,
        jobs=jobs,
        exclusive=not shared,
        sharing=not no_sharing,
        executor=Ray(jobs, gpus) if executor is Where.RAY else Local(),
        processes=processes,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to interrupt
    try:
        failed = runner.run(only or [])
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    study = load_study(directory)
    _present(study, directory.report)
    if failed:
        labels = ", ".join(spec.label for spec in failed)
        print(f"failed: {labels}; see train.log in their directories, then run the command again", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def status(name: StudyName, results: Results = paths.RESULTS) -> None:
    """Say how far each run of a study has come."""
    directory = _directory(results, name)
    loaded = preset.load(directory.preset if directory.preset.is_file() else preset.find(name))
    for spec in loaded.runs():
        run_directory = directory.run(spec.config.config_id(), spec.seed)
        print(f"{state(run_directory):<11} {spec.label:<32} {run_directory.path}")


@app.command(name="report")
def write_report(
    name: StudyName,
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="With --compare: another one.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show STUDY and OTHER side by side.")] = False,
    results: Results = paths.RESULTS,
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the study.")] = None,
) -> None:
    """Show a study as it stands and write its report, or put two side by side."""
    directory = _directory(results, name)
    if compare != (other is not None):
        raise InvalidArgument("report: two studies and --compare go together, as in report --compare quick embedded")
    if other is None:
        return _present(load_study(directory), out or directory.report)
    left, right = load_study(directory), load_study(_directory(results, other))
    path = out or results / f"{left.directory.name}-and-{right.directory.name}.html"
    output = terminal.console()
    output.print(terminal.comparison_table(left, right))
    report.write_comparison(left, right, path)
    print(f"comparison: {path}")
    return None


@app.command(name="tables")
def print_tables(
    write: Annotated[bool, typer.Option("--write", help="Put them into README.md and RESULTS.md.")] = False,
) -> None:
    """Print all tables of results, as the stored evidence has them."""
    for path, made in tables.FILES.items():
        if write:
            tables.write(path, made())
        else:
            print(made(), end="\n\n")


@app.command(name="retained")
def measure_retained(name: StudyName, results: Results = paths.RESULTS) -> None:
    """Measure what each way of choosing patterns retains of a study's dense networks."""
    study = load_study(_directory(results, name))
    retained.write(study.directory, retained.measure_study(study))
    _present(study, study.directory.report)


@app.command()
def export(
    study: Annotated[Path, typer.Argument(metavar="RESULTS", help="Directory of a study.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Directory of the evidence.")],
) -> None:
    """Copy the small files of a study's finished runs, to be committed as evidence."""
    print(f"{evidence.export(load_study(StudyDirectory(study)), destination)} runs exported to {destination}")


def _directory(results: Path, name: str) -> StudyDirectory:
    """Return the directory of a study, named as such or by the preset file that it runs."""
    return StudyDirectory(results / (Path(name).stem if name.endswith(".toml") else name))


def _present(study: Study, path: Path) -> None:
    terminal.show(study, terminal.console())
    report.write(study, path)
    print(f"report: {path}")


def main() -> None:
    """Run the command line; errors that a user can mend become one line and exit code 2."""
    try:
        app()
    except (ClickTrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
