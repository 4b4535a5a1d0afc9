"""What all sections of the configuration share: strictness, and the kinds of values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator

from pharmacist_ray.errors import ConfigError
from pharmacist_ray.storage.paths import RemotePath, StoragePath, refuse_credentials, storage_path

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _without_credentials(path: str) -> str:
    try:
        refuse_credentials(path)
    except ConfigError as error:  # for pydantic, which collects what is wrong
        raise ValueError(str(error)) from None
    return path


def _run_dir(value: object) -> StoragePath:
    if not isinstance(value, str | Path | RemotePath):
        raise ValueError("run_dir must be a folder or a URI")
    try:
        return storage_path(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


Location = Annotated[str, AfterValidator(_without_credentials)]
Paths = Annotated[list[Location], BeforeValidator(_as_list, json_schema_input_type=str | list[str]), Field(min_length=1)]
RunDir = Annotated[Path | RemotePath, PlainValidator(_run_dir, json_schema_input_type=str), PlainSerializer(str)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, docstrings become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
