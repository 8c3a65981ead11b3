"""Presets: a study as data, one TOML file each.

::

    title = "Quick study"
    seeds = [0]
    claims = ["accuracy-vs-dense"]          # ids of reproductions.claims

    [base.train]                            # a run configuration, shared by all methods
    epochs = 10

    [[methods]]
    name = "dense"
    role = "dense"
    config = { method = { name = "dense" } }            # what this method changes in it

    [[methods]]
    name = "ClickTrain"
    role = "subject"
    rivals = { dense = "dense" }            # the rival a claim names -> the method it is compared with

A study of several networks or data sets has a dense method for each; then every other method names its own in
``rivals.dense``. Where ``config`` names a ``preset`` of run configurations, such as ``official:cifar10_vgg13``, the
values of that one come first, then those of ``base``, then those of ``config``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from clicktrain import official, toml
from clicktrain.config import RunConfig, Section, merge, read_toml
from clicktrain.errors import ConfigError
from reproductions import paths
from reproductions.claims import BY_ID, Claim


class MethodRow(Section):
    """One method of a study."""

    name: str
    """What tables call it; unique in the study."""
    role: Literal["dense", "rival", "subject"]
    """``dense``: the reference of all; ``subject``: what the claims are about."""
    rivals: dict[str, str] = Field(default_factory=dict)
    """The rival that a claim names, and the method of this study it means."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Changes to the study's base configuration."""


class Preset(Section):
    """What a study runs and which claims it checks."""

    title: str
    """Heading of the report."""
    description: str = ""
    """A sentence or two below it."""
    data_label: str
    """What figures call the data set."""
    dense_floor: float | None = None
    """Test accuracy in percent that each dense network must reach, or what is compared with it is void."""
    seeds: tuple[int, ...] = Field(min_length=1, strict=False)
    """One run of each method per seed; seed n means the same data order for all methods."""
    claims: tuple[str, ...] = Field(strict=False)
    """Ids of the claims that the study checks."""
    smoke: bool = False
    """Whether it was shrunk to prove that it runs, see `shrunk`: it decides nothing."""
    base: dict[str, Any]
    """Run configuration that all methods share."""
    methods: tuple[MethodRow, ...] = Field(min_length=1, strict=False)
    """The methods, in the order in which they run and are shown."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [row.name for row in self.methods]
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: one stands there twice")
        if len(set(names)) < len(names):
            raise ValueError(f"two methods have the same name: {names}")
        for row in self.methods:
            for rival in row.rivals.values():
                if rival not in names:
                    raise ValueError(f"rival {rival!r} of {row.name!r} is no method of this study: {names}")
        self._check_references()
        for claim in self.claims:
            if claim not in BY_ID:
                raise ValueError(f"unknown claim {claim!r}: known are {', '.join(BY_ID)}")
            if not self.subjects(BY_ID[claim]):
                raise ValueError(f"claim {claim!r} cannot be checked: it needs {BY_ID[claim].needs}")
        return self

    def _check_references(self) -> None:
        """Refuse a study in which a method has no dense one to be compared with, or several."""
        dense = [row.name for row in self.methods if row.role == "dense"]
        if not dense:
            raise ValueError('expected at least one method with role = "dense"')
        for row in self.methods:
            if row.role != "dense" and row.rivals.get("dense", dense[0] if len(dense) == 1 else None) not in dense:
                raise ValueError(f"rivals.dense of {row.name!r}: expected one of {dense}")

    def run_config(self, row: MethodRow) -> RunConfig:
        """Return the run configuration of a method.

        Raises
        ------
        ConfigError
            A key is unknown or its value cannot work.
        """
        return RunConfig.from_dict(merge(self.base, row.config), f"method {row.name!r}")

    def to_toml(self) -> str:
        """Return the preset as TOML, with whatever was overridden when it was loaded."""
        return toml.dumps(self.model_dump())

    def runs(self) -> list[RunSpec]:
        """Return all runs, seeds outermost, so that a study broken off is still balanced."""
        configs = [(row.name, self.run_config(row)) for row in self.methods]
        return [RunSpec(name, seed, config) for seed in self.seeds for name, config in configs]

    def subjects(self, claim: Claim) -> list[MethodRow]:
        """Return the methods that a claim is judged for: subjects it is about that have the rival it names."""
        subjects = [row for row in self.methods if row.role == "subject" and self._is_about(claim, row)]
        return [row for row in subjects if claim.rival is None or claim.rival in row.rivals]

    def _is_about(self, claim: Claim, row: MethodRow) -> bool:
        if claim.is_of_kernels:
            return False
        if claim.subject is None:
            return True
        config = self.run_config(row)
        options = config.method.options
        if not claim.subject.startswith(official.PREFIX):
            return bool(options.get("preset") == claim.subject)
        released = official.resolve(claim.subject)
        its_own = {"ratios": list(released.ratios), "penalty_strength": released.lam}
        is_method = config.model.name == released.model and all(options.get(key) == its_own[key] for key in its_own)
        where = (config.data.name, config.train.epochs)
        return is_method and (self.smoke or where == (released.dataset, released.stages.epochs))

    def compared(self, claim: Claim) -> list[MethodRow]:
        """Return all methods whose runs a verdict on a claim takes, the dense ones beside which it stands included."""
        names = set()
        for row in self.subjects(claim):
            names |= {row.name, self.dense_of(row).name} | ({row.rivals[claim.rival]} if claim.rival else set())
        return [row for row in self.methods if row.name in names]

    def dense_of(self, row: MethodRow) -> MethodRow:
        """Return the dense method that a method is compared with, itself if it is one."""
        if row.role == "dense":
            return row
        dense = {each.name: each for each in self.methods if each.role == "dense"}
        return dense[row.rivals.get("dense", next(iter(dense)))]

    @property
    def groups(self) -> dict[str, list[MethodRow]]:
        """The methods by the name of the dense one that they are compared with."""
        groups: dict[str, list[MethodRow]] = {}
        for row in self.methods:
            groups.setdefault(self.dense_of(row).name, []).append(row)
        return groups

    def shrunk(self) -> Preset:
        """Return a version that runs in seconds a method: tiny networks, a few embedded images, one seed.

        It proves that an experiment runs from the training to its verdict, which then says that it decides nothing.
        """
        rows = [row.model_copy(update={"config": merge(row.config, self._smoke(row))}) for row in self.methods]
        return self.model_copy(update={"seeds": self.seeds[:1], "methods": tuple(rows), "smoke": True})

    def _smoke(self, row: MethodRow) -> dict[str, Any]:
        config = self.run_config(row)
        options = {key: value for key, value in _SMOKE_OPTIONS.items() if key in config.method.options}
        return {
            "data": {"name": "fashion-mnist-small", "train_limit": 60},
            "model": {"name": config.model.name.removeprefix("imagenet_").removesuffix("_bn"), "width": 0.125},
            "train": _SMOKE_TRAIN,
            "method": {"name": config.method.name, "options": {**config.method.options, **options}},
        }


_SMOKE_TRAIN = {
    "epochs": 3,
    "batch_size": 30,
    "schedule": {"kind": "cosine", "milestones": []},
    "augment": "none",
    "channels_last": "off",
    "eval_every": 3,
    "threads": 1,
}
_SMOKE_OPTIONS = {"select_at": 1, "prune_at": 2, "mixup_from": 0, "every": 1}
"""Of methods, where a preset sets them for long runs."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a study: a method's configuration with one seed."""

    method: str
    seed: int
    config: RunConfig

    @property
    def label(self) -> str:
        """METHOD/SEED, as `--only` takes it."""
        return f"{self.method}/{self.seed}"


