"""The command line: train, eval, export, profile, plan, info."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from clicktrain.errors import ClickTrainError

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    help="Train a network once and end with a pattern-pruned, fast one.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 when all went well, 2 after an error that the user can correct."""
    sys.path.insert(0, os.getcwd())  # for methods outside of the package: --method module:Class
    try:
        code = typer.main.get_command(app)(args, prog_name="clicktrain", standalone_mode=False)
    except (ClickTrainError, OSError) as error:
        _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors have it, whatever their class is called
            raise
        _fail(error.format_message())
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    """Print one line, once for all processes of a run, and exit."""
    if os.environ.get("RANK", "0") == "0":
        print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(USER_ERROR)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory of the run; an unfinished run in it goes on.")],
    config: Annotated[Path | None, typer.Option(help="Configuration file (TOML).")] = None,
    preset: Annotated[str | None, typer.Option(help="Start values: quick, or official:NAME[@ROW].")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one field; repeatable.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="clicktrain, dense, or module:Class.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    concurrent_runs: Annotated[
        int | None, typer.Option(min=0, help="Other runs that share this machine, for the record.")
    ] = None,
    keep_epoch: Annotated[
        list[int] | None, typer.Option(metavar="K", help="Keep the state after K epochs for --begin-from; repeatable.")
    ] = None,
    begin_from: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Take over the epochs that a new run shares with the dense run in RUN."),
    ] = None,
    or_from_start: Annotated[
        bool, typer.Option("--or-from-start", help="Where --begin-from cannot be, say why and train all epochs.")
    ] = False,
) -> None:
    """Train a network, or go on with a run that was interrupted."""
    from clicktrain import memory
    from clicktrain.config import RunConfig, merge, parse_assignment, read_toml
    from clicktrain.training import train as train_run

    memory.keep()  # not in the library: a process of its own is not ours to change
    values: dict[str, Any] = {} if config is None else read_toml(config)
    changes: list[dict[str, Any]] = [{"preset": preset}] if preset else []
    changes += [{"method": {"name": method}}] if method else []  # before its options: another name drops those
    changes += [parse_assignment(text) for text in set_ or ()]
    for change in changes:
        values = merge(values, change)
    run_config = RunConfig.from_dict(values, "configuration" if config is None else str(config))
    try:
        result = train_run(
            run_config,
            out,
            seed=seed,
            concurrent_runs=concurrent_runs,
            keep_epochs=keep_epoch or (),
            begin_from=begin_from,
            or_from_start=or_from_start,
        )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    _print_result(result)


@app.command("eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")], as_json: Json = False
) -> None:
    """Evaluate the last checkpoint of a run."""
    from clicktrain.training import evaluate_run
    from clicktrain.training.progress import ProgressLines

    figures = evaluate_run(run_dir, ProgressLines(sys.stderr))
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print(f"after epoch {figures['epoch']} (step {figures['step']}), stage {figures['stage']}")
    for split, percent in figures["accuracy"].items():
        if percent is not None:
            print(f"accuracy        {percent:.2f} % ({split})")
    _print_sizes(figures)


class ExportFormat(StrEnum):
    """What `export` writes."""

    COMPILED = "compiled"
    ONNX = "onnx"
    PROGRAM = "program"


@app.command("export")
def export_network(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    format_: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="compiled: for clicktrain.deploy.load; onnx: dense weights, standard operators; "
            "program: for torch.export.load, keeps the pattern convolutions.",
        ),
    ] = ExportFormat.COMPILED,
    batch: Annotated[int, typer.Option(min=1, help="Images that are computed at once.")] = 1,
    tune: Annotated[bool, typer.Option("--tune", help="Measure how each convolution is cut up best.")] = False,
) -> None:
    """Write the network of a run's last checkpoint for deployment, checked against it; images come normalised."""
    from clicktrain import deploy
    from clicktrain.deploy import export
    from clicktrain.training import trained_network
    from clicktrain.training.progress import ProgressLines

    network, images = trained_network(run_dir, ProgressLines(sys.stderr))
    images = images[:batch] if len(images) >= batch else images[:1].expand(batch, *images.shape[1:]).contiguous()
    if format_ is ExportFormat.COMPILED:
        compiled = deploy.compile(network, images, tune=tune)
        error = export.check(compiled, network, images, str(out))
        compiled.save(out)
        fallbacks = ", ".join(sorted(set(compiled.fallbacks))) or "none"
        print(f"fallbacks       {fallbacks}")
    else:
        error = (export.to_onnx if format_ is ExportFormat.ONNX else export.to_program)(network, images, out)
    print(f"written         {out} ({out.stat().st_size:,} bytes)")
    print(f"relative error  {error:.1e}")


