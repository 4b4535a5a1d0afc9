"""Every exception the package raises on purpose.

    PharmacistError
    ├── UserError                what a user can mend: printed as one line, without a traceback
    │   ├── ConfigError          a key, a value or a combination in the configuration      exit code 2
    │   ├── DataError            a file, a row, or a data set as a whole                    exit code 3
    │   ├── ModelError           a model folder, a tokenizer, a checkpoint                  exit code 4
    │   ├── ArtifactError        an earlier stage's output is missing, stale or broken      exit code 5
    │   └── ResourceError        the machine or cluster cannot run what was asked           exit code 6
    ├── TrainingError            training went wrong (a non-finite loss): has the step and the rows    exit code 7
    └── PluginError              a plug-in went wrong: names it, and has its traceback as a note       exit code 1

Anything else is a bug and keeps its traceback (exit code 1). Each class takes one message, so that it survives the pickling
between Ray processes unchanged.
"""

from __future__ import annotations

import difflib


class PharmacistError(Exception):
    """Base of all; what a caller catches."""

    exit_code = 1


class UserError(PharmacistError):
    """The user can mend it. The message says what is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value or a combination in the configuration."""


class DataError(UserError):
    """A file, a row, or a data set as a whole."""

    exit_code = 3


class ModelError(UserError):
    """A model folder, a tokenizer or a checkpoint."""

    exit_code = 4


class ArtifactError(UserError):
    """The output of an earlier stage is missing, stale or broken."""

    exit_code = 5


class ResourceError(UserError):
    """The machine or cluster cannot run what was asked."""

    exit_code = 6


class TrainingError(PharmacistError):
    """Training cannot go on, for example because the loss is not finite."""

    exit_code = 7


class PluginError(PharmacistError):
    """A plug-in went wrong: a bug of its author's, whose traceback is printed before the message."""


def unknown_name(what: str, value: object, known: list[str] | tuple[str, ...], advice: str = "") -> ConfigError:
    """Return the error for an unknown name, with the known names and the nearest of them.

    Args:
        what: What was looked up, for example ``"scorer"``.
        value: The unknown name as given.
        known: All names that would have worked.
        advice: What else there is to do.
    """
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return ConfigError(f"unknown {what} '{value}'{hint}; known: {', '.join(sorted(known))}" + (f"; {advice}" if advice else ""))