def names() -> list[str]:
    """Return the names of the presets that come with the suite."""
    return sorted(path.stem for path in paths.PRESETS.glob("*.toml"))


def find(name: str) -> Path:
    """Return the file of a preset: one of ours by its name, or any TOML file by its path.

    Raises
    ------
    ConfigError
        There is no such preset.
    """
    path = Path(name) if name.endswith(".toml") else paths.PRESETS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"preset {name!r}: expected one of {', '.join(names())}, or the path of a .toml file")
    return path


def load(path: Path, data: str | None = None, *, smoke: bool = False) -> Preset:
    """Read a preset file.

    Parameters
    ----------
    path : Path
        The file.
    data : str, optional
        Data set to use in place of the preset's own.
    smoke : bool
        Whether to shrink it, see `Preset.shrunk`.

    Raises
    ------
    ConfigError
        The file is not TOML, a key is unknown, or a value cannot work, in the preset or in a method's
        configuration.
    """
    values = read_toml(path)
    if data is not None:
        if any("data" in row.get("config", {}) for row in values.get("methods", [])):
            raise ConfigError(f"--data {data}: methods of {path.stem} name their own data sets")
        values["base"] = merge(values.get("base", {}), {"data": {"name": data}})
    try:
        preset = Preset.model_validate(values)
        configs = [preset.run_config(row) for row in preset.methods]
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    same = len({config.config_id() for config in configs}) < len(configs)
    if same and not preset.smoke:  # in a smoke study all data sets have become one
        raise ConfigError(f"{path}: two methods have the same configuration")
    return preset.shrunk() if smoke else preset


def _explain(error: ValidationError) -> str:
    """Return one line for one of pydantic's errors: an unknown key first, which may be a missing one misspelt."""
    errors = error.errors()
    unknown = [each for each in errors if each["type"] == "extra_forbidden"]
    first = (unknown or errors)[0]
    where = ".".join(map(str, first["loc"]))
    reason = "unknown key" if unknown else first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
