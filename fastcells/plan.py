"""Which schedule for which shape: every choice of the engine is made here, from sizes alone, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

DEPTH, SINGLE_ROW_DEPTH = 512, 256  # of the products of several rows, and of one, that are summed up at a time, about
AHEAD_BYTES = 1 << 20  # of the weights of a step, which a second-level cache no longer holds: they are asked for ahead
NEAR_BYTES = 1 << 15  # that a first-level cache may hold
BESIDE_STEPS = 32  # from which on most input projections of one sequence can be made beside its recurrence
FAR_BYTES = 1 << 23  # of all weights, which a process's share of a third-level cache still holds
FUSED_ROWS = 12  # of a step, from which on reading the input's weights at each costs less than to store its products
FETCHED_INPUTS = 18  # for each of these rows, from which on it costs more where the weights are far, and slow to come
STORED_DEPTH = 10  # of a product, that takes as long as to store its result and to load it again
FOLDED_DEPTH = 64  # of a dot product, that takes as long as to fold its sums
DOT_UNITS = 4  # whose dot products with several rows are made at a time
DOT_BYTES = 150  # of weights: to compare so many with those that were packed takes as long as a dot product does beyond
# its part of a tile; where all lie in a second-level cache, three times as many; to pack them for training, 2 / 5
ROW_BLOCK = 96  # rows that go through all time steps together
THREAD_FLOPS = 400_000  # of a call, below which waking a team costs more than it brings
WAIT_FLOPS = 9_000  # that a barrier costs for each thread that meets there,
EXCHANGE_FLOPS = 30  # and a number that it left in one thread's cache for others
PACKED_FLOPS = 30_000_000  # of a call, or past the ends of its sequences, from which on to pack stretches saves more
PACKED_ROWS = 2  # than that takes: the former of so many sequences, which stretches turn into more, side by side
UNITS_A_PIECE = 16  # that threads share
# To read weights takes as long as to multiply so many rows by them: from a first-level cache, from a second-level one,
# and where they are far, since threads that share rows then take them from each other's share of a cache. Backward,
# where sharing units has the gates' gradients pass between threads, it is READ_ROWS for each of the threads, and no
# more than BACK_ROWS.
NEAR_ROWS, READ_ROWS, FAR_ROWS, BACK_ROWS = 2, 4, 20, 16
UNITS_A_ROW = 8  # in a backward pass, from which on reading all gates' gradients costs less than all weights


class Shape(NamedTuple):
    """One layer, by one of its directions. steps: T; rows: N at the fullest step; total: rows of all steps; gates:
    blocks of weight rows; depth: of the recurrent product (H, or the projected size); item: bytes of a number; threads:
    at most, of all directions; training: weights are new at each call, and backward products follow; apart: the cell
    needs its input projections before the time loop; rides: kernels can make them beside the recurrence of a single
    sequence; lanes: units to whose multiples tiles fill up each gate; distant: a third-level cache is slow."""

    steps: int
    rows: int
    total: int
    inputs: int
    hidden: int
    depth: int
    gates: int
    item: int
    threads: int
    directions: int = 1
    training: bool = False
    apart: bool = False
    rides: bool = False
    lanes: int = 1
    distant: bool = False


class Share(NamedTuple):
    """How many threads, and what they share: "rows" or "units"."""

    threads: int
    split: str


@dataclass(frozen=True)
class Plan:
    """forward, back: what threads share of one direction, in either pass. side_by_side: each direction has threads of
    its own. project_ahead: the input projection of all time steps is one product before the loop; beside: of the first
    steps alone, those of others are made in the loop, some steps before they are needed. in_place: weights are
    read as they are, not packed first; dots: those of the input projection are, if it is ahead. row_block: see the
    constant. reasons: a sentence a choice."""

    forward: Share
    back: Share
    side_by_side: bool
    project_ahead: bool
    beside: bool
    in_place: bool
    dots: bool
    row_block: int
    reasons: tuple[str, ...]

    @property
    def schedule(self) -> tuple:
        """All but the reasons."""
        shares = self.forward, self.back, self.side_by_side
        return *shares, self.project_ahead, self.beside, self.in_place, self.dots, self.row_block


@lru_cache(maxsize=1024)
def plan(shape: Shape) -> Plan:
    """The schedule for a layer's time loop; the same for one thread or many, but for who does what."""
    step_flops = 2 * shape.gates * shape.hidden * (shape.depth + shape.inputs) * shape.rows
    flops = step_flops * shape.total // max(shape.rows, 1)
    recurrent_bytes = shape.gates * shape.hidden * shape.depth * shape.item
    weight_bytes = recurrent_bytes + shape.gates * shape.hidden * shape.inputs * shape.item
    in_place = not shape.apart and reads_in_place(shape, weight_bytes)
    dots = in_place or fills_dots(shape)
    if shape.apart:
        project_ahead, why = True, "the cell takes sums of it over the units"
    elif dots and not in_place:
        project_ahead, why = True, f"{shape.inputs} inputs fill vectors better than {shape.gates} gates' columns"
    elif shape.steps == 1:
        project_ahead, why = False, "there is one step only"
    elif in_place:
        project_ahead, why = True, "its weights are read once, as they are"
    elif shape.rows < FUSED_ROWS:
        project_ahead, why = True, f"{shape.rows} row(s) a step do not pay for reading the input weights each time"
    elif shape.distant and weight_bytes > AHEAD_BYTES and shape.inputs > FETCHED_INPUTS * shape.rows:
        project_ahead, why = True, f"{shape.rows} rows a step do not pay for fetching weights of {shape.inputs} inputs"
    elif weight_bytes > FAR_BYTES:
        project_ahead, why = True, f"all {weight_bytes:,} bytes of weights are more than caches keep from step to step"
    elif fills(shape) * shape.inputs > STORED_DEPTH * shape.gates * shape.hidden:
        project_ahead, why = True, f"gates of {shape.hidden} units fill fewer vectors together than one by one"
    else:
        project_ahead, why = False, "it goes into the same sums, and is stored nowhere"
    beside = (
        project_ahead
        and not dots
        and shape.rides
        and shape.rows == 1
        and shape.steps >= BESIDE_STEPS
        and NEAR_BYTES <= recurrent_bytes <= AHEAD_BYTES
        and shape.inputs * 3 >= shape.depth
    )
    if beside:
        reasons = ["input projection of steps to come beside the recurrence: one sequence's waits for its weights"]
    elif project_ahead:
        reasons = [f"input projection of all {shape.steps} steps ahead: {why}"]
    else:
        reasons = [f"input projection fused into the recurrent product: {why}"]

    side_by_side = shape.directions > 1 and shape.threads >= shape.directions and 2 * flops >= THREAD_FLOPS
    available = shape.threads // shape.directions if side_by_side else shape.threads
    # The input's part of a step is there before the loop, or done in the shadow of the rest.
    alone = step_flops * shape.depth // (shape.depth + shape.inputs)
    read = recurrent_bytes if project_ahead else weight_bytes
    near = shape.depth < UNITS_A_ROW * shape.rows
    forward, back = (
        share(
            shape.rows, flops, available, chained=alone, units=shape.hidden, told=told, weight_bytes=weights, back=back
        )
        for weights, told, back in (
            (read, shape.depth, False),
            (0 if near else recurrent_bytes, shape.gates * shape.hidden, True),
        )
    )
    if side_by_side:
        reasons.append(f"the {shape.directions} directions run side by side, {forward.threads} thread(s) each")
    elif forward.threads == 1:
        why = (
            "one thread is set"
            if shape.threads == 1
            else f"{flops:,} operations, {step_flops:,} a step: too few to share"
        )
        reasons.append(f"one thread: {why}")
    elif forward.split == "rows":
        reasons.append(f"{forward.threads} threads share the {shape.rows} sequences: they never wait for each other")
    else:
        few = f"{shape.rows} sequence(s) are too few for each to read all weights"
        reasons.append(f"{forward.threads} threads share the units, with a barrier a step: {few}")
    if back != forward:
        reasons.append(f"backward, {back.threads} share the {back.split}: there are more gradients to exchange")
    if in_place:
        reasons.append(f"weights read as they are: {shape.total} row(s) of all steps do not pay for packed ones")
    row_block = shape.rows if shape.rows <= ROW_BLOCK else -(-shape.rows // -(-shape.rows // ROW_BLOCK))
    return Plan(forward, back, side_by_side, project_ahead, beside, in_place, dots, row_block, tuple(reasons))


def reads_in_place(shape: Shape, weight_bytes: int) -> bool:
    """Whether dot products with the weights as they are take less time than tiles of packed ones, with what it takes to
    see that these are still the same, or to pack them. Of several steps the input's are products of their own."""
    if shape.total == 1:
        return True
    dots = shape.total * shape.gates * shape.hidden * DOT_BYTES * (1 if shape.steps == 1 else 2)
    near = weight_bytes <= AHEAD_BYTES // 4
    return dots < weight_bytes * (5 if shape.training else 2) // (6 if near else 2)


def fills_dots(shape: Shape) -> bool:
    """Whether the input projection takes less time as dot products, with the inputs along the vectors, than in tiles,
    with the gates' columns along them."""
    columns = shape.gates * shape.hidden
    weight_bytes, whole = columns * shape.inputs * shape.item, -(-columns // shape.lanes) * shape.lanes
    dots = -(-columns // DOT_UNITS) * DOT_UNITS * (shape.inputs + FOLDED_DEPTH)
    return dots * (3 if weight_bytes <= 2 * NEAR_BYTES else 4) < whole * shape.inputs * 3


def fills(shape: Shape) -> int:
    """Columns that tiles multiply for nothing where each gate has vectors of its own, and not where gates have them
    together."""
    apart, together = (-(-units // shape.lanes) for units in (shape.hidden, shape.gates * shape.hidden))
    return (shape.gates * apart - together) * shape.lanes


def share(
    rows: int,
    flops: int,
    threads: int,
    *,
    chained: int = 0,
    units: int = 0,
    told: int = 0,
    weight_bytes: int = 0,
    back: bool = False,
) -> Share:
    """What so many threads at most share. chained: operations of a step that the next step's wait for, 0: none do;
    units: that may be shared; told: numbers a row of a step's results that the next step needs; weight_bytes: of what
    every thread reads, at each step, to share rows; back: backward in time."""
    if threads == 1 or flops < THREAD_FLOPS:
        return Share(1, "rows")
    far = weight_bytes > AHEAD_BYTES and weight_bytes * threads >= FAR_BYTES
    if far:
        read = min(READ_ROWS * threads, BACK_ROWS) if back else FAR_ROWS
    else:
        read = READ_ROWS if weight_bytes > NEAR_BYTES else NEAR_ROWS
    if rows >= threads * read:
        return Share(threads, "rows")
    work = chained or flops

    def step(rows_a_thread: int) -> float:
        """Half of the multiply-adds pass while weights are read."""
        return work / rows * max(rows_a_thread, (rows_a_thread + read) / 2)

    # What the thread with the most of it does, and of steps what it costs that there are others.
    pieces, costs = max(-(-units // UNITS_A_PIECE), 1), {Share(1, "rows"): step(rows)}
    woken, exchanged = THREAD_FLOPS * chained / flops, EXCHANGE_FLOPS * rows * told
    for several in range(2, threads + 1):
        by_rows = step(-(-rows // several))
        by_units = step(rows) * -(-pieces // several) / pieces + exchanged + (WAIT_FLOPS * several if chained else 0)
        for split, cost in (("rows", by_rows), ("units", by_units)):
            costs[Share(several, split)] = cost + woken * (several - 1)
    return min(costs, key=lambda s: costs[s])


def worth_packing(sequences: int, flops: int, padding: int) -> bool:
    """Whether running the packed stretches between resets saves more than running all steps and resetting there.
    flops: of the call; padding: of its steps past the ends."""
    return padding > PACKED_FLOPS or (sequences <= PACKED_ROWS and flops > PACKED_FLOPS)


def depth_part(depth: int, rows: int) -> int:
    """How much of a product's depth is summed up at a time, in even parts: partial sums keep float32 as exact as a
    blocked matrix product is, and of the weights all rows read what a second-level cache holds."""
    parts = max(1, round(depth / (SINGLE_ROW_DEPTH if rows == 1 else DEPTH)))
    return 2 * -(-depth // (2 * parts))
