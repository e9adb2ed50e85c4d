"""Loaders that train from text files, one or those of all ranks of a run."""

import json
from contextlib import nullcontext

import numpy as np
import pytest

from megalite.data.inputs import expand_inputs
from megalite.data.streaming import StreamingLoader

SIZE = 5


def loader(tokenizer_dir, files, dp_rank=0, dp_size=1, global_batch=12, **options):
    options = {
        "block_size": SIZE, "seed": 1, "encoder": "tokenizers", "workers": 0, "shuffle_buffer": 48, "accumulation": 2
    } | options  # fmt: skip
    micro_batch = global_batch // dp_size // options["accumulation"]
    return StreamingLoader(
        expand_inputs(files), str(tokenizer_dir), micro_batch=micro_batch, dp_rank=dp_rank, dp_size=dp_size, **options
    )


class Ranks:
    """All ranks of a run, one after the other."""

    def __init__(self, tokenizer_dir, files, dp_size=1, **options):
        self.loaders = [loader(tokenizer_dir, files, rank, dp_size, **options) for rank in range(dp_size)]

    def steps(self, count):
        """[each step's windows in the order of their samples]."""
        found = []
        for _ in range(count):
            first, samples = self.loaders[0].consumed_samples, {}
            for rank, each in enumerate(self.loaders):
                batches = each.next_step()
                assert len(batches) == each.accumulation
                tokens = np.concatenate([batch.tokens.numpy() for batch in batches])
                labels = np.concatenate([batch.labels.numpy() for batch in batches])
                assert (tokens[:, 1:] == labels[:, :-1]).all()
                start = first + (rank - first) % len(self.loaders)
                for i, (row, label) in enumerate(zip(tokens.tolist(), labels[:, -1].tolist(), strict=True)):
                    samples[start + i * len(self.loaders)] = [*row, label]
            assert sorted(samples) == list(range(first, self.loaders[0].consumed_samples))
            found.append([samples[k] for k in sorted(samples)])
        return found

    def state(self):
        own = []
        for each in self.loaders:
            each.gather = lambda mine: own.append(mine) or [mine] * len(self.loaders)
            with pytest.raises(ValueError, match="lanes") if len(self.loaders) > 1 else nullcontext():
                each.state_dict()
        for each in self.loaders:
            each.gather = lambda mine: own
        states = [each.state_dict() for each in self.loaders]
        assert all(state == states[0] for state in states)
        return json.loads(json.dumps(states[0]))

    def load(self, state):
        assert [each.load_state_dict(state) for each in self.loaders] == [None] * len(self.loaders)
        return self
