"""Planted faults: is there a mistake that the suite would not see?

    python -m tests.faults [NAME ...] [--jobs 2]

A fault is a small edit of one file, with the short selection of tests that has to turn red under it. It is made in a
copy of the tree, so the checkout stays as it is, and in the text, not in a loaded module, so that it reaches the
processes of ranks, kernels in Triton's interpreter and the middle of a function. A fault that stays green is a hole in
the suite; one whose text has gone is stale, and has to be aimed again. Both are failures of this command.

`blind` are those by somebody who had not read the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("goal", "kernels", "benchmarks", "tests", "docs", "pyproject.toml", "README.md")
LIMIT = 600  # seconds after which a run counts as red: ranks that wait for each other would do so for ever


class Fault(NamedTuple):
    """A mistake that somebody could make."""

    name: str
    file: str
    old: str  # there exactly once
    new: str
    why: str  # what it would do to whom
    tests: str  # arguments of pytest: files, node ids, -k
    blind: bool = False


# ── selections ──────────────────────────────────────────────────────────────────────────────────────────────────────

CASES = "tests/test_contract.py -k 'oracle_in_float64 and {}'"
TILES = "tests/test_contract.py -k 'oracle_in_small_tiles and {}'"
LARGE = "tests/test_contract.py -k large_batches_in_large_tiles"
BLOCKS = "tests/test_contract.py -k 'blocks_merge or lowest_index or nan_in_one_block'"
R_POS = "tests/test_contract.py -k both_readings"
INCOMING = "tests/test_contract.py -k incoming_gradient"
RECIPES = "tests/test_contract.py -k 'hinge_recipes or smooth_recipes'"
FLOAT32_SOFT = "tests/test_contract.py -k 'float32_is_as_exact and soft'"
NAN = "tests/test_edges.py -k nan_shows"
BANK = "tests/test_bank.py"
AUGMENT = "tests/test_augment.py"
CACHE = "tests/test_caching.py"
EVALUATION = "tests/test_evaluation.py"
RANKS = "tests/test_distributed.py -k several_tiles"
RANKS_TABLE = "tests/test_distributed.py -k the_table"
RANKS_TIE = "tests/test_distributed.py -k equality"
RANKS_WAYS = "tests/test_distributed.py -k ways_of_ranks"
K_OBJECTIVES = "tests/test_kernels.py -k every_objective"
K_TIES = "tests/test_kernels.py -k 'lowest_index or all_rows_are_equal'"
K_STATISTICS = "tests/test_kernels.py -k statistics_of_every_request"
K_DENSE = "tests/test_kernels.py -k 'dense_tiles'"
K_EMIT = "tests/test_kernels.py -k sorted_emission"
K_HALVED = "tests/test_kernels.py -k 'fast_is_as_exact or best_of_several_tiles or mined_similarities'"

EAGER, TYPES, PATH = "goal/engine/eager.py", "goal/engine/types.py", "goal/engine/path.py"
SOFT, MINING = "goal/engine/soft.py", "goal/mining.py"
STATISTICS, PARTIALS = "goal/engine/statistics.py", "goal/engine/partials.py"
WEIGH, SIMILARITY = "goal/engine/weigh.py", "goal/similarity.py"
SPREAD, FORWARD = "goal/distributed/spread.py", "goal/distributed/forward.py"
MERGE, LAUNCH, BLOCKS_OF_KERNELS = "kernels/merge.py", "kernels/launch.py", "tests/test_blocks.py"
GATHER, RING = "goal/distributed/gather.py", "goal/distributed/ring.py"

FAULTS = (
    # ── mine ──
    Fault(
        "the candidates of a later tile are numbered one too high",
        EAGER,
        "index + offset if offset else index",
        "index + offset + 1 if offset else index",
        "beyond one tile the negative of y→x is the row after the hardest",
        TILES.format("con-hardest and dot"),
    ),
    Fault(
        "a tie goes to the highest index",
        EAGER,
        "values, index = tile.max(dim)",
        "values, index = tile.amax(dim), tile.shape[dim] - 1 - tile.flip(dim).max(dim).indices",
        "duplicates: which of them gets the gradient differs from path to path",
        CASES.format("con-hardest and dot"),
    ),
    Fault(
        "a tie down a long column goes to the last of a group",
        EAGER,
        "groups[group, :, columns].max(1).indices",
        "_GROUP - 1 - groups[group, :, columns].flip(1).max(1).indices",
        "the same in large batches alone, where columns are reduced by groups of rows",
        LARGE,
    ),
    Fault(
        "columns are mined without the ids",
        EAGER,
        "part, _ = back(tile[:, :n_cols], 0, inside",
        "part, _ = back(inside._replace(ids=None).hide(similarity.tile(x[at], y))[:, :n_cols], 0, inside",
        "a caption's own image's other captions become its image's negatives, in one direction only",
        TILES.format("con-hardest and dot"),
    ),
    Fault(
        "the hardest is counted in its own set",
        EAGER,
        "exp_count=valid - has",
        "exp_count=valid",
        "R⁻ of sig-ms is a mean over one too many",
        CASES.format("sig-ms-hardest and dot"),
    ),
    Fault(
        "zeros stay in the set of lin-ms",
        EAGER,
        "lin_count=(valid - ties).clamp_(min=0) * has",
        "lin_count=valid * has",
        "the hardest and its ties, which differ from it by 0, are in the mean",
        CASES.format("lin-ms-hardest and dot"),
    ),
    Fault(
        "semi-hard mining has no upper bound",
        EAGER,
        "(tile > above) & (tile < below), tile",
        "(tile > above), tile",
        "semi-hard is hardest",
        CASES.format("con-semi-hard and dot"),
    ),
    Fault(
        "semi-hard mining takes a copy of the positive",
        EAGER,
        "(s_pos - self.limits.tie).unsqueeze(dim)",
        "s_pos.unsqueeze(dim)",
        "rounding decides whether a negative that equals the positive lies below it",
        "tests/test_contract.py -k copy_of_the_positive",
    ),
    Fault(
        "a similarity below the range is no negative",
        EAGER,
        "torch.where(none & (count() > 0), torch.nan, s_neg)",
        "s_neg",
        "an anchor whose negatives all overflow to −inf loses its gradient in silence",
        "tests/test_range.py -k below_the_range",
    ),
    # ── masks ──
    Fault(
        "the pair is hidden one column off in a later tile",
        TYPES,
        "first - self.row_offset, first - self.col_offset",
        "first - self.row_offset, (first - self.col_offset + (self.row_offset > 0)) % max(tile.shape[1], 1)",
        "an anchor meets its own positive",
        TILES.format("con-hardest and dot"),
    ),
    Fault(
        "the mask of ids is transposed",
        TYPES,
        "torch.ne(self.ids[:, None], self.y_ids,",
        "torch.ne(*((self.y_ids[:, None], self.ids) if len(self.ids) == len(self.y_ids) else "
        "(self.ids[:, None], self.y_ids)),",
        "right as long as y_ids is ids",
        CASES.format("con-hardest and dot"),
    ),
    Fault(
        "the pair is counted as a negative where ids are equal anyway",
        TYPES,
        "pair &= own != others[place.clamp(0, m - 1)]",
        "pair &= True",
        "the mean over all negatives divides by one too few",
        CASES.format("con-all and dot"),
    ),
    Fault(
        "pairs are met as negatives by dense objectives",
        TYPES,
        "self.diagonal(live).zero_()",
        "pass",
        "each anchor is pushed away from its positive",
        CASES.format("nca-con-all and dot"),
    ),
    # ── merge ──
    Fault(
        "a tie between blocks goes to the highest index",
        PARTIALS,
        "(index < other_index)",
        "(index > other_index)",
        "which duplicate is met depends on how S was cut",
        BLOCKS,
    ),
    Fault(
        "a NaN loses the merge",
        PARTIALS,
        " | s.isnan()",
        "",
        "a block's NaN is hidden by the next block",
        BLOCKS,
    ),
    Fault(
        "sig-ms merges without its shift",
        PARTIALS,
        "torch.exp(-request.beta * gap) * (lost_total",
        "(lost_total",
        "R⁻ grows with the number of tiles",
        BLOCKS,
    ),
    Fault(
        "lin-ms merges without its shift",
        PARTIALS,
        "(lost_count + lost_ties * joins) * gap",
        "lost_ties * joins * gap",
        "R⁻ shrinks with the number of tiles",
        BLOCKS,
    ),
    Fault(
        "the hardest of the block that loses is not counted",
        PARTIALS,
        "exp_count=count + lost_count + joins",
        "exp_count=count + lost_count",
        "R⁻ is a mean over too few",
        BLOCKS,
    ),
    Fault(
        "an invalid hardest joins the sums",
        PARTIALS,
        "joins = lost >= limits.threshold",
        "joins = lost > -torch.inf",
        "tiles without a valid negative add one each",
        BLOCKS,
    ),
    # ── statistics ──
    Fault(
        "a positive is in its own set",
        STATISTICS,
        ".fill_diagonal_(-torch.inf)",
        "",
        "R⁺ of sig-ms holds exp(0) = 1 of the anchor itself",
        CASES.format("sig-ms-hardest and dot"),
    ),
    Fault(
        "a positive is counted in its own set beyond 256 pairs",
        STATISTICS,
        "(valid - (rank < valid).long())",
        "valid",
        "one batch, two answers: by the definition and by sorting",
        R_POS,
    ),
    Fault(
        "equal positives count beyond 256 pairs",
        STATISTICS,
        "(valid - equal).clamp(min=1)",
        "valid.clamp(min=1)",
        "zeros are in the mean of lin-ms's R⁺",
        R_POS,
    ),
    Fault(
        "R⁻ of sig-ms takes α for β",
        "goal/engine/settings.py",
        'beta=product.read_by("r_neg_exp")',
        'beta=product.read_by("r_pos_exp")',
        "right for no defaults, but near",
        CASES.format("sig-ms-hardest and dot"),
    ),
    # ── weigh ──
    Fault(
        "the hinge is open at its margin",
        "goal/terms/triplet.py",
        "+ margin > 0)",
        "+ margin >= 0)",
        "a triplet exactly at the margin has a gradient; the textbook's has none",
        "tests/test_contract.py -k exactly_at_the_margin",
    ),
    Fault(
        "the mean divides by the number of pairs",
        WEIGH,
        "share = share / torch.where(total == 0, 1, total)",
        "share = share / s_pos.shape[-1]",
        "the scale of a weighted batch depends on how many weigh nothing",
        CASES.format("con-hardest and dot"),
    ),
    Fault(
        "T-SelHN's zone is turned round",
        WEIGH,
        ".abs() < mining.eps",
        ".abs() > mining.eps",
        "all negatives away from the zone, the hardest within",
        CASES.format("con-selective and dot"),
    ),
    Fault(
        "an anchor that meets all negatives meets its hardest as well",
        WEIGH,
        "share = (~fallback).to(s_pos.dtype) * share",
        "pass",
        "T-SelHN's fallback rows count twice",
        CASES.format("con-selective and dot"),
    ),
    Fault(
        "an anchor without a negative is pulled",
        WEIGH,
        "share = has.to(s_pos.dtype) * share",
        "pass",
        "groups of one id, semi-hard anchors with nothing in their window",
        CASES.format("con-semi-hard and dot"),
    ),
    Fault(
        "the mean over all negatives counts the pair",
        WEIGH,
        "[[m - 1.0], [n - 1.0]]",
        "[[m - 0.0], [n - 0.0]]",
        "1/M for 1/(M − 1)",
        CASES.format("con-all and dot"),
    ),
    Fault(
        "each direction counts the other's negatives",
        WEIGH,
        "[[m - 1.0], [n - 1.0]]",
        "[[n - 1.0], [m - 1.0]]",
        "right as long as there are as many x as y",
        CASES.format("con-all and dot"),
    ),
    Fault(
        "a NaN is hidden",
        WEIGH,
        "share = share + torch.where(gone, torch.nan, 0.0).to(s_pos.dtype)",
        "pass",
        "con × con looks at no similarity: an overflow passes unseen",
        NAN,
    ),
    Fault(
        "1 + R⁺ for 1 − R⁺",
        "goal/terms/pair.py",
        "(1 - r_pos_lin)",
        "(1 + r_pos_lin)",
        "lin-ms pulls harder where it has to pull less",
        CASES.format("lin-ms-hardest and dot"),
    ),
    Fault(
        "the circle loss has twice its value",
        "goal/terms/pair.py",
        "/ (2 * tau)",
        "/ tau",
        "the value is not the loss whose gradient is emitted",
        RECIPES,
    ),
    # ── emit ──
    Fault(
        "the incoming gradient is dropped by mined objectives",
        PATH,
        "operators.mined_emit(does, block, part, incoming, needs)",
        "operators.mined_emit(does, block, part, None, needs)",
        "weights of a sum of losses, and loss scales, have no effect",
        INCOMING,
    ),
    Fault(
        "the incoming gradient is dropped by dense objectives",
        PATH,
        "dense = dense if incoming is None else dense.times(incoming)",
        "pass",
        "the same of all negatives",
        INCOMING,
    ),
    Fault(
        "the pull of y→x is forgotten",
        TYPES,
        "self.pull.sum(0)",
        "self.pull[0]",
        "pairs are pulled by half",
        CASES.format("con-hardest and dot"),
    ),
    Fault(
        "dense y→x weighs as x→y does",
        EAGER,
        "live[part] * dense.share[1 - dim, at]",
        "live[part] * dense.share[0, at]",
        "weights of one direction, or T-SelHN's anchors, go to the other",
        CASES.format("con-selective and dot"),
    ),
    Fault(
        "the value of dense y→x weighs as x→y does",
        EAGER,
        "dense.share[1 - dim, at].unsqueeze(dim),",
        "dense.share[0, at].unsqueeze(dim),",
        "the gradient is right and the value is not",
        CASES.format("con-selective and dot"),
    ),
    Fault(
        "entries of large batches are summed with each other's values",
        SIMILARITY,
        "False, value[order], False)",
        "False, value, False)",
        "beyond 4096 entries of S the gradient is gathered, from sorted entries",
        LARGE,
    ),
    Fault(
        "repeated entries of a matrix overwrite each other",
        SIMILARITY,
        "value, accumulate=True), None",
        "value, accumulate=False), None",
        "two directions that meet the same entry of S add there",
        "tests/test_contract.py -k 'matrix_against_the_oracle and hardest'",
    ),
    Fault(
        "the radial part of a cosine's gradient stays",
        SIMILARITY,
        "gradient - radial * embedded",
        "gradient",
        "steps change the length of rows, of which the objective knows nothing",
        CASES.format("con-hardest and cosine"),
    ),
    Fault(
        "x and y are swapped in order embeddings",
        SIMILARITY,
        "return -norm((y - x).clamp(min=0))",
        "return -norm((x - y).clamp(min=0))",
        "captions would have to be above images",
        CASES.format("con-hardest and order"),
    ),
    Fault(
        "the gradient at y has the sign of that at x in order tiles",
        SIMILARITY,
        "gy -= at_x.sum(0)",
        "gy += at_x.sum(0)",
        "dense objectives of order embeddings push where they pull",
        CASES.format("con-all and order"),
    ),
    # ── soft mining ──
    Fault(
        "the pair stands in the sum of soft mining",
        SOFT,
        "            masks.diagonal(exps).zero_()\n",
        "",
        "s̃⁻ rises with s⁺, and each anchor pushes its positive as well",
        CASES.format("soft and dot"),
    ),
    Fault(
        "candidates hide the pair",
        TYPES,
        "self.diagonal(tile).copy_(of_pairs)",
        "pass",
        "over='candidates' is over='negatives'",
        CASES.format("nca-con-soft and dot"),
    ),
    Fault(
        "the mean of soft mining subtracts nothing",
        MINING,
        "z = log_sum - count.log() if",
        "z = log_sum if",
        "normalise='mean' is 'sum': s̃⁻ grows with the batch",
        CASES.format("nca-con-soft and dot"),
    ),
    Fault(
        "the mean of soft mining does not count the pair among the candidates",
        WEIGH,
        "(_positives(masks, s_pos) if masks.by_ids else 1)",
        "(_positives(masks, s_pos) if masks.by_ids else 0)",
        "log Z − log n with one too few, and an anchor without negatives is taken for one without candidates",
        CASES.format("soft and dot"),
    ),
    Fault(
        "log-sums of two peaks are merged as if of one",
        PARTIALS,
        "torch.where(one == peak, 1, torch.exp(one - peak))",
        "torch.ones_like(one)",
        "s̃⁻ depends on how S was cut",
        BLOCKS,
    ),
    Fault(
        "the shift is not the one that was used",
        SOFT,
        "middle = like.new_tensor((low + high) / 2).item()",
        "middle = (low + high) / 2",
        "shares of kept exponentials are off by the rounding of a shift in float32",
        FLOAT32_SOFT,
    ),
    Fault(
        "the pull of an anchor without negatives is dropped in soft mining",
        WEIGH,
        "for one in (has_neg, has_pos, has_pos | has_neg))",
        "for one in (has_neg, both, has_pos | has_neg))",
        "a loss of two parts keeps the value of s⁺, without its gradient",
        CASES.format("con-con-soft and dot"),
    ),
    Fault(
        "soft mining forgets the pull of y→x",
        SOFT,
        "soft.pull[:, first : first + len(pairs)].sum(0)",
        "soft.pull[0, first : first + len(pairs)]",
        "pairs are pulled by half",
        CASES.format("soft and dot"),
    ),
    Fault(
        "the incoming gradient is dropped by soft mining",
        PATH,
        "part if incoming is None else part.times(incoming), needs)",
        "part, needs)",
        "as with the others",
        INCOMING,
    ),
    # ── all negatives, a positive pulled once ──
    Fault(
        "a positive is pulled once for each of its negatives",
        WEIGH,
        "if average else 1 / sizes.clamp(min=1)",
        "if average else torch.ones_like(sizes)",
        "pull='once' is 'each'",
        CASES.format("con-con-all and dot"),
    ),
    Fault(
        "the pull of an anchor without negatives is dropped where positives are pulled once",
        WEIGH,
        "alone = torch.where(sizes == 0, share * with_pos, 0)",
        "alone = torch.zeros_like(share)",
        "a sum such as SigLIP's has a part of s⁺ that no negative belongs to",
        CASES.format("con-con-all and dot"),
    ),
    # ── positives by ids, directions, scale ──
    Fault(
        "the hardest positive is the most similar",
        EAGER,
        "masks.hide(tile.neg_(), ",
        "masks.hide(tile, ",
        "the easiest positive takes the pull",
        CASES.format("con-hardest and dot"),
    ),
    Fault(
        "positives of two tiles: the first tile's stand for all",
        PARTIALS,
        "a.own + b.own",
        "torch.where(a.own == 0, b.own, a.own)",
        "right for pairs, which are in a single tile; a mean over positives by ids is not",
        TILES.format("dot"),
    ),
    Fault(
        "the threshold of y→x is that of x→y",
        EAGER,
        "Limits(forth - BAND, tie, back - BAND)",
        "Limits(forth - BAND, tie, forth - BAND)",
        "by ids the two directions have positives of their own, and another min s⁺",
        CASES.format("sig-ms-hardest and dot"),
    ),
    Fault(
        "the incoming gradient is dropped at positives by ids",
        PATH,
        "(of_mined, incoming)):",
        "(of_mined, None)):",
        "a loss scale multiplies the push alone",
        INCOMING,
    ),
    Fault(
        "scale is forgotten",
        WEIGH,
        "share = share * settings.factor",
        "pass",
        "value and gradient are those of scale=1",
        CASES.format("con-hardest and dot"),
    ),
    Fault(
        "the direction that is left out emits",
        WEIGH,
        "[[1.0], [0.0]] if forth else [[0.0], [1.0]]",
        "[[1.0], [1.0]]",
        "directions='x→y' is 'both'",
        CASES.format("con-hardest and dot"),
    ),
    # ── banks, made rows ──
    Fault(
        "each of two one-way calls goes both ways",
        "goal/candidates/two_way.py",
        "torch.eye(2, dtype=scale.dtype",
        "torch.ones(2, 2, dtype=scale.dtype",
        "rows of the bank are met by both sides, and pairs are pulled twice",
        BANK,
    ),
    Fault(
        "a bank keeps its rows' graphs",
        "goal/candidates/bank.py",
        "x, y = call.x.to(self.x.rows.dtype), call.y",
        "x, y = call.inputs[0].to(self.x.rows.dtype), call.y",
        "memory grows with every step",
        BANK,
    ),
    Fault(
        "a bank forgets how many rows did not fit",
        "goal/candidates/bank.py",
        "self.pushed += len(rows)",
        "self.pushed += len(rows) - first",
        "after a batch that is larger than the bank, young rows go first",
        BANK,
    ),
    Fault(
        "mixtures stay in the order of their ids",
        "goal/candidates/augment.py",
        "rows[:, back].flatten(0, 1)",
        "rows.flatten(0, 1)",
        "a mixture has another item's id, and is its own item's negative",
        AUGMENT,
    ),
    Fault(
        "made rows have each other's ids",
        "goal/candidates/augment.py",
        "ids[a].repeat(n)",
        "ids[a].repeat_interleave(n)",
        "right for n = 1",
        AUGMENT,
    ),
    # ── ranks ──
    Fault(
        "ranks send what they found for columns in the order of finding",
        GATHER,
        "in_order = [parts[1], here, *parts[2:]] if own.start else parts",
        "in_order = parts",
        "rank 0 is right; the others' owners get each other's columns",
        RANKS,
    ),
    Fault(
        "min s⁺ is the own rank's",
        FORWARD,
        "pairs = Pairs(s_pos, agreed.bounds.to(pairs.bounds.dtype))",
        "pairs = Pairs(s_pos, torch.tensor(does.bounds(block, pairs, settings.request), dtype=torch.float64))",
        "sets of multi-similarity depend on how the batch is spread",
        RANKS,
    ),
    Fault(
        "what is equal is decided block by block",
        SPREAD,
        "spread.backend.mine(block, spread.pairs, request)",
        "spread.backend.mine(block, spread.pairs._replace(bounds=block.x.new_empty(0)), request)",
        "ties depend on which rank has the longest row",
        RANKS_TIE,
    ),
    Fault(
        "a ring keeps the row of an earlier winner",
        RING,
        "index != _negative(before)",
        "index < _negative(before)",
        "the gradient at x is that of another negative",
        RANKS,
    ),
    Fault(
        "what other ranks pulled is forgotten in a ring",
        RING,
        "taken[1, here] = home[0]",
        "pass",
        "dense objectives pull by half",
        RANKS,
    ),
    Fault(
        "of two ranks that share a negative the last one counts",
        RING,
        "torch.zeros_like(gradient).index_add_(0, self.at, came)",
        "torch.zeros_like(gradient).index_copy_(0, self.at, came)",
        "hubs get a part of their gradient",
        RANKS,
    ),
    Fault(
        "averaged=True multiplies the value",
        FORWARD,
        "return Outcome(value, emission",
        "return Outcome(value * emission.by, emission",
        "the loss that is logged grows with the number of ranks",
        RANKS_TABLE,
    ),
    Fault(
        "ranks are taken for equally large",
        "goal/distributed/rows.py",
        "start = sum(counts[: wire.rank])",
        "start = wire.rank * len(own.x)",
        "with an uneven last batch the gradient goes to another rank's rows",
        RANKS_WAYS,
    ),
    Fault(
        "a ring forgets the round of positives",
        RING,
        "rounds.append(of_positives.entries(of_positives.pull))",
        "pass",
        "by ids nothing is pulled",
        RANKS_TABLE,
    ),
    Fault(
        "positives of a rank's rows are those of the last block",
        SPREAD,
        "[merge(of_rows[0], rows, request, nowhere) if of_rows else rows]",
        "[rows]",
        "a positive on another rank counts if its rank comes last",
        RANKS_TABLE,
    ),
    Fault(
        "over ranks columns are merged by the threshold of x→y",
        SPREAD,
        "spread.limits.of(0), spread.limits.of(1)",
        "spread.limits.of(0), spread.limits.of(0)",
        "by ids R⁻ of y→x depends on how the batch is spread",
        RANKS_TABLE,
    ),
    # ── a cached step ──
    Fault(
        "the last chunk is forgotten",
        "goal/caching.py",
        "len(each.slices) - bool(each.replicas)",
        "len(each.slices) - 1",
        "it is left for replicas, which reduce with it",
        CACHE,
    ),
    Fault(
        "running statistics are updated twice",
        "goal/caching.py",
        "                _put_back(kept)",
        "                pass",
        "batch norm sees each batch twice",
        CACHE,
    ),
    Fault(
        "every chunk draws the first one's random numbers",
        "goal/caching.py",
        "states[part].clone()",
        "states[0].clone()",
        "dropout differs between the turns, and a step that is right raises",
        CACHE,
    ),
    # ── evaluation ──
    Fault(
        "a tie counts for the model",
        "goal/evaluation.py",
        "1 + above + level",
        "1 + above",
        "a collapsed model has a recall of 100 %",
        EVALUATION,
    ),
    Fault(
        "relevant items go first among equals",
        "goal/evaluation.py",
        "relevant.argsort(dim=1, stable=True)",
        "relevant.argsort(dim=1, stable=True, descending=True)",
        "the same in average precision",
        EVALUATION,
    ),
    Fault(
        "Recall@K counts ranks below K",
        "goal/evaluation.py",
        "(rank <= k)",
        "(rank < k)",
        "R@1 is 0",
        EVALUATION,
    ),
    # ── kernels ──
    Fault(
        "a kernel's index lacks its tile",
        MERGE,
        "row.begin + t * row.length + place_of(best)",
        "row.begin + place_of(best)",
        "beyond one tile another negative is met",
        K_TIES,
    ),
    Fault(
        "among equal candidates of many tiles the last ones are kept",
        MERGE,
        "n > v.a, n > v.b, n > v.c, n > v.d",
        "n >= v.a, n >= v.b, n >= v.c, n >= v.d",
        "with more equal ones than are kept, the lowest index is lost",
        K_TIES,
    ),
    Fault(
        "among equal candidates that are kept the highest index wins",
        MERGE,
        "(s == best) & (at < index)",
        "(s == best) & (at > index)",
        "kernels and eager meet different duplicates",
        K_TIES,
    ),
    Fault(
        "a packed key finds the place after its own",
        "kernels/bits.py",
        "return -best & 255",
        "return (-best & 255) + 1",
        "off by one",
        K_TIES,
    ),
    Fault(
        "columns begin again with every chunk of rows",
        MERGE,
        "begin, at = tiles.first * CUT.height,",
        "begin, at = 0,",
        "beyond what is held at once, anchors of y→x meet the last chunk alone",
        K_STATISTICS,
    ),
    Fault(
        "kernels count the hardest in its own set",
        MERGE,
        "tl.where(scored.best >= limits.least, 1.0, 0.0)",
        "0.0",
        "R⁻ of sig-ms is a mean over one too many",
        K_STATISTICS,
    ),
    Fault(
        "dense kernels meet equal ids",
        "kernels/tile.py",
        "live = live & ~same_ids(row, first_col + place, ids, block)",
        "live = live",
        "the scan has a mask of its own, so that mined objectives are right",
        K_DENSE,
    ),
    Fault(
        "the emission takes the other direction's negative",
        "kernels/emit.py",
        "tl.load(mined.negative + own + target",
        "tl.load(mined.negative + away + target",
        "the push of an anchor comes from the wrong row",
        K_EMIT,
    ),
    Fault(
        "the sorted emission takes the other direction's order",
        "kernels/emit.py",
        "tl.load(order + away + place",
        "tl.load(order + own + place",
        "beyond 1024 pairs",
        K_EMIT,
    ),
    Fault(
        "a small weighing kernel has a positive in its own set",
        "kernels/weigh.py",
        "valid & (k[None, :] != anchor[:, None]) & (alpha",
        "valid & (alpha",
        "R⁺ of sig-ms holds exp(0) = 1 of the anchor itself",
        K_OBJECTIVES,
    ),
    Fault(
        "dense kernels weigh y→x as x→y",
        "kernels/dense.py",
        "pull, push = _entries(cols, col, on",
        "pull, push = _entries(rows, col, on",
        "weights of one direction go to the other",
        K_OBJECTIVES,
    ),
    Fault(
        "a later chunk of G overwrites the gradient of an earlier one",
        "kernels/dense.py",
        "total + tl.load(p_out, mask=inside, other=0)",
        "total",
        "beyond what is held at once, y has the gradient of the last rows alone",
        K_DENSE,
    ),
    # ── by somebody who had not read the tests ──
    Fault(
        "the row direction's hardest stay erased for the column direction",
        EAGER,
        "            shared.exps.scatter_(dim, hardest, outside)\n",
        "",
        "both directions share exponentials: R⁻ of y→x lacks entries, only where a tile is shared",
        LARGE,
        blind=True,
    ),
    Fault(
        "ids are coded in the input's dtype",
        EAGER,
        "codes = codes.to(dtype)",
        "codes = codes.to(torch.bfloat16).to(dtype)",
        "bfloat16 holds integers up to 256 only: with more ids, rows of others are taken for the same",
        "tests/test_contract.py -k told_apart",
        blind=True,
    ),
    Fault(
        "the hardest counts itself where exponents span widely",
        EAGER,
        "exps.mul_(shared.valid).scatter_(dim, hardest, 0).sum(dim)",
        "exps.mul_(shared.valid).sum(dim)",
        "beyond β · range = 80 in float32 the hardest's own 1 joins R⁻ of sig-ms",
        "tests/test_range.py -k right_or_not_finite",
        blind=True,
    ),
    Fault(
        "positives that underflow are counted beyond 256 pairs",
        STATISTICS,
        "torch.minimum(reach, own + _UNDERFLOW / alpha), right=True",
        "reach, right=True",
        "sorted R⁺ of sig-ms divides by entries that are exactly 0: one batch of long rows, two answers",
        R_POS,
        blind=True,
    ),
    Fault(
        "tied negatives of the block that loses count once",
        PARTIALS,
        "lost_ties * (joins & ~tied)",
        "(joins & ~tied)",
        "R⁻ of lin-ms divides by too few where a tile's hardest is there twice: it depends on how S was cut",
        BLOCKS,
        blind=True,
    ),
    Fault(
        "a repaired bank is turned the wrong way",
        "goal/candidates/bank.py",
        "each.roll(-first, 0)",
        "each.roll(first, 0)",
        "after a loaded state with rows that are not finite, young rows go first",
        BANK,
        blind=True,
    ),
    Fault(
        "the bank's y goes by the ids of its x",
        "goal/candidates/bank.py",
        "beside_y = past_y._replace(rows=past_y.rows.to(call.y.dtype))",
        "beside_y = past_y._replace(rows=past_y.rows.to(call.y.dtype), ids=past_x.ids)",
        "invisible as long as y_ids is ids",
        BANK,
        blind=True,
    ),
    Fault(
        "a ring's gradient is scaled in place",
        RING,
        "else one * incoming for one in wanted]",
        "else one.mul_(incoming) for one in wanted]",
        "a second backward under a loss scale is multiplied twice",
        RANKS_WAYS,
        blind=True,
    ),
    Fault(
        "the small weighing kernel reaches from the selected negative",
        "kernels/weigh.py",
        "anchor, hardest + 0.1, alpha",
        "anchor, met + 0.1, alpha",
        "with semi-hard mining the set of positives shrinks: R⁺ is to use the hardest whatever the mining",
        K_OBJECTIVES,
        blind=True,
    ),
    Fault(
        "half-precision products are scaled back by the wrong side's norm",
        LAUNCH,
        "length=2 - walk.side",
        "length=1 + walk.side",
        "the gradient of large float32 batches is off by a power of two unless max ‖x‖ and max ‖y‖ share a binade",
        K_DENSE,
        blind=True,
    ),
    Fault(
        "invalid candidates that drop out of the four join the sum",
        MERGE,
        "joins = (out >= 0) & (left >= least)",
        "joins = out >= 0",
        "R⁻ of sig-ms grows, but only with more than four tiles and a tile without a valid negative",
        "tests/test_kernels.py -k programs_as_they_are",
        blind=True,
    ),
    Fault(
        "candidates of the half-precision scan are not scored again",
        LAUNCH,
        '"halved": 2**-9}',
        '"halved": 2**-20}',
        "the winner among float16 similarities stands although another candidate is higher in float32",
        K_HALVED,
        blind=True,
    ),
    # ── blocks ──
    Fault(
        "a block's rows count for its columns too",
        GATHER,
        "yield self.rows, (True, False)",
        "yield self.rows, (True, True)",
        "over ranks the own columns get what the own rows give them twice",
        RANKS,
    ),
    Fault(
        "a kernel's pairs lie on the diagonal of its block",
        "kernels/tile.py",
        "return (row + (or_zero(block.ahead) - first_col)).to(tl.int32)",
        "return (row - first_col).to(tl.int32)",
        "over ranks strangers are taken for pairs, and pairs for negatives",
        f"{BLOCKS_OF_KERNELS} -k 'statistics and hardest'",
    ),
    Fault(
        "a kernel numbers candidates within its block",
        MERGE,
        "tl.store(out.negative + at, scored.index.to(tl.int64) + offset",
        "tl.store(out.negative + at, scored.index.to(tl.int64)",
        "over ranks a gradient goes to another rank's row",
        f"{BLOCKS_OF_KERNELS} -k 'statistics and hardest'",
    ),
    Fault(
        "the emission looks for rows within its block",
        "kernels/emit.py",
        "_rows(other, negative - begins, others",
        "_rows(other, negative, others",
        "the same for the rows that a block reads",
        f"{BLOCKS_OF_KERNELS} -k mined_entries",
    ),
    Fault(
        "kernels merge blocks by another tie",
        LAUNCH,
        "torch.floor(_slack(d) * reach * scale) + 0.5",
        "torch.floor(_slack(d) * reach * scale) - 0.5",
        "close similarities in two blocks count as below each other",
        f"{BLOCKS_OF_KERNELS} -k limits",
    ),
)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Outcome(NamedTuple):
    fault: Fault
    verdict: str  # "red"; or "GREEN", "STALE", "BROKEN", which are failures
    first: str  # the first test that failed, or what is wrong
    seconds: float


def stale(fault: Fault, root: Path = ROOT) -> str | None:
    """What is wrong with a fault's text, or None."""
    path = root / fault.file
    if not path.is_file():
        return f"there is no {fault.file}"
    count = path.read_text().count(fault.old)
    return None if count == 1 else f"its text is {count} times in {fault.file}, and not once"


