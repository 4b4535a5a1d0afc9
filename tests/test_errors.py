from __future__ import annotations

import pickle

import pytest

from pharmacist_ray import errors
from pharmacist_ray.data import layouts  # noqa: F401  (BadRow is an error of ours, too)
from pharmacist_ray.errors import ConfigError, PharmacistError, UserError, unknown_name


def _all(cls: type[PharmacistError]) -> list[type[PharmacistError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _all(child))]


@pytest.mark.parametrize("cls", _all(PharmacistError), ids=lambda cls: cls.__name__)
def test_every_error_survives_pickling_with_its_text(cls):
    error = cls("no_room", "row 'ü\n' does not fit") if cls.__name__ == "BadRow" else cls("row 'ü\n' does not fit; cut it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert "does not fit" in str(again)
    assert again.exit_code == error.exit_code


def test_exit_codes_are_the_documented_ones_and_tell_the_kinds_apart():
    codes = {name: getattr(errors, name).exit_code for name in dir(errors) if name.endswith("Error")}
    assert codes == {
        "PharmacistError": 1, "UserError": 2, "ConfigError": 2, "DataError": 3, "ModelError": 4, "ArtifactError": 5,
        "ResourceError": 6, "TrainingError": 7, "PluginError": 1,
    }  # fmt: skip
    for name, code in codes.items():
        if name not in ("PharmacistError", "UserError"):
            line = next(line for line in errors.__doc__.splitlines() if name in line)
            assert line.endswith(f"exit code {code}")
            assert issubclass(getattr(errors, name), UserError) == (name not in ("TrainingError", "PluginError"))


def test_an_unknown_name_lists_the_known_and_suggests_the_nearest():
    error = unknown_name("scorer", "pharmacits", ["random", "pharmacist", "ifd"])
    assert isinstance(error, ConfigError)
    assert str(error) == "unknown scorer 'pharmacits' (did you mean 'pharmacist'?); known: ifd, pharmacist, random"
    assert str(unknown_name("scorer", 7, ("a", "b"))) == "unknown scorer '7'; known: a, b"
