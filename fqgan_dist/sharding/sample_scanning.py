"""The samples of a tar in the format of webdataset: which can be used, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.droppings import REASON, find_dropping
from fqgan_dist.sharding.problems import check_problem_count
from fqgan_dist.sharding.sample_rules import SampleRules
from fqgan_dist.sharding.tar_scanning import TarMember, TarScan, group_samples


@dataclass(frozen=True)
class ReadSample:
    """A sample that has an image and a label."""

    key: str
    """Its key."""
    image: TarMember
    """Its image, with its bytes where they were asked for."""
    label: str
    """Text of its label; "" where there are no labels."""


@dataclass(frozen=True)
class OddMember:
    """A member or sample that is not used."""

    name: str
    """Name of the member, or key of the sample."""
    reason: str
    """Why not."""
    action: Literal["skipped", "refused"]
    """What was done with it; what is dangerous is refused."""


class SampleScan:
    """Reads the samples of one tar, and counts what it cannot use."""

    def __init__(self, scan: TarScan, rules: SampleRules, *, shard: str) -> None:
        """Read from the beginning.

        Args:
            scan: the tar.
            rules: where images and labels are.
            shard: name of the tar, for errors.
        """
        self._scan = scan
        self._rules = rules
        self._shard = shard
        self._num_samples = 0
        self._odd: list[OddMember] = []
        self._num_odd = 0
        self._droppings: set[str] = set()
        self._unfinished: set[str] = set()

    def read(self, *, with_images: bool) -> Iterator[ReadSample | OddMember]:
        """Yield the samples, and the members and samples that are not used.

        Args:
            with_images: read the bytes of the images too, not only of the labels.

        Raises:
            DataError: the tar is damaged, compressed or cut off, holds hardly anything but what
                cannot be used, or a sample that is too large.
        """
        rules = self._rules
        is_wanted = rules.is_wanted if with_images else rules.is_label
        for sample in group_samples(self._sort_out(self._scan.members(is_wanted))):
            yield from self._take_odd()
            try:
                if sample.key in self._unfinished:
                    raise DataError(
                        "its members do not follow each other; make the tar again with the names "
                        "sorted, as `tar --sort=name` does"
                    )
                found = ReadSample(sample.key, rules.find_image(sample), rules.find_label(sample))
            except DataError as error:
                self._unfinished.add(sample.key)
                self._note(sample.key, str(error), "skipped")
                continue
            self._num_samples += 1
            yield found
        yield from self._take_odd()

    def _sort_out(self, members: Iterable[TarMember]) -> Iterator[TarMember]:
        for member in members:
            if member.danger is not None:
                self._note(member.name, member.danger, "refused")
            elif dropping := find_dropping(member.name):
                if dropping not in self._droppings:
                    self._droppings.add(dropping)
                    self._note(dropping, REASON, "skipped")
            elif not member.key:
                self._note(member.name, "no key and extension, as samples have", "skipped")
            else:
                yield member

    def _note(self, name: str, reason: str, action: Literal["skipped", "refused"]) -> None:
        self._odd.append(OddMember(name, reason, action))
        self._num_odd += 1
        latest = f"{name!r}: {reason}"
        check_problem_count(self._shard, self._num_odd, self._num_samples, latest=latest)

    def _take_odd(self) -> list[OddMember]:
        odd, self._odd = self._odd, []
        return odd
