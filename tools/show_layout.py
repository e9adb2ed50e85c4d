"""Print how a configuration lies on so many ranks, before anything starts: who sits where, who holds what, who waits.

    python tools/show_layout.py --config configs/llama-8b.yaml --world-size 64 --gpus-per-node 8 \\
        --parallel.tensor 4 --parallel.pipeline 4 --gradient-accumulation-steps 8

Any setting of the configuration can be given, as to pretrain.py. In the picture of the schedule F2 is the forward and
B2 the backward of micro-batch 2 (F2.1: through the second of the stage's virtual chunks), a column is the time of one
forward, and a backward takes two; a dot is a stage that waits. The picture takes all chunks to cost the same and
messages to cost nothing. Layouts that cannot be are refused with the reason.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.config import Config
from megalite.config_check import check, resolve_batch
from megalite.config_loader import load_config
from megalite.errors import UserError, run_main
from megalite.model.flops import count_parameters, flops_per_token
from megalite.model.partition import chunk_flops, chunk_parameters, layers_of_chunks
from megalite.pipeline.schedules import build
from megalite.pipeline.simulator import Timeline, label, simulate
from megalite.topology import Grid


def main() -> None:
    options, rest = parse_options()
    config = load_config(rest).config
    _fill_in(config)
    check(config)
    parallel = config.parallel
    grid = Grid.of(options.world_size, tensor=parallel.tensor, pipeline=parallel.pipeline, context=parallel.context)
    micro_batches, global_batch = resolve_batch(config, grid.data)
    chunks = layers_of_chunks(config)
    schedules = [
        build(parallel.schedule_name, stage, parallel.pipeline, parallel.virtual, micro_batches)
        for stage in range(parallel.pipeline)
    ]
    timeline = simulate(schedules)

    lines = [
        *show_ranks(grid, options.gpus_per_node),
        "",
        *show_groups(config, grid),
        "",
        *show_stages(config, chunks, timeline),
        "",
        f"schedule: {parallel.schedule_name}; micro-batches: {micro_batches}; sequences in one: "
        f"{config.training.per_device_train_batch_size}, in a step of all ranks: {global_batch}",
        *draw(timeline, parallel.virtual),
        f"bubble: each stage waits for {max(timeline.bubble):.1%} of the time that it works",
    ]
    for line in lines:
        print(cut(line, options.width))
    for warning in spanning(grid, options.gpus_per_node):
        print(f"warning: {warning}")


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Settings of the configuration: python megalite/pretrain.py --help",
    )
    width = shutil.get_terminal_size().columns
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks, which are GPUs")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="show nodes, and warn of groups that span them")
    parser.add_argument("--width", type=int, default=width, metavar="N", help="longer lines are cut (the terminal's)")
    options, rest = parser.parse_known_args()
    for name, least in (("world_size", 1), ("gpus_per_node", 1), ("width", 40)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    return options, rest


def _fill_in(config: Config) -> None:
    """What a run needs and its layout does not depend on."""
    if not config.data.blend:
        config.data.train_files = config.data.train_files or ["any"]
    if config.training.num_train_epochs is None:
        config.training.max_steps = config.training.max_steps or 1


def show_ranks(grid: Grid, gpus_per_node: int | None) -> list[str]:
    """Which rank has which coordinates; a line holds the ranks of one tensor-parallel group."""
    header = ["ranks", "pipeline", "data", "context", "tensor", *(["node"] if gpus_per_node else [])]
    rows = []
    for ranks in grid.groups("tensor"):
        *place, first = grid.coordinates(ranks[0])
        tensor = _numbers(range(first, first + len(ranks)))
        nodes = [_numbers(nodes_of(ranks, gpus_per_node))] if gpus_per_node else []
        rows.append([_numbers(ranks), *map(str, place), tensor, *nodes])
    sizes = {"pipeline": grid.pipeline, "data": grid.data, "context": grid.context, "tensor": grid.tensor}
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    return [f"grid: {grid.ranks.size} ranks = {shown}, tensor fastest", *_table(header, rows)]


def show_groups(config: Config, grid: Grid) -> list[str]:
    """All process groups by what they are for. ZeRO's: the ranks that hold the same part of the model."""
    kinds = {
        "tensor": grid.groups("tensor"),
        "context": grid.groups("context"),
        "zero (data x context)": grid.groups("data", "context"),
        "pipeline": grid.groups("pipeline"),
        "model (pipeline x tensor)": grid.groups("pipeline", "tensor"),
    }
    sharing = grid.tensor // config.model.kv_heads  # ranks to a key/value head
    if sharing > 1:
        kinds["of one key/value head"] = [
            ranks[i : i + sharing] for ranks in grid.groups("tensor") for i in range(0, grid.tensor, sharing)
        ]
    if config.model.tie_embeddings and grid.pipeline > 1:
        kinds["of the tied embedding"] = [[ranks[0], ranks[-1]] for ranks in grid.groups("pipeline")]
    rows = [
        [kind, f"{len(groups)} x {len(groups[0])}", " ".join(f"[{_numbers(ranks)}]" for ranks in groups)]
        for kind, groups in kinds.items()
    ]
    return _table(["groups", "", "ranks"], rows)


