"""A second writing of the specification's visibility and positions: token by token, in plain Python, sharing nothing with the package."""

from __future__ import annotations

from typing import Any


def enumerate_plan(
    n: int, w: int, s: int, ratios: list[int], *, pos: str, attn: str, prev: bool, sinks: int, docs: list[int], training: bool
) -> tuple[list[Any], dict[Any, int], list[Any], set[tuple[Any, Any]], dict[tuple[str, int], bool]]:
    """Memory (source labels), query positions, keys ((period, label) -> position is in the second result), visible pairs, sees a beacon."""
    if training:
        count = 0 if n <= w else (n - 1 - w) // s + 1
    else:
        count = 0 if n < w else (n - w) // s + 1
    doc = {("x", t): docs[t] for t in range(n)}
    memory: list[Any] = []
    limits = [0]  # memory length after i compactions
    beacons: dict[int, list[int]] = {}
    for i in range(count):
        r = ratios[i]
        if r == 0:
            memory += [("x", t) for t in range(i * s, i * s + s)]
        else:
            beacons[i] = list(range(1, s // r + 1))
            done: set[int] = set()
            for j in beacons[i]:
                last = i * s + j * r - 1
                doc["b", i, j] = docs[last]
                if docs[last] not in done:
                    done.add(docs[last])
                    begins = docs.index(docs[last])
                    if i * s <= begins < i * s + w:
                        taken = 0
                        for t in range(begins, i * s + w):
                            if taken < sinks and docs[t] == docs[last]:
                                memory.append(("x", t))
                                taken += 1
                memory.append(("b", i, j))
        limits.append(len(memory))
    # beacons already inserted in the open window
    if pos == "interleave" and not training and count < len(ratios) and ratios[count]:
        beacons[count] = [j for j in range(1, s // ratios[count] + 1) if count * s + j * ratios[count] <= n]
        for j in beacons[count]:
            doc["b", count, j] = docs[count * s + j * ratios[count] - 1]

    def period_of(t: int) -> int:
        i = 0
        while i < count and t >= i * s + w:
            i += 1
        return i

    queries: dict[Any, int] = {}
    pairs: set[tuple[Any, Any]] = set()
    keys: dict[Any, int] = {}
    sees: dict[tuple[str, int], bool] = {}
    for i in range(count + 1):
        r = ratios[i] if i < len(ratios) else 0
        own = beacons.get(i, [])
        base = limits[i]
        window = list(range(i * s, min(n, i * s + w)))

        def raw_position(t: int, i: int = i, r: int = r, base: int = base, has: bool = bool(own) or i in beacons) -> int:
            o = t - i * s
            return base + o + (o // r if pos == "interleave" and prev and r and has else 0)

        def beacon_position(j: int, r: int = r, base: int = base) -> int:
            if attn == "full-coverage" and pos == "append":
                return base + w + j - 1
            return base + r * j + (j - 1 if prev else 0)

        for t in window:
            keys[i, ("x", t)] = raw_position(t)
        for j in own:
            keys[i, ("b", i, j)] = beacon_position(j)
        for t in window:
            if period_of(t) != i:
                continue
            me = ("x", t)
            queries[me] = raw_position(t)
            sees[me] = False
            for m in range(limits[i]):
                if doc[memory[m]] == docs[t]:
                    pairs.add((me, ("m", m)))
                    sees[me] = sees[me] or memory[m][0] == "b"
            for u in window:
                if u <= t and docs[u] == docs[t]:
                    pairs.add((me, (i, ("x", u))))
            for j in own:
                if pos == "interleave" and prev and i * s + r * j - 1 < t and doc["b", i, j] == docs[t]:
                    pairs.add((me, (i, ("b", i, j))))
                    sees[me] = True
        for j in own:
            me = ("b", i, j)
            queries[me] = beacon_position(j)
            for m in range(limits[i]):
                if doc[memory[m]] == doc[me]:
                    pairs.add((me, ("m", m)))
            for u in window:
                o = u - i * s
                in_reach = {
                    "step-expansion": o < r * j,
                    "segmentation": r * (j - 1) <= o < r * j,
                    "full-coverage": True if pos == "append" else o < r * j,
                }[attn]
                if in_reach and docs[u] == doc[me]:
                    pairs.add((me, (i, ("x", u))))
            for k in own:
                if (k <= j if prev else k == j) and doc["b", i, k] == doc[me]:
                    pairs.add((me, (i, ("b", i, k))))
    return memory, {**{("q", label): at for label, at in queries.items()}, **keys}, [*keys], pairs, sees
