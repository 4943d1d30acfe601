from __future__ import annotations

import pytest
import torch

from fqgan_dist.loss_group import ALONE, LossGroup, build_loss_group
from fqgan_dist.world import World


def test_members_split_the_rows_of_a_micro_batch_in_order() -> None:
    whole = torch.arange(12)
    parts = [whole[LossGroup(member=member, size=3).rows(4)] for member in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_single_rank_exchanges_nothing_and_passes_no_gradient() -> None:
    value = torch.arange(3.0, requires_grad=True)
    assert torch.equal(ALONE.gather(value), value.detach()[None])
    assert torch.equal(ALONE.mean(value), value.detach())
    assert not ALONE.gather(value).requires_grad
    assert not ALONE.mean(value).requires_grad


def test_groups_of_one_need_no_process_group() -> None:
    assert build_loss_group(World(rank=2, world_size=3), 1) is ALONE


def test_groups_that_the_ranks_cannot_make_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 2 ranks cannot be made of 3"):
        build_loss_group(World(world_size=3), 2)
