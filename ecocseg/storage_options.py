"""How every command takes the settings of a bucket: the keys of a run's `storage:` block."""

from __future__ import annotations

import argparse
from typing import Any

from ecocseg.config import StorageConfig, check_section, keys, parse_override, raise_problems
from ecocseg.storage import Storage

SHORT = ("endpoint", "region", "anonymous")
"""Keys that have a flag of their own as well."""


def add_storage_arguments(parser: argparse.ArgumentParser, otherwise: str = "what the environment says, else AWS") -> None:
    names = ", ".join(key for key, *_ in keys(StorageConfig))
    group = parser.add_argument_group(f"how to reach buckets (default: {otherwise})")
    group.add_argument("--storage", metavar="KEY=VALUE", action="append", default=[],
                       help=f"a key of a run's `storage:` block: {names}; may be given several times")
    group.add_argument("--endpoint", metavar="URL", help="the same as --storage endpoint=URL: an S3-compatible server")
    group.add_argument("--region", help="the same as --storage region=REGION")
    group.add_argument("--anonymous", action="store_true", default=None,
                       help="the same as --storage anonymous=true: read a public bucket without credentials")


def given_storage(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of storage, checked. InputError naming what is wrong."""
    plain = {name: getattr(options, name) for name in SHORT if getattr(options, name) is not None}
    for word in options.storage:
        key, value = parse_override(f"storage.{word.removeprefix('storage.')}")
        plain[key.removeprefix("storage.")] = value
    section, problems = check_section(StorageConfig, plain)
    raise_problems("--storage", problems)
    assert section is not None
    return {name: getattr(section, name) for name in plain}


def storage_of(options: argparse.Namespace, base: StorageConfig | None = None) -> Storage:
    """Storage as the command line says, else as `base` has it."""
    return Storage(**{**(base or StorageConfig()).model_dump(), **given_storage(options)})
