"""One model over the memory of several processes (FSDP2, `torch.distributed.fsdp.fully_shard`; torch 2.7 or newer).

Decoder blocks, nearly all of a model, are sharded and come together one at a time while they run. Embeddings, the
final norm and the head stay whole on each rank: they are used from outside of the modules that FSDP watches, and may
be tied. The rotations are a unit of their own, so that their gradients are averaged over the ranks.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rotpruner.families import family_of
from rotpruner.layout import module_at
from rotpruner.rotated_model import RotatedModel


def shard(rotated: RotatedModel, mesh: DeviceMesh) -> None:
    """Spread a model over a one-dimensional mesh, in place. Its `ranks` are those of the mesh."""
    base = rotated.base
    blocks = module_at(base, family_of(base.config).blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    inside = set(blocks.parameters())
    outside = {parameter for parameter in base.base_model.parameters() if parameter not in inside}
    # Holds nothing itself: as the root of the blocks it lets one be gathered while the one before it runs.
    fully_shard(base.base_model, mesh=mesh, ignored_params=outside)
    # Gathered anew for every use, so that between steps optimiser and checkpoints see the shards.
    fully_shard(rotated.rotations, mesh=mesh, reshard_after_forward=True)
