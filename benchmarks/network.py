"""How many bytes a rank sends and how long a step should take, for 8 to 4096 GPUs: expected, not measured.

Four ways to the gradient of a batch of R · n pairs. The first two are this library's, with the bytes of
`goal.explain`; the others are what is usual, as formulas:

    gather, ring          exchange="gather" and "ring" of `goal.apply(..., group=...)`
    all-gather + grad     x and y are all-gathered, the loss is taken of own rows × all columns and own columns × all
                          rows, and autograd reduce-scatters the gradients in float32: 2 (R − 1) n D (e + 4) bytes,
                          6 products of n × N × D
    ring + grad           blocks of y go round in forward, and in backward again with their gradients in float32:
                          2 (R − 1) n D e + 4 R n D bytes, 4 products

Time is that of the products at a sustained rate, and of the bytes at a link's; of the shorter of the two a share
`overlap` is hidden behind the longer. Each block's start costs a latency. Encoders, all that is O(N), and all that is
done to a tile beside the product are left out: a bound. Tiles are those of the PyTorch reference; of "ring + grad" none
is counted.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

import goal
from benchmarks.report import markdown


class Machine(NamedTuple):
    """What a rank has."""

    bandwidth: float  # bytes/s that it sends
    latency: float  # s, of one block
    rate: float  # FLOP/s of products, sustained
    overlap: float  # share of the shorter of products and sending that is hidden, 0 to 1


class Scheme(NamedTuple):
    """What one way costs a rank in a step."""

    name: str
    sent: int  # bytes
    flops: int
    blocks: int  # that are started one after the other
    held: int  # bytes beyond own rows and their gradients: others' rows, and tiles or strips of S


def schemes(ranks: int, n: int, d: int, dtype: torch.dtype, P: str, mining: str) -> list[Scheme]:
    """All four, for n rows of D a rank."""
    x = torch.empty(n, d, dtype=dtype, device="meta")
    gather, ring = (
        goal.explain(x, x, P=P, mining=mining, ranks=ranks, exchange=exchange) for exchange in ("gather", "ring")
    )
    e, others, product = dtype.itemsize, ranks - 1, 2 * n * n * ranks * d
    rows = n * d * e
    assert gather.gather is not None
    assert ring.ring is not None
    assert ring.rounds is not None
    strips = 2 * n * n * ranks * e  # of S, which autograd keeps
    return [
        Scheme("gather", gather.gather, gather.flops, others, gather.held),
        Scheme("ring", ring.ring, ring.flops, ring.rounds * ranks, ring.held),
        Scheme("all-gather + grad", 2 * others * n * d * (e + 4), 6 * product, 2 * others, 2 * ranks * rows + strips),
        Scheme("ring + grad", 2 * others * rows + 4 * ranks * n * d, 4 * product, 2 * ranks, 2 * rows + 4 * n * d),
    ]


def expected(scheme: Scheme, machine: Machine) -> float:
    """Seconds of a step."""
    computing = scheme.flops / machine.rate
    sending = scheme.sent / machine.bandwidth + scheme.blocks * machine.latency
    return computing + sending - machine.overlap * min(computing, sending)


def table(sizes: list[int], n: int, d: int, dtype: torch.dtype, P: str, mining: str, machine: Machine) -> str:
    heads = ["GPUs", "pairs", "scheme", "MB sent a rank", "TFLOP a rank", "ms", "MB held"]
    lines = [
        [
            ranks, ranks * n, one.name, f"{one.sent / 1e6:.4g}", one.flops / 1e12, 1e3 * expected(one, machine),
            f"{one.held / 1e6:.4g}",
        ]
        for ranks in sizes
        for one in schemes(ranks, n, d, dtype, P, mining)
    ]  # fmt: skip
    return markdown(heads, lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--rows", type=int, default=1024, help="pairs a GPU")
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", help="of the embeddings")
    parser.add_argument("--P", default="sig-ms")
    parser.add_argument("--mining", default="hardest")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="bytes/s that a GPU sends; 50e9 is 400 Gbit/s")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds to start a block")
    parser.add_argument("--rate", type=float, default=300e12, help="FLOP/s of products, sustained")
    parser.add_argument("--overlap", type=float, default=0.8, help="0: one after the other; 1: side by side")


def main(options: argparse.Namespace) -> None:
    machine = Machine(options.bandwidth, options.latency, options.rate, options.overlap)
    dtype = getattr(torch, options.dtype)
    print(table(options.gpus, options.rows, options.d, dtype, options.P, options.mining, machine))
    print(
        f"\n{options.rows} pairs a GPU, D = {options.d}, {options.dtype}, P = {options.P}, {options.mining}, "
        + ", ".join(f"{name} {value:g}" for name, value in machine._asdict().items())
        + "; a model, nothing measured"
    )
