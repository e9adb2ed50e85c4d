"""This rank's part of the model, from the configuration and the rank's place in the grid."""

from megalite.comms.collectives import TensorParallel
from megalite.config import Config
from megalite.layers.attention import Attend
from megalite.model.gpt import Stage
from megalite.topology import Topology
from megalite.training.engine import DTYPES


def build_chunks(config: Config, topology: Topology, layers: list[range], attend: Attend | None) -> list[Stage]:
    """The chunks of the model on this rank's stage: one, or one for each virtual stage; collective.

    layers: the decoder layers of each chunk of the whole model, in order; chunk c is on stage c mod pipeline.
    """
    model, training, tensor = config.model, config.training, config.parallel.tensor
    # The ranks that share a key/value head, where there are more ranks than heads.
    kv_group = topology.part_of_tensor_group(tensor // model.kv_heads) if tensor > model.kv_heads else None
    tp = TensorParallel(topology.tensor_group, config.parallel.sequence and tensor > 1, kv_group)
    return [
        Stage(
            model,
            seed=training.seed,
            tp=tp,
            context=topology.context_group,
            attend=attend,
            layers=layers[chunk],
            first=chunk == 0,
            last=chunk == len(layers) - 1,
            activation_checkpointing=training.activation_checkpointing,
            z_loss=training.z_loss,
            init_rounding=DTYPES[training.precision],
        )
        for chunk in range(topology.pipeline_rank, len(layers), topology.grid.pipeline)
    ]
