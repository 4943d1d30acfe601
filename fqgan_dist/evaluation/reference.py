"""Reference statistics that know what they may be compared with, and the FID that checks it.

rFID compares reconstructions with the centre-cropped validation images; gFID compares samples with
the training set (or an ADM reference file). Against the wrong one a tokenizer of 2.19 reads 4.28.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.fid import frechet_distance
from fqgan_dist.evaluation.moments import Moments
from fqgan_dist.storage.documents import parse_json

FidKind = Literal["rfid", "gfid"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceStatistics:
    """Moments of one side of an FID, with what they were computed of and by what."""

    kind: FidKind
    """The FID that this is the reference of."""
    reference_id: str
    """What the images are: dataset id and view, or the sha256 of an ADM reference file."""
    evaluator_id: str
    """`InceptionFeatures.evaluator_id` of the network that computed them."""
    moments: Moments
    """Moments of the features."""
    is_count_known: bool = True
    """Whether `moments.count` is the number of images; ADM's files do not tell it."""

    def to_bytes(self) -> bytes:
        """Serialise: one JSON line, then the moments."""
        header = {
            "kind": self.kind,
            "reference_id": self.reference_id,
            "evaluator_id": self.evaluator_id,
            "is_count_known": self.is_count_known,
        }
        return json.dumps(header, sort_keys=True).encode() + b"\n" + self.moments.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> ReferenceStatistics:
        """Read what `to_bytes` wrote.

        Raises:
            DataError: the bytes are something else.
        """
        line, _, rest = data.partition(b"\n")
        try:
            header = parse_json(line)
            kind, reference_id = header["kind"], header["reference_id"]
            evaluator_id, is_count_known = header["evaluator_id"], header["is_count_known"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"reference statistics: cannot be read ({error}) - compute them again"
            ) from error
        return cls(
            kind=kind,
            reference_id=reference_id,
            evaluator_id=evaluator_id,
            moments=Moments.from_bytes(rest),
            is_count_known=is_count_known,
        )


@dataclass(frozen=True, kw_only=True)
class FidScore:
    """A Frechet distance with all that it depends on."""

    kind: FidKind
    value: float
    num_samples: int
    num_reference_samples: int | None
    """None: the reference does not tell."""
    reference_id: str
    evaluator_id: str


def compute_fid(
    samples: Moments, reference: ReferenceStatistics, *, kind: FidKind, evaluator_id: str
) -> FidScore:
    """Compare samples with a reference of the right kind and evaluator.

    Raises:
        DataError: the reference is of the other FID, or another evaluator computed it.
    """
    if reference.kind != kind:
        raise DataError(
            f"reference {reference.reference_id!r} is for {reference.kind} - expected one for "
            f"{kind} "
            "- rfid takes the validation set, gfid the training set"
        )
    if reference.evaluator_id != evaluator_id:
        raise DataError(
            f"reference {reference.reference_id!r} was computed by {reference.evaluator_id!r} - "
            f"expected {evaluator_id!r} - compute the reference with this evaluator"
        )
    return FidScore(
        kind=kind,
        value=frechet_distance(samples, reference.moments),
        num_samples=samples.count,
        num_reference_samples=reference.moments.count if reference.is_count_known else None,
        reference_id=reference.reference_id,
        evaluator_id=evaluator_id,
    )
