"""Weights by rows: which rows of a weight this process holds, and how they come straight from safetensors files."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from prefloop.disk import machine_errors


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_rows(tensor: DTensor) -> tuple[int, int]:
    """Return first and last row (exclusive) that this rank holds. FSDP2 cuts the first dimension like `torch.chunk`."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    size, place = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    each = -(-rows // size)
    first = min(rows, place * each)
    return first, min(rows, first + each)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model as they lie on disk.

    `files` say for each name which safetensors file has it, `names` what a file calls it where that differs. `fresh`
    are weights that no file has.
    """

    files: Mapping[str, Path]
    names: Mapping[str, str]
    fresh: Mapping[str, Tensor]

    @classmethod
    def of(cls, paths: list[Path]) -> "Checkpoint":
        """Return what lies in these files."""
        files: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as opened:
                files.update(dict.fromkeys(opened.keys(), path))
        return cls(files, {}, {})

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight."""
        found: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self.files.values())):
            with safe_open(path, framework="pt") as opened:
                found |= {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118 no mapping
        return found

    def fill(self, named: Mapping[str, Tensor]) -> None:
        """Copy the weights into `named`, of shared ones the rows that this rank holds. One weight at a time is read."""
        with torch.no_grad(), machine_errors():
            for name, tensor in named.items():
                if name in self.fresh:
                    rows = slice(*held_rows(tensor)) if isinstance(tensor, DTensor) else slice(None)
                    local(tensor).copy_(self.fresh[name][rows])
                else:
                    self._read(self.names.get(name, name), tensor)

    def _read(self, name: str, tensor: Tensor) -> None:
        # Opened anew for each weight: what was read of a file counts as this process's memory until it is closed.
        with safe_open(self.files[name], framework="pt") as opened:
            if isinstance(tensor, DTensor):
                first, last = held_rows(tensor)
                if first < last:
                    local(tensor).copy_(opened.get_slice(name)[first:last])
            else:
                tensor.copy_(opened.get_tensor(name))
