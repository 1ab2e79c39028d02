"""Batches by sample number: what step s of rank r sees is a function of the seed, s, r and the weights in force.

The n-th sample of a global batch goes to rank n mod world. The state is a few integers and the weights, the same on
every rank, so a run may go on with another number of ranks, workers or micro-batches as long as the global batch stays.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate as accumulate_sums
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lm_core.data.mix import Mix
from lm_core.data.order import Integers, Permutation
from lm_core.errors import ResumeRefused
from lm_core.method import IGNORE, Batch

if TYPE_CHECKING:
    from lm_core.data import Data, Rows

log = logging.getLogger(__name__)

# Samples of this rank that are planned at once: one call of numpy then costs little per sample
_PLANNED = 256


class _Item(NamedTuple):
    """One micro-batch to read: sample numbers, and per row its source, its pass over that source, and its place there."""

    step: int
    sample: Integers
    source: Integers
    epoch: Integers
    row: Integers


class _Reader(Dataset[tuple[dict[str, Tensor], Tensor, int]]):
    """Reads one micro-batch; runs in the training process or in a worker."""

    def __init__(self, sources: Sequence[Rows]) -> None:
        self._sources = sources
        # the pass that is being read and the one before it, which a batch may straddle
        self._passes: dict[tuple[int, int], Rows] = {}

    def __getitem__(self, item: _Item) -> tuple[dict[str, Tensor], Tensor, int]:
        rows = [self._pass(source, epoch)[row] for source, epoch, row in zip(item.source.tolist(), item.epoch.tolist(), item.row.tolist())]
        tensors = self._sources[int(item.source[0])].collate(rows)
        if len(self._sources) > 1:
            tensors["source"] = torch.from_numpy(item.source)
        return tensors, torch.from_numpy(item.sample), item.step

    def _pass(self, source: int, epoch: int) -> Rows:
        found = self._passes.get((source, epoch))
        if found is None:
            rows = self._sources[source]
            again = getattr(rows, "epoch", None)
            found = rows if again is None else again(epoch)
            self._passes = {at: kept for at, kept in self._passes.items() if at[0] != source or at[1] == epoch - 1}
            self._passes[source, epoch] = found
        return found


class _Plan(Sampler[_Item]):
    """The endless sequence of micro-batches from the loader's step on."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[_Item]:
        return self._loader._items()