def copy_tree(root: Path, to: Path) -> None:
    """What tests look at, with the times of its files, so that bytecode stays good."""
    ignore = shutil.ignore_patterns("__pycache__", "img", ".*")
    for part in PARTS:
        if (root / part).is_dir():
            shutil.copytree(root / part, to / part, symlinks=True, ignore=ignore)
        elif (root / part).exists():
            shutil.copy2(root / part, to / part)


@contextlib.contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """The tree with the fault in it."""
    path = tree / fault.file
    text, times = path.read_text(), path.stat()
    path.write_text(text.replace(fault.old, fault.new))
    os.utime(path, (times.st_atime, times.st_mtime + 100))  # bytecode goes by whole seconds and the size
    try:
        yield
    finally:
        path.write_text(text)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class Runner:
    """Runs selections of tests in copies of a tree, a few at a time; whatever runs is ended with it."""

    def __init__(self, root: Path, jobs: int) -> None:
        self.root, self.jobs = root, jobs
        self._trees: SimpleQueue[Path] = SimpleQueue()
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._ended = threading.Lock(), False

    def __enter__(self) -> Runner:
        self._folder = tempfile.TemporaryDirectory(prefix="faults-")
        for number in range(self.jobs):
            tree = Path(self._folder.name) / str(number)
            tree.mkdir()
            copy_tree(self.root, tree)
            self._trees.put(tree)
        self._pool = ThreadPoolExecutor(self.jobs)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for process in self._running:
                end(process)
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def clean(self, tests: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """Selections in the order of their end, each with what is wrong with it where nothing is planted."""
        futures = {self._pool.submit(self._clean, selection): selection for selection in tests}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def faults(self, faults: Sequence[Fault]) -> Iterator[Outcome]:
        """The outcomes, in the order of their end."""
        for future in as_completed([self._pool.submit(self._fault, fault) for fault in faults]):
            yield future.result()

    def _clean(self, tests: str) -> str | None:
        tree = self._trees.get()
        try:
            code, said = self._pytest(tree, tests, bytecode=True)
        finally:
            self._trees.put(tree)
        return None if code == 0 else f"{first_failure(said) or f'pytest ends with {code}'}\n{said}"

    def _fault(self, fault: Fault) -> Outcome:
        tree, start = self._trees.get(), time.monotonic()
        try:
            wrong = stale(fault, tree)
            if wrong is not None:
                return Outcome(fault, "STALE", wrong, 0.0)
            with planted(fault, tree):
                code, said = self._pytest(tree, fault.tests)
        finally:
            self._trees.put(tree)
        seconds = time.monotonic() - start
        if code is None:
            return Outcome(fault, "red", f"no end within {LIMIT} s", seconds)
        what = "" if code == 0 else first_failure(said) or f"pytest ends with {code}"
        verdict = "GREEN" if code == 0 else "red" if "::" in what else "BROKEN"  # a file that is no Python any more
        return Outcome(fault, verdict, what, seconds)

    def _pytest(self, tree: Path, tests: str, bytecode: bool = False) -> tuple[int | None, str]:
        """The exit status, None for a run that had to be ended, and what was said."""
        outer = ("PYTEST_XDIST", "PYTEST_CURRENT", "PYTEST_ADDOPTS")  # of a run of pytest that this is a part of
        environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        if not bytecode:
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        with self._lock:
            if self._ended:
                return None, ""
            process = subprocess.Popen(
                [*command, *shlex.split(tests)],
                cwd=tree,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # so that it is ended with all ranks' processes
            )
            self._running.add(process)
        try:
            said, _ = process.communicate(timeout=LIMIT)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with self._lock:
                end(process)
                self._running.discard(process)


def end(process: subprocess.Popen[str]) -> None:
    """It, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def first_failure(said: str) -> str | None:
    """The test that pytest's summary names first."""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    return None if found is None else found.group(1)


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown."""
    lines = ["| fault | file | | first failing test | s |", "|---|---|---|---|---:|"]
    for fault, verdict, first, seconds in outcomes:
        name = f"{fault.name} (blind)" if fault.blind else fault.name
        what = f"`{first}`" if verdict == "red" else first
        cells = name, f"`{fault.file}`", verdict, what, f"{seconds:.0f}"
        lines.append(f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |")
    return "\n".join(lines)


def run(faults: Sequence[Fault], jobs: int = 1, root: Path = ROOT, clean: bool = True) -> list[Outcome]:
    """Every fault's outcome, in their order; `clean`: first each selection without a fault, which has to be green.

    Raises:
        RuntimeError: a selection is not green without a fault.
    """

    def tell(done: int, of: int, what: str) -> None:
        print(f"[{done}/{of}] {what}", file=sys.stderr, flush=True)

    with Runner(root, jobs) as runner:
        selections = list(dict.fromkeys(fault.tests for fault in faults)) if clean else []
        for number, (tests, wrong) in enumerate(runner.clean(selections), 1):
            tell(number, len(selections), f"clean: {tests}")
            if wrong is not None:
                raise RuntimeError(f"not green without a fault: {tests}\n{wrong}")
        found = {}
        for number, outcome in enumerate(runner.faults(faults), 1):
            tell(number, len(faults), f"{outcome.verdict:6} {outcome.seconds:4.0f} s  {outcome.fault.name}")
            found[outcome.fault.name] = outcome
    return [found[fault.name] for fault in faults]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Plant faults and want red tests.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults, or a part of it; by default all")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time (%(default)s)")
    asked = parser.parse_args(arguments)
    for name in asked.names:
        if not any(name in fault.name for fault in FAULTS):
            parser.error(f"no fault's name has {name!r} in it")
    faults = [fault for fault in FAULTS if not asked.names or any(name in fault.name for name in asked.names)]
    try:
        outcomes = run(faults, asked.jobs, ROOT)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(outcomes))
    missed = [outcome for outcome in outcomes if outcome.verdict != "red"]
    print(f"\n{len(outcomes) - len(missed)} of {len(outcomes)} faults turn the suite red.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
