"""Memory of a text that was read: compacted windows, the open window, and how far each row has come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from beacon.errors import CacheError
from beacon.modeling.attention import gather, moved, rotate
from beacon.modeling.block import Append, Block, Rotation
from beacon.plan import BEACON, Cursor
from kernels_cuda.beacon import rope_evict_, rope_gather_append_

if TYPE_CHECKING:
    from beacon.modeling.causal_lm import BeaconMixin

# B rows, M memory entries, K open window, G key heads, N tokens, d head size
Pair = tuple[Tensor, Tensor]


class BeaconCache(Cache):
    """Keys and values of B rows in every layer, and a cursor per row.

    Memory keys (B x G x M x d) are rotated once and for ever; keys of the open window (B x K x G x d) are not, since they take
    other positions when their window moves. Rows of different length are padded behind. Tensors are replaced, never written
    into, so forks may share them.
    """

    def __init__(self, cursors: Sequence[Cursor], model: BeaconMixin) -> None:
        super().__init__(layers=[])
        self.cursors = list(cursors)
        self.model = model
        self.columns = 0
        layers = model.config.num_hidden_layers
        self.memory: list[Pair | None] = [None] * layers
        self.open: list[Pair | None] = [None] * layers

    def __len__(self) -> int:
        return len(self.memory)

    # --- what the model does ---

    def store(self, layer: int, k: Tensor, v: Tensor, block: Block) -> None:
        """What stays of a layer after a block, of the open window before it and the block itself (B x N x G x d)."""
        update = block.update
        if update.memory_BM is not None and update.memory_rotation is not None:
            # tensors without data, which estimates run on, have no places to write to
            if update.append is not None and not (torch.is_grad_enabled() and k.requires_grad) and not k.is_meta:
                self.memory[layer] = _appended(self.memory[layer], (k, v), update.memory_BM, update.append)
            else:
                fresh = moved(k, v, update.memory_BM, update.memory_rotation)
                self.memory[layer] = _behind(self.memory[layer], fresh, update.merge_BM, update.shift)
        self.open[layer] = (k, v) if update.open_BK is None else (gather(k, update.open_BK), gather(v, update.open_BK))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included: what `generate` needs."""
        return self.columns

    # --- what is held ---

    def lengths(self) -> list[dict[str, int]]:
        """Entries per row: sinks, memory without them, raw tokens and beacons of the open window; and the tokens seen."""
        return [_lengths(cursor) for cursor in self.cursors]

    def compression_ratio(self) -> list[float]:
        """Tokens seen per entry held, by row."""
        return [row["seen"] / max(1, row["sink"] + row["memory"] + row["raw"]) for row in self.lengths()]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for pair in [*self.memory, *self.open] if pair is not None for tensor in pair)

    # --- what a user does ---

    def append(self, ids: Tensor | Sequence[int] | Iterable[Sequence[int]]) -> BeaconCache:
        """Read more tokens (one row: a list; else B x T), in pieces of a few windows; returns the cache itself."""
        self.model.compress(ids, past_key_values=self)
        return self

    def fork(self, k: int = 1) -> BeaconCache:
        """A second cache that goes its own way; with `k` above 1 every row k times, one behind the other."""
        rows = np.repeat(np.arange(len(self.cursors)), k)
        return self._picked(rows, copy=k > 1)

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Rows in another order, some perhaps repeated or left out."""
        other = self._picked(np.asarray(rows.tolist() if isinstance(rows, Tensor) else rows), copy=True)
        self.__dict__.update(vars(other))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder(np.repeat(np.arange(len(self.cursors)), repeats).tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder(indices)

    def crop(self, n: int) -> None:
        """Forget all columns but the first `n`; below 0: the last -n. Only tokens of the open window can be forgotten.

        Raises CacheError where memory already holds what is to be forgotten.
        """
        gone = -n if n < 0 else max(0, self.columns - n)
        for row, cursor in enumerate(self.cursors):
            first = cursor.uncompacted
            if cursor.seen - gone < first:
                raise CacheError(
                    f"crop: row {row} has compacted {first} of its {cursor.seen} tokens and cannot forget {gone}; forget at most {cursor.seen - first}"
                )
        kept = [np.flatnonzero(cursor.within(cursor.seen - gone)) for cursor in self.cursors]
        for cursor in self.cursors:
            cursor.crop(cursor.seen - gone)
        index = np.zeros((len(kept), max(map(len, kept))), dtype=np.int64)
        for b, places in enumerate(kept):
            index[b, : len(places)] = places
        for layer, pair in enumerate(self.open):
            if pair is not None:
                at = torch.from_numpy(index).to(pair[0].device)
                self.open[layer] = (gather(pair[0], at), gather(pair[1], at))
        self.columns -= gone

    def save(self, path: str | Path) -> None:
        """One safetensors file, its header naming the settings and the weights it belongs to."""
        from beacon.memory_file import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path, model: Any) -> BeaconCache:
        """What `save` wrote. Raises CacheError when it was made by other weights."""
        from beacon.memory_file import load

        return load(Path(path), model)

    def _picked(self, rows: np.ndarray[Any, Any], copy: bool) -> BeaconCache:
        other = BeaconCache([self.cursors[int(row)].copied() for row in rows], self.model)
        other.columns = self.columns
        if not copy:
            other.memory, other.open = list(self.memory), list(self.open)
            return other
        # rows that are left out may have been the longest
        held = max(len(cursor.memory) for cursor in other.cursors), max(len(cursor.open) for cursor in other.cursors)
        for mine, theirs, dim, size in ((self.memory, other.memory, 2, held[0]), (self.open, other.open, 1, held[1])):
            for layer, pair in enumerate(mine):
                if pair is not None:
                    index = torch.as_tensor(rows, device=pair[0].device)
                    k, v = (x.index_select(0, index).narrow(dim, 0, size) for x in pair)
                    theirs[layer] = (k, v)
        return other


def _lengths(cursor: Cursor) -> dict[str, int]:
    sinks = len(cursor.memory) - sum(cursor.sizes)
    beacons = int((cursor.open.kind == BEACON).sum())
    return {
        "sink": sinks,
        "memory": len(cursor.memory) - sinks,
        "raw": len(cursor.open) - beacons,
        "open_beacons": beacons,
        "seen": cursor.seen,
    }


def _appended(memory: Pair | None, tokens_BNGd: Pair, index_BM: Tensor, append: Append) -> Pair:
    """What `_behind` gives, where no gradient asks for copies in between: each entry is written once, and a tail that moves moves in place."""
    k, v = (x.transpose(1, 2) for x in tokens_BNGd)
    B, G, _, d = k.shape
    # rows of different length are padded by zeros, since what is hidden must be a number
    out = k.new_zeros(B, G, append.total, d), v.new_zeros(B, G, append.total, d)
    for new, old in zip(out, memory or ()):
        new[:, :, : old.shape[2]] = old
    lengths = append.held_B.expand(B).clone()
    rope_gather_append_(k, v, index_BM.expand(B, -1), append.places.cos, append.places.sin, *out, lengths)
    if append.gone_2B is not None:
        first, count = append.gone_2B.expand(2, B)
        rope_evict_(*out, lengths, first, count, append.distances.cos, append.distances.sin)
    return out[0][:, :, : append.kept], out[1][:, :, : append.kept]


def _behind(memory: Pair | None, fresh: Pair, merge: Tensor | None, shift: Rotation | None) -> Pair:
    """Memory with new entries behind it; `merge` places them where rows differ in length or lose entries, whose successors move up."""
    k, v = fresh if memory is None else (torch.cat((memory[0], fresh[0]), dim=2), torch.cat((memory[1], fresh[1]), dim=2))
    if merge is None:
        return k, v
    k, v = gather(k.transpose(1, 2), merge), gather(v.transpose(1, 2), merge)
    return (k if shift is None else rotate(k, shift)).transpose(1, 2), v.transpose(1, 2)