class Loader:
    """Endless batches of the training data. `next` gives one step: this rank's `accumulate` micro-batches.

    Every batch has the tensors of its rows; with several sources also `source` (B), the position of each row's source
    in `data.train`. `ramp` gives the first steps fewer micro-batches: their numbers, step by step.
    """

    def __init__(
        self, data: Data, *, micro_batch: int, accumulate: int = 1, rank: int = 0, world: int = 1, seed: int = 0,
        shuffle: bool = True, num_workers: int = 0, ramp: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.names = list(data.train)
        self._rows = list(data.train.values())
        self._lengths = [len(rows) for rows in self._rows]
        assert min(self._lengths) > 0
        self._micro_batch, self._accumulate, self._rank, self._world = micro_batch, accumulate, rank, world
        self._on_exhausted = data.on_exhausted
        self._seed, self._shuffle, self._num_workers = seed, shuffle and not data.ordered, num_workers
        self._mix = Mix([data.weights[name] for name in self.names], seed=seed, draw=data.draw)
        self._given = dict(zip(self.names, self._mix.weights))
        # the address of each source's orders; a resumed run keeps them, whatever sources came or went
        self._numbers = list(range(len(self._rows)))
        self._reader = _Reader(self._rows)
        # first sample of every step of the ramp, and of the step behind it
        self._ramp, self._starts = list(ramp), list(accumulate_sums((count * micro_batch * world for count in ramp), initial=0))
        self._workers: DataLoader[Any] | None = None
        self._ahead: Iterator[Any] | None = None
        self._step = 0
        # samples read before a resume with another batch, beyond those that as many steps of this one would read
        self._more = 0

    @property
    def global_batch(self) -> int:
        """Samples of one step, over all ranks; behind the ramp, where there is one."""
        return self._micro_batch * self._accumulate * self._world

    @property
    def epoch_samples(self) -> int:
        """Samples in one pass over all sources."""
        return sum(self._lengths)

    @property
    def sample(self) -> int:
        """Global number of the next sample."""
        return self._first(self._step)

    @property
    def weights(self) -> dict[str, float]:
        """Shares of the sources in force; they sum to 1."""
        return dict(zip(self.names, self._mix.weights))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the shares of the sources from the next step on. Every source must be named."""
        assert set(weights) == set(self.names)
        self._mix.set_weights([weights[name] for name in self.names], self.sample)
        # what workers have read ahead was chosen by the old weights
        self._ahead = None

    def before_step(self) -> str | None:
        """Which source ends the run here, if one does; otherwise what `on_exhausted` asks is done for the next step.

        No step is made that would read a sample again, except under "repeat", which warns of every further pass.
        """
        counts = zip(self._mix.taken(self.sample), self._mix.taken(self.sample + self.global_batch), self._lengths, strict=True)
        passes = {name: ((had - 1) // length, (has - 1) // length) for name, (had, has, length) in zip(self.names, counts)}
        again = [name for name, (then, now) in passes.items() if now > max(then, 0)]
        if self._on_exhausted == "repeat":
            # one source alone is counted in epochs anyway
            for name in again if self._rank == 0 and len(self.names) > 1 else ():
                log.warning("source %s: pass %d over its samples begins", name, passes[name][1] + 1)
            return None
        if not again:
            return None
        left = {name: 0.0 if name in again else share for name, share in self.weights.items()}
        if self._on_exhausted == "stop" or not any(left.values()):
            return again[0]
        if self._rank == 0:
            log.warning("source %s: every sample was read; the others share its part", ", ".join(again))
        self.set_weights(left)
        # larger shares may bring another source to its end
        return self.before_step()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._ahead is None:
            self._ahead = self._start()
        batches = []
        for _ in range(self._count(self._step)):
            tensors, index, step = next(self._ahead)
            batches.append(Batch(tensors, index=index, step=step))
        self._step += 1
        return batches

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: JSON-able, the same on every rank, and of the same size at any sample."""
        return self._identity() | {"step": self._step, "numbers": self._numbers, "mix": self._mix.state_dict(self.sample)}

    def load_state_dict(self, state: dict[str, Any], allow: Collection[str] = ()) -> None:
        """Go on where `state_dict` was taken. Raises ResumeRefused when other samples would follow.

        What `allow` names may differ, with a warning, and holds from the next sample on, whose number is the same for any change:
        `global_batch`: the steps that follow have another size. `seed`: other draws and orders. `sources`: one of the same name goes
        on in the pass it was in, behind the same part of it, rounded up to a whole sample; where its samples changed (other documents
        or another length) the rest of that pass has an order of its own. Others are gone or begin. Shares in force stay, new sources
        get those of `data`, and the sum is made 1 again; under `weights` the shares of `data` hold for all.
        """
        now = self._identity()
        changed = [field for field in now if state[field] != now[field]]
        for field in changed:
            difference, way_out = _difference(field, state[field], now[field])
            if field not in allow:
                raise ResumeRefused(f"{difference}; {way_out}")
            if self._rank == 0:
                log.warning("%s; accepted", difference)
        self._step, self._more = state["step"], 0
        self._more = state["mix"]["sample"] - self.sample
        then = [name for name, *_ in state["sources"]]
        self._renumber(dict(zip(then, state.get("numbers", range(len(then))))))
        shares = dict(zip(then, state["mix"]["anchor"]["weights"]))
        wanted = {name: share if "weights" in allow else shares.get(name, share) for name, share in self._given.items()}
        if "sources" in changed or wanted != shares:
            self._go_on(state, wanted)
        else:
            self._mix.load_state_dict(state["mix"])
        self._ahead = None

    def _go_on(self, state: dict[str, Any], shares: Mapping[str, float]) -> None:
        """Every source behind the part of its pass that was read, with these shares."""
        read = {name: (count, length) for count, (name, length, _) in zip(state["mix"]["taken"], state["sources"])}
        taken = []
        for name, length in zip(self.names, self._lengths):
            count, then = read.get(name, (0, 1))
            passes, rest = divmod(count, then)
            taken.append(passes * length + -(-rest * length // then))
        # where all that had a share is gone, what was given is all there is to go by
        shares = shares if any(shares.values()) else self._given
        self._mix.restart([shares[name] for name in self.names], state["mix"]["sample"], taken)

    def _renumber(self, numbers: Mapping[str, int]) -> None:
        fresh = iter(range(max(numbers.values()) + 1, max(numbers.values()) + 1 + len(self.names)))
        usual, self._numbers = self._numbers, [numbers[name] if name in numbers else next(fresh) for name in self.names]
        for rows, then, now in zip(self._rows, usual, self._numbers):
            if then != now and hasattr(rows, "number"):
                rows.number = now
                # workers hold copies of the rows
                self._reader, self._workers = _Reader(self._rows), None

    def _identity(self) -> dict[str, Any]:
        sources = [[name, len(rows), getattr(rows, "fingerprint", "")] for name, rows in zip(self.names, self._rows)]
        return {"global_batch": self.global_batch, "seed": self._seed, "shuffle": self._shuffle, "draw": self._mix.draw, "sources": sources}

    def _start(self) -> Iterator[tuple[dict[str, Tensor], Tensor, int]]:
        if self._num_workers == 0:
            return map(self._reader.__getitem__, self._items())
        if self._workers is None:
            self._workers = DataLoader(
                self._reader,
                sampler=_Plan(self),
                batch_size=None,
                num_workers=self._num_workers,
                persistent_workers=True,
                pin_memory=torch.cuda.is_available(),
            )
        return iter(self._workers)

    def _count(self, step: int) -> int:
        """Micro-batches of this rank in a step."""
        return self._ramp[step] if step < len(self._ramp) else self._accumulate

    def _first(self, step: int) -> int:
        """Global number of the first sample of a step."""
        return self._more + self._starts[min(step, len(self._ramp))] + max(0, step - len(self._ramp)) * self.global_batch

    def _items(self) -> Iterator[_Item]:
        """Micro-batches of this rank from the current step on, planned several steps at once."""
        step = self._step
        while True:
            mine = self._micro_batch * self._count(step)
            steps = 1 if step < len(self._ramp) else max(_PLANNED // mine, 1)
            begin, end = self._first(step), self._first(step + steps)
            source, before = self._mix.span(begin, end)
            index = np.arange(begin + self._rank, end, self._world)
            source, before = source[self._rank :: self._world], before[self._rank :: self._world]
            epoch, row = self._places(source, before)
            for first in range(0, len(index), self._micro_batch):
                part = slice(first, first + self._micro_batch)
                yield _Item(step + first // mine, index[part], source[part], epoch[part], row[part])
            step += steps

    def _places(self, source: Integers, before: Integers) -> tuple[Integers, Integers]:
        """For sample `before` of each source: which pass over it, and which row of that pass."""
        epoch, row = np.divmod(before, np.array(self._lengths)[source])
        if self._shuffle:
            for which, number in set(zip(source.tolist(), epoch.tolist())):
                here = (source == which) & (epoch == number)
                row[here] = Permutation(self._lengths[which], self._seed, 3, self._numbers[which], number)(row[here])
        return epoch, row


def eval_batches(rows: Rows, *, micro_batch: int, rank: int = 0, world: int = 1, tokens: int | float = 0) -> Iterator[Batch]:
    """Held-out rows in fixed order, row n on rank n mod world, the same number of batches on every rank.

    `tokens` above 0 stops behind the row that reaches so many real tokens: the same rows for any world size. Where a
    rank has too few rows, its last batches repeat a row with index -1 and labels of -100: they are no samples, and
    their tokens must not be counted. The step is always 0, so that noise has the same address for any batch size.
    """
    count = _rows_for(rows, tokens)
    for first in range(0, count, micro_batch * world):
        index = first + rank + world * np.arange(micro_batch)
        real = index < count
        tensors = rows.collate([rows[n] for n in np.where(real, index, first).tolist()])
        if not real.all():
            tensors["labels"][torch.from_numpy(~real)] = IGNORE
        yield Batch(tensors, index=torch.from_numpy(np.where(real, index, -1)), step=0)


def _rows_for(rows: Rows, tokens: int | float) -> int:
    if tokens <= 0:
        return len(rows)
    length = getattr(rows, "length", None)
    seen = 0
    for n in range(len(rows)):
        seen += len(rows[n]["input_ids"]) if length is None else length(n)
        if seen >= tokens:
            return n + 1
    return len(rows)


def _difference(field: str, then: Any, now: Any) -> tuple[str, str]:
    """What differs from the checkpoint, and the way out."""
    if field == "global_batch":
        return (
            f"global_batch: {now} samples per step, but the checkpoint was made with {then}",
            "change micro_batch_size, accumulate or the number of processes",
        )
    if field == "sources":
        names = [[name for name, *_ in sources] for sources in (then, now)]
        found = (
            f"sources {names[1]}, but the checkpoint was made with {names[0]}"
            if names[0] != names[1]
            else "the documents of a source, or how they are cut into samples, have changed since the checkpoint"
        )
        return f"data: {found}", "give the data, packing, max_length and tokenizer of the checkpoint, or start a new run"
    return f"{field}: {now}, but the checkpoint was made with {then}", "give the value of the checkpoint, or start a new run"
