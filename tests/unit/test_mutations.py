"""The safeguards that `support/mutations.py` takes out are there, and so are their tests.

That the tests go red is shown by `python tests/support/mutations.py`.
"""

from __future__ import annotations

from dataclasses import replace

from support.mutations import MUTATIONS, ROOT, find_faults


def test_every_mutation_can_be_made_and_has_its_test() -> None:
    assert find_faults() == []
    assert len({each.name for each in MUTATIONS}) == len(MUTATIONS)


def test_what_cannot_be_made_is_named() -> None:
    mutation = MUTATIONS[0]
    moved = replace(mutation, old="no such text")
    assert "holds the text to be replaced 0 times" in str(moved.find_fault(ROOT))
    gone = replace(mutation, file="fqgan_dist/gone.py")
    assert "0 times" in str(gone.find_fault(ROOT))
    untested = replace(mutation, test=mutation.test + "_not")
    assert "there is no such test" in str(untested.find_fault(ROOT))
