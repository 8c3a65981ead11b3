"""Compare the last commit with another one: `python -m bench.gate --base REVISION [--all]`.

Exit codes: 0, nothing is slower; 1, something is, or could not be told within the time; 2, nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.gate.decision import Verdict, decide
from bench.gate.items import ITEMS
from bench.gate.measuring import Build, Measurer
from bench.gate.revisions import Repository
from bench.gate.table import summary, table
from clicktrain import provenance, timing
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.files import write_atomic
from clicktrain.kernels import build

ROOT = Path(__file__).parents[2]
SLOWER, USER_ERROR = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; returns its exit code."""
    options = _parse(arguments)
    try:
        return _run(options)
    except (ClickTrainError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, metavar="REVISION", help="what the last commit is compared with")
    parser.add_argument("--all", action="store_true", help="measure what cannot have changed, too")
    parser.add_argument("--only", default="", metavar="TEXT", help="only items whose name contains this")
    parser.add_argument(
        "--seconds", type=float, default=100, help="time for measuring, building apart (default %(default)s)"
    )
    parser.add_argument("--repository", type=Path, default=ROOT, metavar="DIRECTORY", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything, raw rounds included, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table, in Markdown")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    repository = Repository(options.repository)
    base, head = repository.commit(options.base), repository.commit("HEAD")
    repository.check_clean()
    chosen = [item for item in ITEMS if options.only in item.name]
    if not chosen:
        raise InvalidArgument(f"--only {options.only!r}: no item has that in its name")
    changed = repository.changed(base, head)
    items = [item for item in chosen if options.all or item.is_affected(changed)]
    verdicts: Mapping[str, Verdict] = {}
    missing: Mapping[str, str] = {}
    report: dict[str, object] = {"schema": 1, "base": base, "head": head, "changed": changed}
    if items:
        build.compiler()  # raises where there is none: the generic kernels would stand in silently
        report |= {"ceilings": asdict(timing.ceilings(rounds=5)), "provenance": provenance.collect()}
        with tempfile.TemporaryDirectory() as folder:
            measurer = Measurer(*(_build(repository, *side, Path(folder)) for side in (("base", base), ("head", head))))
            print(f"building {base[:12]} and {head[:12]} for {len(items)} items", flush=True)
            missing = measurer.prepare(items)
            items = [item for item in items if item.name not in missing]
            if not items:
                raise ClickTrainError(f"nothing can be compared: {next(iter(missing.values()))}")
            start = time.monotonic()
            verdicts, report["rounds"] = decide(items, measurer, options.seconds, _progress)
            report["seconds"] = time.monotonic() - start
        report["verdicts"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    text = f"{table(chosen, verdicts, missing, base, head)}\n\n{summary(verdicts)}\n"
    print(text, end="")
    if options.table is not None:
        write_atomic(options.table, text)
    if options.out is not None:
        write_atomic(options.out, json.dumps(report) + "\n")
    return SLOWER if any(verdict.state != "not slower" for verdict in verdicts.values()) else 0


def _build(repository: Repository, name: str, commit: str, folder: Path) -> Build:
    tree = folder / name
    tree.mkdir()
    repository.export(commit, tree)
    return Build(name, tree, build.cache_directory())


def _progress(verdicts: Mapping[str, Verdict]) -> None:
    states = [verdict.state for verdict in verdicts.values()]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
