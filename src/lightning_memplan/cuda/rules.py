"""Assemble the rules for one GPU."""

from __future__ import annotations

from lightning_memplan.cuda import (
    activations,
    attention,
    convolutions,
    decompositions,
    indexing,
    losses,
    matmul,
    normalization,
    pools,
    recurrent,
    reductions,
    shapes,
    sparse,
)
from lightning_memplan.cuda.indexing import torchvision_upper_bounds
from lightning_memplan.cuda.rule_set import (
    Gpu,
    Rules,
    allocates,
    decomposes,
    decomposes_sparse,
    keeps_workspace,
    output_metas,
    upper_bound,
)

#: The modules whose import registers the rules
FAMILIES = (
    activations,
    attention,
    convolutions,
    decompositions,
    indexing,
    losses,
    matmul,
    normalization,
    pools,
    recurrent,
    reductions,
    shapes,
    sparse,
)


def rules_for(gpu: Gpu) -> Rules:
    """Return the rules for a GPU, with those of torchvision where it is loaded.

    >>> rules = rules_for(Gpu(capability=(9, 0)))
    >>> rules.gpu.capability
    (9, 0)
    """
    return Rules(
        gpu=gpu,
        allocations=allocates.rules,
        workspaces={op: rule(gpu) for op, rule in keeps_workspace.rules.items()},
        output_metas=output_metas.rules,
        decompositions=decomposes.rules,
        sparse_decompositions=decomposes_sparse.rules,
        upper_bounds={**upper_bound.rules, **torchvision_upper_bounds()},
    )
