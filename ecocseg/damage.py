"""The list of damaged rows of a stream, in the run's folder: a line for each, with its shard, its row and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ecocseg.data.shards import Manifest
from ecocseg.storage import Storage

Damage = dict[tuple[str, int], str]


@dataclass(frozen=True)
class DamageList:
    storage: Storage
    url: str
    manifest: Manifest

    def read(self) -> Damage:
        """What was listed before, of rows that the set still has."""
        try:
            lines = self.storage.read_bytes(self.url).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        rows = {file.name: file.rows for file in self.manifest.files}
        fields = [line.split("\t", 2) for line in lines]
        return {(shard, int(row)): what for shard, row, what in (f for f in fields if len(f) == 3)
                if row.isdecimal() and int(row) < rows.get(shard, 0)}

    def write(self, damaged: Mapping[tuple[str, int], str]) -> None:
        lines = [f"{shard}\t{row}\t{' '.join(what.split())}\n" for (shard, row), what in sorted(damaged.items())]
        self.storage.write_bytes(self.url, "".join(lines).encode())

    def add(self, damaged: Mapping[tuple[str, int], str]) -> None:
        """Write these beside those that are listed: for a worker that ends, and cannot ask the others."""
        self.write(self.read() | dict(damaged))