def show_stages(config: Config, chunks: list[range], timeline: Timeline) -> list[str]:
    """What each stage holds and does; parameters are those of all tensor-parallel ranks together.

    in flight: the most micro-batches whose activations of the whole stage it holds at once.
    """
    model, stages, virtual = config.model, config.parallel.pipeline, config.parallel.virtual
    sequence, last = config.data.block_size, len(chunks) - 1
    rows, held = [], 0
    for stage in range(stages):
        numbers = range(stage, len(chunks), stages)
        flops = sum(chunk_flops(model, len(chunks[c]), sequence, last=c == last) for c in numbers)
        parameters = sum(chunk_parameters(model, len(chunks[c]), first=c == 0, last=c == last) for c in numbers)
        held += parameters
        share = f"{flops / flops_per_token(model, sequence):.1%}"
        in_flight = f"{timeline.in_flight[stage] / virtual:.4g}"
        parts = "; ".join(_contents(chunks[c], c == 0, c == last) for c in numbers)
        rows.append([str(stage), f"{parameters:,}", share, in_flight, parts])
    copies = " (the tied embedding twice)" if held > count_parameters(model) else ""
    table = _table(["stage", "parameters", "FLOPs", "in flight", "holds"], rows)
    return [*table, f"parameters in all: {held:,}{copies}"]


def draw(timeline: Timeline, virtual: int) -> list[str]:
    """A row a stage, a column a time slot of one forward; a backward's second slot is a line."""
    spans = [span for stage in timeline.spans for span in stage]
    width = max(len(label(span.action, virtual)) for span in spans)
    rows = []
    for stage, row in enumerate(timeline.spans):
        cells = ["."] * int(timeline.makespan)
        for action, start, end in row:
            cells[int(start)] = label(action, virtual)
            cells[int(start) + 1 : int(end)] = ["-" * width] * (int(end - start) - 1)
        rows.append(f"stage {stage:<{len(str(len(timeline.spans) - 1))}}  " + " ".join(f"{c:<{width}}" for c in cells))
    return [row.rstrip() for row in rows]


def spanning(grid: Grid, gpus_per_node: int | None) -> list[str]:
    """What waits for each other several times in each layer, over the network between nodes."""
    warnings = []
    for axis, product in (("tensor", "parallel.tensor"), ("context", "parallel.tensor x parallel.context")):
        groups = grid.groups(axis)
        spread = [ranks for ranks in groups if gpus_per_node and len(nodes_of(ranks, gpus_per_node)) > 1]
        if spread:
            warnings.append(
                f"{len(spread)} of {len(groups)} {axis} groups span nodes, as ranks {_numbers(spread[0])} do, and talk "
                f"in every layer; let {product} divide --gpus-per-node {gpus_per_node}"
            )
    return warnings


def nodes_of(ranks: list[int], gpus_per_node: int) -> list[int]:
    return sorted({rank // gpus_per_node for rank in ranks})


def cut(line: str, width: int) -> str:
    """The words of a line that fit; half a number would pass for another."""
    return line if len(line) <= width else line[: width - 3].rpartition(" ")[0].rstrip() + " ..."


def _contents(layers: range, first: bool, last: bool) -> str:
    named = [f"layer{'s' if len(layers) > 1 else ''} {_numbers(layers)}"] if layers else []
    return ", ".join([*["embedding"] * first, *named, *["head"] * last])


def _numbers(numbers: Iterable[int]) -> str:
    """3, or 0-3, or 0-1,4-5."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


if __name__ == "__main__":
    run_main(main)
