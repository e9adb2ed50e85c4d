"""What of a configuration goes together, before anything starts. Imports no torch.

Each problem is one line: what is wrong, by dotted key, and what to do.
"""

import math

from megalite.config import Config, TrainingConfig
from megalite.errors import ConfigError, nearest_multiples


def check(config: Config) -> None:
    """Refuse combinations that cannot train, whatever the number of processes; one line each in a ConfigError."""
    problems = [
        *_model_problems(config),
        *_length_problems(config),
        *_parallel_problems(config),
        *_data_problems(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_schedule(training: TrainingConfig, max_steps: int) -> None:
    """Refuse a schedule longer than the run: for max_steps that num_train_epochs and the data's size gave."""
    problems = _schedule_problems(training, max_steps)
    if problems:
        raise ConfigError("\n".join(problems))


def resolve_batch(config: Config, dp_size: int) -> tuple[int, int]:
    """The step's (gradient_accumulation_steps, global_batch_size) on dp_size data-parallel ranks."""
    training = config.training
    accumulation, global_batch = training.gradient_accumulation_steps, training.global_batch_size
    micro_batch = training.per_device_train_batch_size
    unit = micro_batch * dp_size  # sequences in one micro-batch over all ranks
    if global_batch is None:
        accumulation = accumulation or 1
        return accumulation, accumulation * unit
    if accumulation is not None and global_batch != accumulation * unit:
        raise ConfigError(
            f"training.global_batch_size = {global_batch}, but training.per_device_train_batch_size * "
            f"training.gradient_accumulation_steps * data-parallel size = {micro_batch} * {accumulation} * {dp_size} = "
            f"{accumulation * unit}; give only one of global_batch_size and gradient_accumulation_steps"
        )
    if global_batch % unit:
        raise ConfigError(
            f"training.global_batch_size = {global_batch} is not a multiple of training.per_device_train_batch_size * "
            f"data-parallel size = {micro_batch} * {dp_size} = {unit}; set it to "
            f"{nearest_multiples(global_batch, unit)}, or change per_device_train_batch_size"
        )
    return global_batch // unit, global_batch


def _model_problems(config: Config) -> list[str]:
    model, data = config.model, config.data
    problems = []
    if data.block_size > model.n_positions:
        problems.append(
            f"data.block_size = {data.block_size} is longer than model.n_positions = {model.n_positions}, the longest "
            "context of the model; lower the one or raise the other"
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        problems.append(
            f"model.hidden_size = {model.hidden_size} is not divisible by model.num_heads = {model.num_heads}; "
            "change one of them or set model.head_dim"
        )
    elif model.head_size % 2:
        name = "model.head_dim" if model.head_dim else "model.hidden_size / model.num_heads"
        problems.append(f"{name} = {model.head_size} is odd, but RoPE rotates pairs of dimensions; make it even")
    if model.num_heads % model.kv_heads:
        problems.append(
            f"model.num_heads = {model.num_heads} is not divisible by model.num_kv_heads = {model.kv_heads}, "
            "but each key/value head serves as many query heads; change one of them"
        )
    return problems


def _data_problems(config: Config) -> list[str]:
    data = config.data
    problems = []
    if not data.train_files and not data.blend:
        problems.append("data.train_files: nothing to train on; give --train-files PATH")
    if data.train_files and data.blend:
        problems.append(
            "data.train_files and data.blend both say what to train on; give one, and [] for the other "
            "(--train-files= empties it)"
        )
    if data.blend and config.training.num_train_epochs is not None:
        problems.append(
            f"training.num_train_epochs = {config.training.num_train_epochs:g} has no meaning with data.blend, whose "
            "sources pass at different rates; give training.max_steps"
        )
    if data.format != "indexed" and data.blend:
        problems.append(
            f"data.format = {data.format} trains straight from data.train_files, not from data.blend; prepare the "
            "blend's sources with tools/preprocess_data.py, or give train_files"
        )
    if data.format != "indexed" and config.training.num_train_epochs is not None:
        problems.append(
            f"training.num_train_epochs = {config.training.num_train_epochs:g} has no meaning with data.format = "
            f"{data.format}, which does not know how many sequences there are; give training.max_steps"
        )
    seen: set[str] = set()
    for prefix in (entry.prefix for entry in data.blend):
        if prefix in seen:
            problems.append(f"data.blend: {prefix} is given twice; give it once, with the sum of the weights")
        seen.add(prefix)
    problems += [
        f"data.eval_files.{name}: no files; name some, or remove the set"
        for name, files in data.eval_sets.items()
        if not files
    ]
    return problems


def _length_problems(config: Config) -> list[str]:
    training = config.training
    problems = []
    steps, epochs = training.max_steps, training.num_train_epochs
    if steps is None and epochs is None:
        problems.append("training.max_steps, training.num_train_epochs: neither is set; give --max-steps N")
    elif steps is not None and epochs is not None:
        problems.append(
            f"training.max_steps = {steps} and training.num_train_epochs = {epochs:g} both set the run's length; "
            "give one, and null for the other"
        )
    if training.min_learning_rate > training.learning_rate:
        problems.append(
            f"training.min_learning_rate = {training.min_learning_rate:g} is above training.learning_rate = "
            f"{training.learning_rate:g}, the peak; lower the one or raise the other"
        )
    if training.decay_steps is not None and training.lr_schedule != "wsd":
        problems.append(
            f"training.decay_steps = {training.decay_steps} has no meaning with training.lr_schedule = "
            f"{training.lr_schedule}; set lr_schedule to wsd or decay_steps to null"
        )
    if steps is not None:
        problems += _schedule_problems(training, steps)
    return problems


def _schedule_problems(training: TrainingConfig, max_steps: int) -> list[str]:
    warmup, decay = training.warmup_steps, training.decay_steps
    # A warm-up longer than the run is no mistake: a trial of a few steps of a real configuration has one.
    if decay is not None and training.lr_schedule == "wsd" and warmup + decay > max_steps:
        return [
            f"training.warmup_steps + training.decay_steps = {warmup} + {decay} is more than training.max_steps = "
            f"{max_steps}; lower one of the first two or raise max_steps"
        ]
    return []


def _parallel_problems(config: Config) -> list[str]:
    problems = [*_tensor_problems(config), *_context_problems(config)]
    parallel = config.parallel
    if problem := schedule_problem(parallel.schedule_name, parallel.pipeline, parallel.virtual):
        problems.append(problem)
    if config.model.dropout and config.training.compile != "none":
        problems.append(
            f"training.compile: {config.training.compile} does not go with model.dropout = {config.model.dropout:g}, "
            "which differs from block to block; set one of them to none, or 0"
        )
    return problems


def _tensor_problems(config: Config) -> list[str]:
    model, parallel, training = config.model, config.parallel, config.training
    tensor = parallel.tensor
    if tensor == 1:
        return []
    problems = []
    shares = {
        "model.num_heads": model.num_heads,
        "model.intermediate_size": model.ffn_size,
        "model.vocab_size padded to model.vocab_multiple": model.padded_vocab_size,
    }
    legal = [size for size in range(1, model.num_heads + 1) if not any(share % size for share in shares.values())]
    legal = [size for size in legal if _kv_heads_split(config, size)]
    way_out = f"this model allows tensor {_choices(legal)}"
    for name, size in shares.items():
        if size % tensor:
            if name.startswith("model.vocab_size"):
                way_out += f", or raise model.vocab_multiple to {math.lcm(model.vocab_multiple, tensor)}"
            problems.append(
                f"{name} = {size} is not divisible by parallel.tensor = {tensor}, which gives each rank an equal "
                f"share; {way_out}"
            )
    if model.num_heads % tensor == 0 and not _kv_heads_split(config, tensor):
        problems.append(
            f"model.num_kv_heads = {model.kv_heads} neither gives each of parallel.tensor = {tensor} ranks as many "
            f"heads, nor each head as many ranks to share its width of {model.head_size}; {way_out}"
        )
    if training.optimizer == "muon":
        problems.append(
            f"training.optimizer: muon works on whole matrices, of which parallel.tensor = {tensor} gives each rank a "
            "part; set parallel.tensor to 1, or take adamw"
        )
    if training.compile != "none":
        problems.append(
            f"training.compile: {training.compile} does not go with parallel.tensor = {tensor}, whose collectives "
            "would break the graphs; set it to none"
        )
    return problems


def _kv_heads_split(config: Config, tensor: int) -> bool:
    heads, width = config.model.kv_heads, config.model.head_size
    return heads % tensor == 0 or (tensor % heads == 0 and width % (tensor // heads) == 0)


def _context_problems(config: Config) -> list[str]:
    model, parallel, block = config.model, config.parallel, config.data.block_size
    problems = []
    parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if block % parts:
        named = "parallel.context" if parallel.context > 1 else "parallel.tensor"
        named += " x parallel.tensor" if parallel.context > 1 and parts > parallel.context else ""
        problems.append(
            f"data.block_size = {block} is not divisible by {named} = {parts}, the ranks that share a sequence; set it "
            f"to {nearest_multiples(block, parts)}"
        )
    if parallel.context == 1:
        return problems
    heads = model.num_heads // parallel.tensor
    kv_heads = max(1, model.kv_heads // parallel.tensor)
    fits = [size for size in range(1, heads + 1) if heads % size == 0]
    fits = [size for size in fits if kv_heads % size == 0 or size % kv_heads == 0]
    if fits and parallel.context not in fits:  # where tensor leaves a rank no head, that is said already
        problems.append(
            f"parallel.context = {parallel.context} does not divide the {heads} query and {kv_heads} key/value heads "
            f"of a rank, which it exchanges for positions; this model allows context {_choices(fits)}"
        )
    if config.training.compile != "none":
        problems.append(
            f"training.compile: {config.training.compile} does not go with parallel.context = {parallel.context}, "
            "whose exchange would break the graphs; set it to none"
        )
    return problems


def schedule_problem(schedule: str, stages: int, virtual: int) -> str | None:
    """Why a pipeline cannot have that schedule, if it cannot; schedule: of parallel.schedule, but for auto."""
    if stages == 1 and virtual > 1:
        return f"parallel.virtual = {virtual} needs parallel.pipeline above 1; set one of them"
    if (schedule == "interleaved") != (virtual > 1):
        return (
            f"parallel.schedule = {schedule} and parallel.virtual = {virtual}: interleaved is the schedule of virtual "
            "above 1, and of no other; set schedule to auto"
        )
    return None


def _choices(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
