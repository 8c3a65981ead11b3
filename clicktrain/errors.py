"""Errors that a user can cause; the command line prints each as one line and exits with code 2."""

from __future__ import annotations


class ClickTrainError(Exception):
    """Base of every error that a user can cause and correct."""


class InvalidArgument(ClickTrainError, ValueError):
    """An argument has a value that cannot work; the message names it, its value and what was expected."""


class ConfigError(InvalidArgument):
    """A configuration file or option is unknown, malformed or contradicts another one."""


class DataError(ClickTrainError):
    """A data file is missing, truncated or not what its name promises."""


class CheckpointError(ClickTrainError):
    """A checkpoint is missing, damaged or belongs to another run."""


class BackendUnavailable(ClickTrainError, RuntimeError):
    """A compute backend that was asked for by name cannot run here; the message says why."""


class OutOfStep(ClickTrainError):
    """Processes that train one network no longer agree on it."""


class MissingPackage(ClickTrainError, ImportError):
    """An optional package is needed; the message says which and how to get it."""


class UnsupportedModel(ClickTrainError):
    """A model cannot be compiled for deployment; the message says what in it."""


class ModelFileError(ClickTrainError):
    """A compiled model's file is damaged, foreign or of a version that this program does not know."""


class DivergedError(ClickTrainError):
    """The loss became NaN or infinite."""
