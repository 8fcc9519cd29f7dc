"""An objective over the batches of many ranks: `group=` of `goal.apply`, `goal.gradients` and `goal.Objective`.

`joined` begins and ends a process group. `counting` counts the bytes that a rank sends. `gathered` gives every rank the
global batch, for a loss that has no `group=` of its own.
"""

from goal.distributed.exchange import counting, joined
from goal.distributed.rows import Global, gathered

__all__ = ["Global", "counting", "gathered", "joined"]