@app.command("profile")
def profile_file(
    file: Annotated[Path, typer.Argument(help="File that export wrote.")],
    batch: Annotated[int | None, typer.Option(min=1, help="Images; by default as exported.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs that medians are taken over.")] = 15,
    tune: Annotated[bool, typer.Option("--tune", help="Measure how each convolution is cut up best.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the convolutions, sparse beside dense.")] = None,
    as_json: Json = False,
) -> None:
    """Time a compiled network layer by layer, sparse against dense."""
    from clicktrain import deploy
    from clicktrain.deploy import profile

    made = profile.profile(deploy.load(file, batch, tune=tune), rounds)
    print(json.dumps(made.as_dict(), indent=2) if as_json else made.to_text())
    if plot is not None:
        profile.plot(made, plot)


@app.command()
def plan(
    model: Annotated[str | None, typer.Option(help="Network.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set; only its image size and classes are used.")] = None,
    config: Annotated[str | None, typer.Option(help="official:NAME[@ROW], or a configuration file.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Percent of kernels removed, by layer: 40,50,...")] = None,
    target_compression: Annotated[float | None, typer.Option(help="Dense / kept weights.")] = None,
    target_flops: Annotated[float | None, typer.Option(help="Dense / sparse inference MACs.")] = None,
    width: Annotated[float | None, typer.Option(help="Channel multiplier.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes, where the data set is not known.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, where not the data set's own.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a network costs, dense and pruned, without training it."""
    from clicktrain.planning import plan_report

    report = plan_report(
        model=model,
        dataset=dataset,
        config=config,
        ratios=ratios,
        target_compression=target_compression,
        target_flops=target_flops,
        width=width,
        num_classes=num_classes,
        image_size=image_size,
    )
    print(report.to_json() if as_json else report.to_text())


@app.command()
def info(
    as_json: Json = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what the CPU can do at most: multiply-adds and memory, a second.")
    ] = False,
) -> None:
    """Print versions, devices, and which backends can compute here, or why not."""
    from clicktrain import kernels, provenance, timing

    record = provenance.collect()
    facts = {key: record[key] for key in ("code", "python", "packages", "platform", "cpu", "gpu", "threads")}
    facts["backends"] = kernels.available()
    if measure:
        facts["ceilings"] = asdict(timing.ceilings())
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(key)
            for name, entry in value.items():
                print(f"  {name:<21}{_shown(entry)}")
        else:
            print(f"{key:<23}{'none' if value is None else value}")


def _shown(entry: object) -> object:
    return "yes" if entry is True else f"{entry:.1f}" if isinstance(entry, float) else entry


def _print_result(result: dict[str, Any]) -> None:
    accuracies = {name: percent for name, percent in result["accuracy"].items() if percent is not None}
    listed = ", ".join(f"{name.replace('_', ' ')} {percent:.2f} %" for name, percent in accuracies.items())
    print(f"test accuracy   {listed}")
    _print_sizes(result)
    print(f"training FLOPs  {result['training_flops']['saved_percent']:.1f} % saved")
    print(f"training time   {result['seconds']['train']:.0f} s")


def _print_sizes(figures: dict[str, Any]) -> None:
    ratios = ", ".join(f"{ratio:.2f}x ({name})" for name, ratio in figures["compression"].items() if ratio)
    macs = figures["inference_macs"]
    print(f"compression     {ratios}")
    print(f"inference MACs  {macs['sparse']:,} of {macs['dense']:,}")
