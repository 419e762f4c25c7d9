"""What every stage's config shares: strictness, addresses, and the identity that decides whether work is the same."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class AddressMark:
    """Marks a field that holds a local path or an fsspec address (`s3://...`)."""


Address = Annotated[str, AddressMark()]


def runtime(default: Any, description: str, **constraints: Any) -> Any:
    """A field that says where or how fast the work runs, and so does not change what comes out."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **constraints)


class Config(BaseModel):
    """Strict, frozen base of every config model: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The fields that decide what comes out, as plain JSON values.

        Neither runtime fields nor addresses belong to it: a folder may move, and stages add fingerprints of what
        they read.
        """
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if (isinstance(extra, dict) and extra.get("runtime")) or is_address(field):
                continue
            value = getattr(self, name)
            kept[name] = value.identity() if isinstance(value, Config) else value
        return dict(json.loads(json.dumps(kept, default=_plain, sort_keys=True)))

    def within(self, root: str) -> Self:
        """A copy whose relative addresses are taken relative to `root`."""
        return self._map_addresses(lambda address: address_within(root, address))

    def _map_addresses(self, change: Callable[[str], str]) -> Self:
        updates: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Config):
                updates[name] = value._map_addresses(change)
            elif isinstance(value, dict):
                updates[name] = {
                    key: one._map_addresses(change) if isinstance(one, Config) else one for key, one in value.items()
                }
            elif isinstance(value, str) and is_address(field):
                updates[name] = change(value)
            elif isinstance(value, tuple) and is_address(field):
                updates[name] = tuple(change(address) for address in value)
        return self.model_copy(update=updates)


class StageConfig(Config):
    """One stage: what it reads, and `output`, the folder it writes."""

    output: Address = runtime(..., "folder that this stage writes")


def is_address(field: FieldInfo) -> bool:
    """Whether a field holds an address, also where it may be None (pydantic then keeps the mark inside the union)."""
    marks = [*field.metadata, *(mark for part in get_args(field.annotation) for mark in get_args(part)[1:])]
    return any(isinstance(mark, AddressMark) for mark in marks)


def address_within(root: str, address: str) -> str:
    """`address` as it is where it is absolute (`/...`, `s3://...`, `models:/...`), else relative to `root`."""
    return address if address.startswith("/") or ":/" in address else f"{root}/{address}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return str(value)
