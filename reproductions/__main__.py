"""The command line: ``python -m reproductions run|status|report|retained|export``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from clicktrain.errors import ClickTrainError
from reproductions import evidence, paths, preset, report, retained, terminal
from reproductions.paths import StudyDirectory
from reproductions.runner import Runner
from reproductions.store import Study, load_study, state

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run the paper's claims as experiments, and report what came out.",
)

PresetName = Annotated[str, typer.Argument(metavar="PRESET", help="Name of a preset, or the path of a .toml file.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of a study in the results directory.")]
Results = Annotated[Path, typer.Option(help="Directory of all studies.")]


@app.command()
def run(
    name: PresetName,
    results: Results = paths.RESULTS,
    data: Annotated[str | None, typer.Option(help="Data set in place of the preset's own.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at the same time; above 1, times decide nothing.")] = 1,
    shared: Annotated[bool, typer.Option("--shared", help="Other work runs beside: times decide nothing.")] = False,
    no_sharing: Annotated[
        bool, typer.Option("--no-sharing", help="Train every epoch of every run, also those equal to the dense run's.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help='METHOD or METHOD/SEED, as in "*/0".')] = None,
) -> None:
    """Run a study from wherever it stands, then show and report it."""
    source = preset.find(name)
    directory = StudyDirectory(results / source.stem)
    loaded = preset.load(source, data)
    runner = Runner(directory, loaded, jobs=jobs, exclusive=not shared, sharing=not no_sharing)
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
    directory = StudyDirectory(results / name)
    loaded = preset.load(directory.preset if directory.preset.is_file() else preset.find(name))
    for spec in loaded.runs():
        run_directory = directory.run(spec.config.config_id(), spec.seed)
        print(f"{state(run_directory):<11} {spec.label:<32} {run_directory.path}")


@app.command(name="report")
def write_report(
    name: StudyName,
    results: Results = paths.RESULTS,
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the study.")] = None,
) -> None:
    """Show a study as it stands and write its report."""
    directory = StudyDirectory(results / name)
    _present(load_study(directory), out or directory.report)


@app.command(name="retained")
def measure_retained(name: StudyName, results: Results = paths.RESULTS) -> None:
    """Measure what each way of choosing patterns retains of a study's dense networks."""
    study = load_study(StudyDirectory(results / name))
    retained.write(study.directory, retained.measure_study(study))
    _present(study, study.directory.report)


@app.command()
def export(
    study: Annotated[Path, typer.Argument(metavar="RESULTS", help="Directory of a study.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Directory of the evidence.")],
) -> None:
    """Copy the small files of a study's finished runs, to be committed as evidence."""
    print(f"{evidence.export(load_study(StudyDirectory(study)), destination)} runs exported to {destination}")


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
