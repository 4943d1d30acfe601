"""Pretrained weights into a directory, for clusters without access (`fqgan weights fetch`).

Each file has the layout that the network's own loader reads, so that the printed settings are all
that a cluster needs beside the directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
import yaml
from torch import Tensor

from fqgan_dist.errors import ConfigError, DataError, FqganError
from fqgan_dist.evaluation.config import InceptionConfig
from fqgan_dist.evaluation.inception import build_inception
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.frozen_networks import FrozenNetwork, frozen_networks
from fqgan_dist.storage.storage import Storage
from fqgan_dist.teachers.teacher import load_hub_weights
from fqgan_dist.terminal import Lines, join_lines
from fqgan_dist.tokenizer.config import PerceptualConfig
from fqgan_dist.tokenizer.perceptual import build_perceptual_loss, copy_backbone_weights
from fqgan_dist.weights.config import FetchTarget

State = Literal["written", "kept", "not needed", "failed"]

_FILE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class FetchedNetwork:
    """What became of one network of the config."""

    field: str
    """Where it stands in the config."""
    name: str
    state: State
    source: str
    """The file, or, where none was written, the configured source."""
    sha256: str | None = None
    """Of the file's bytes; None without a file."""
    bytes: int = 0
    override: str | None = None
    """Setting that takes the file; None without one."""
    problem: str | None = None
    """Why it failed; None otherwise."""


@dataclass(frozen=True)
class FetchResult:
    """What became of all networks."""

    networks: tuple[FetchedNetwork, ...]

    @property
    def overrides(self) -> list[str]:
        return [network.override for network in self.networks if network.override is not None]

    @property
    def report(self) -> dict[str, Any]:
        return {"networks": [vars(each) for each in self.networks], "overrides": self.overrides}

    @property
    def text(self) -> Lines:
        lines = [_describe(network) for network in self.networks]
        if self.overrides:
            lines += ["", "Settings that use these files:"]
            lines += [f"  {shlex.quote(override)}" for override in self.overrides]
        return join_lines(lines)

    def check(self) -> None:
        """Raise a DataError that names every network that could not be fetched."""
        problems = [
            f"{network.field} ({network.name}): {network.problem}"
            for network in self.networks
            if network.problem is not None
        ]
        if problems:
            raise DataError(
                f"{len(problems)} of {len(self.networks)} network(s) could not be fetched; repeat "
                "the command on a machine with access, what is there already is kept\n  "
                + "\n  ".join(problems)
            )


def fetch_weights(config: RunConfig, target: FetchTarget) -> FetchResult:
    """Download the hub weights that a run needs, check them and write them to a directory.

    A file that is there already with the same bytes is kept. One network that fails does not keep
    the others from being fetched: `FetchResult.check` raises for it.

    Raises:
        ConfigError: two networks have one name, or a name is none for a file.
    """
    networks = frozen_networks(config)
    _check_names([network.name for network in networks if network.weights.is_hub])
    folder = Storage(target.to)
    # torch.hub announces downloads on stdout, which belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        return FetchResult(tuple(_fetch(network, folder) for network in networks))


def _load(network: FrozenNetwork) -> Mapping[str, Tensor]:
    match network.settings:
        case PerceptualConfig() as config:
            return copy_backbone_weights(build_perceptual_loss(config))
        case InceptionConfig() as config:
            return build_inception(config, device="cpu").network.state_dict()
        case config:
            return load_hub_weights(config)


def _check_names(names: list[str]) -> None:
    for name in names:
        if not _FILE_STEM.fullmatch(name):
            raise ConfigError(
                f"teachers.networks: the name {name!r} cannot be a file's - expected letters, "
                "digits, '_', '-' and '.' - rename the teacher"
            )
        if names.count(name) > 1:
            raise ConfigError(
                f"teachers.networks: {name!r} is the name of two networks, and would be of two "
                "files - expected one - rename the teacher"
            )


def _fetch(network: FrozenNetwork, folder: Storage) -> FetchedNetwork:
    source = network.weights.source
    if not network.weights.is_hub:
        return FetchedNetwork(network.group, network.name, "not needed", source)
    try:
        data = safetensors.torch.save(dict(_make_contiguous(_load(network))))
        uri, state = _write(folder, f"{network.name}.safetensors", data)
    except FqganError as error:
        return FetchedNetwork(network.group, network.name, "failed", source, problem=str(error))
    sha256 = hashlib.sha256(data).hexdigest()
    return FetchedNetwork(
        network.group,
        network.name,
        state,
        uri,
        sha256=sha256,
        bytes=len(data),
        override=f"{network.field}={_to_yaml({'source': uri, 'sha256': sha256})}",
    )


def _make_contiguous(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach().cpu().contiguous()) for name, tensor in tensors.items())


def _write(folder: Storage, name: str, data: bytes) -> tuple[str, State]:
    state: State = "kept" if folder.exists(name) else "written"
    try:
        folder.create_bytes(name, data)
    except FileExistsError as error:
        # It may be pinned by its sha256 in a run's config.
        raise DataError(
            f"{folder.uri(name)}: is there with other bytes - expected none, or those of the hub - "
            "remove the file or fetch to another directory"
        ) from error
    return folder.uri(name), state


def _to_yaml(group: Mapping[str, str]) -> str:
    return yaml.safe_dump(
        dict(group), default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    ).strip()


def _describe(network: FetchedNetwork) -> str:
    head = f"{network.field} ({network.name}): {network.state}"
    match network.state:
        case "not needed":
            return f"{head}, weights are {network.source}"
        case "failed":
            return head
        case "written" | "kept":
            size = f"{network.bytes / 2**20:,.1f} MiB"
            return f"{head}, {network.source}, {size}, sha256 {network.sha256}"
