"""Weights of the pretrained networks that a config names: are they where a node looks for them?"""

from __future__ import annotations

import operator
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from fqgan_dist.diagnosis.verdict import Verdict, failed, ok
from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.config import InceptionConfig
from fqgan_dist.stages.frozen_networks import FrozenNetwork, NeededWeights
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.storage.hashing import hash_object
from fqgan_dist.storage.storage import locate_file
from fqgan_dist.tokenizer.config import PerceptualConfig

_LENGTH_BYTES = 8
# safetensors' own limit.
_LARGEST_HEADER_BYTES = 100 * 10**6
_REQUEST_TIMEOUT_S = 10.0
_FETCH = "run `fqgan weights fetch CONFIG to=DIR` where there is access, and use the files it makes"


@dataclass(frozen=True)
class HubState:
    """What a library would do for weights of its hub."""

    origin: str
    """Repository or address."""
    is_cached: bool
    """Whether they are in this node's cache."""
    is_reachable: bool
    """Whether they could be downloaded; not asked where they are cached."""


def check_weights(needed: NeededWeights) -> Verdict:
    """Look for weights without loading them."""
    weights = needed.weights
    if weights.is_random:
        return ok(needed.field, "random, seeded: not comparable with published numbers")
    if isinstance(needed, FrozenNetwork) and weights.is_hub:
        return judge_hub(needed.field, _find_hub_state(needed))
    return check_file(needed.field, weights.source, weights.sha256)


def judge_hub(field: str, state: HubState) -> Verdict:
    if state.is_cached:
        return ok(field, f"hub: {state.origin} is in this node's cache")
    if state.is_reachable:
        return ok(field, f"hub: {state.origin} can be reached and is downloaded at its first use")
    return failed(field, f"hub: {state.origin} is neither cached nor reachable", _FETCH)


def check_file(field: str, source: str, sha256: str | None) -> Verdict:
    """Look for a safetensors file, read its header, and compare its sha256 where one is given."""
    folder, name = locate_file(source)
    try:
        size = folder.size(name)
        with folder.open_read(name) as file:
            problem = _find_damage(file, size)
        if problem:
            return failed(field, f"{source}: {problem}", "fetch the file again")
        if sha256 is None:
            return ok(field, f"{source}: {size / 2**20:,.1f} MiB; no sha256 is given to compare")
        found, _ = hash_object(folder, name)
    except FileNotFoundError:
        return failed(field, f"{source}: no such file on this node", "bring it there, or use s3://")
    except DataError as error:
        return failed(field, str(error), "give this node the right to read it")
    if found != sha256:
        finding = f"{source}: sha256 is {found}, expected {sha256}"
        return failed(field, finding, "fetch the file again, or correct sha256")
    return ok(field, f"{source}: {size / 2**20:,.1f} MiB, sha256 as given")


def _find_damage(file: BinaryIO, size: int) -> str | None:
    """Read the header of a safetensors file: its length, then names and offsets of the tensors."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > min(size, _LARGEST_HEADER_BYTES):
        return "not a safetensors file"
    try:
        header = parse_json(file.read(length))
        ends = [
            operator.index(entry["data_offsets"][1])
            for key, entry in header.items()
            if key != "__metadata__"
        ]
    except (ValueError, TypeError, LookupError, AttributeError):
        return "not a safetensors file"
    expected = _LENGTH_BYTES + length + max(ends, default=0)
    return None if size == expected else f"has {size} bytes, expected {expected}"


def _find_hub_state(network: FrozenNetwork) -> HubState:
    match network.settings:
        case PerceptualConfig() as perceptual:
            return _find_perceptual(perceptual.network)
        case InceptionConfig():
            return _find_inception()
        case teacher:
            from fqgan_dist.teachers.teacher import find_hub_files

            return _find_in_repository(*find_hub_files(teacher))


def _find_in_repository(repository: str, names: list[str]) -> HubState:
    from transformers.utils.hub import has_file

    is_cached = any(has_file(repository, name, local_files_only=True) for name in names)
    is_reachable = not is_cached and any(has_file(repository, name) for name in names)
    return HubState(repository, is_cached=is_cached, is_reachable=is_reachable)


def _find_perceptual(network: str) -> HubState:
    from fqgan_dist.tokenizer.perceptual import torchvision_url

    return _find_torch_file(torchvision_url(network))


def _find_inception() -> HubState:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return _find_torch_file(URL_INCEPTION_V3)


def _find_torch_file(url: str) -> HubState:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    is_cached = path.is_file()
    return HubState(url, is_cached=is_cached, is_reachable=not is_cached and _answers(url))


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False  # the verdict says that it is not reachable
