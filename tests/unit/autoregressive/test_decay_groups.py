from __future__ import annotations

from collections.abc import Callable

import torch

from fqgan_dist.autoregressive.optimization import decay_groups
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

BuildModel = Callable[..., FactorizedTransformer]


def test_matrices_decay_and_vectors_do_not(build_model: BuildModel):
    model = build_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, other = decay_groups(model, 0.05)
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.05, 0.0)
    not_decaying = {names[id(parameter)] for parameter in other["params"]}
    assert not_decaying == {n for n in names.values() if "norm" in n or n.endswith("bias")}
    assert len(decaying["params"]) + len(other["params"]) == len(names)


def test_frozen_parameters_are_in_no_group(build_model: BuildModel):
    model = build_model()
    model.code_embeddings.requires_grad_(False)
    grouped = {id(p) for group in decay_groups(model, 0.05) for p in group["params"]}
    assert not any(id(p) in grouped for p in model.code_embeddings.parameters())


def test_groups_fit_torch_optimizers(build_model: BuildModel):
    optimizer = torch.optim.AdamW(decay_groups(build_model(), 0.05), lr=1e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
