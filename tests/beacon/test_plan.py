from __future__ import annotations

import random

import pytest

from beacon.config import BeaconConfig
from beacon.plan import Plan, build_plan
from lm_core.errors import ConfigError, InputError
from tests.beacon.enumerator import enumerate_plan


def config(**values: object) -> BeaconConfig:
    return BeaconConfig(**{"window": 4, "stride": 4, "ratio": [2], **values})  # type: ignore[arg-type]


def random_case(seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    pos = draw.choice(["append", "append", "interleave"])
    w = draw.choice([4, 6, 8])
    s = w if pos == "interleave" else draw.choice([w, w // 2, 2, w])
    prev = draw.random() < 0.5
    attn = draw.choice(["step-expansion", "segmentation", "full-coverage"])
    if pos == "interleave":
        attn = draw.choice(["step-expansion", "full-coverage"] if prev else ["step-expansion", "segmentation"])
    choices = [r for r in (0, 1, 2, 3, 4, 6, 8) if r == 0 or s % r == 0]
    n = draw.randint(1, 4 * w + 2)
    ratios = [draw.choice(choices) for _ in range(n // s + 2)]
    docs, at = [], 0
    for _ in range(n):
        at += draw.random() < 0.15 and draw.random() < 0.8
        docs.append(int(at))
    if draw.random() < 0.5:
        docs = [0] * n
    sinks = draw.randint(0, min(s, 3))
    return {
        "n": n, "w": w, "s": s, "ratios": ratios, "pos": pos, "attn": attn, "prev": prev, "sinks": sinks, "docs": docs,
        "training": draw.random() < 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(200))
def test_plan_equals_the_brute_force_enumerator(seed: int) -> None:
    case = random_case(seed)
    n, w, s = case["n"], case["w"], case["s"]
    cfg = BeaconConfig(
        window=w, stride=s, ratio=[1, 0], pos=case["pos"], attn=case["attn"], attend_prev=case["prev"], sink_size=case["sinks"]
    )  # type: ignore[arg-type]
    plan = build_plan(n, cfg, case["ratios"], doc_ids=case["docs"], training=case["training"])  # type: ignore[arg-type]
    memory, positions, keys, pairs, sees = enumerate_plan(**case)  # type: ignore[arg-type]
    assert [plan.tokens[int(plan.key_index[k])] for k in range(plan.memory_length)] == memory
    assert plan.key_pos[: plan.memory_length].tolist() == list(range(len(memory)))
    # windows follow one another and hold the enumerator's keys
    names: list[object] = [("m", k) for k in range(len(memory))]
    by_period: dict[int, list[object]] = {}
    for period, label in keys:
        by_period.setdefault(period, []).append(label)
    at = len(memory)
    for period in sorted(by_period):
        if not any(
            query[0] == "x" and positions.get(("q", query)) is not None and (query, (period, query)) in pairs for query in by_period[period]
        ):
            continue  # nobody is processed in this period: the sequence ended with its window
        window = plan.keys[at : at + len(by_period[period])]
        assert set(window) == set(by_period[period])
        names += [(period, label) for label in window]
        for offset, label in enumerate(window):
            assert plan.key_pos[at + offset] == positions[period, label]
            assert plan.tokens[int(plan.key_index[at + offset])] == label
        at += len(window)
    assert at == len(plan.keys)
    assert {(plan.tokens[i], names[j]) for i, j in plan.visible().nonzero().tolist()} == pairs
    assert plan.query_pos.tolist() == [positions["q", token] for token in plan.tokens]
    docs = case["docs"]
    visible_interleave = case["pos"] == "interleave" and case["prev"]
    expected = [
        t + 1 < n and docs[t] == docs[t + 1] and (not case["training"] or visible_interleave or sees["x", t])  # type: ignore[index]
        for t in range(n)  # type: ignore[arg-type]
    ]
    assert plan.label_mask.tolist() == expected


def rows(plan: Plan, groups: list[int]) -> dict[str, str]:
    """Visibility as text, one row per token, keys in groups as the specification prints them."""
    out = {}
    for token, seen in zip(plan.tokens, plan.visible().tolist()):
        bits = "".join("1" if bit else "." for bit in seen)
        parts, at = [], 0
        for size in groups:
            parts.append(bits[at : at + size])
            at += size
        out[f"x{token[1]}" if token[0] == "x" else f"b{token[1]}.{token[2]}"] = " ".join(parts)
    return out


RAW = {
    "x0": "..... 1..... ...... .",
    "x1": "..... 11.... ...... .",
    "x2": "..... 111... ...... .",
    "x3": "..... 1111.. ...... .",
    "x4": "111.. ...... 1..... .",
    "x7": "111.. ...... 1111.. .",
    "x8": "11111 ...... ...... 1",
}
BEACONS = {
    "step-expansion": {"b0.1": "..... 11..1. ...... .", "b0.2": "..... 111111 ...... .", "b1.1": "111.. ...... 11..1. .", "b1.2": "111.. ...... 111111 ."},
    "segmentation": {"b0.1": "..... 11..1. ...... .", "b0.2": "..... ..1111 ...... .", "b1.1": "111.. ...... 11..1. .", "b1.2": "111.. ...... ..1111 ."},
    "full-coverage": {"b0.1": "..... 11111. ...... .", "b0.2": "..... 111111 ...... .", "b1.1": "111.. ...... 11111. .", "b1.2": "111.. ...... 111111 ."},
}  # fmt: skip


@pytest.mark.parametrize("attn", BEACONS)
def test_the_worked_matrices(attn: str) -> None:
    plan = build_plan(9, config(attn=attn, sink_size=1), [2, 2])
    seen = rows(plan, [5, 6, 6, 1])
    for name, row in {**RAW, **BEACONS[attn]}.items():
        assert seen[name] == row
    assert plan.key_pos.tolist()[:5] == [0, 1, 2, 3, 4]
    if attn != "full-coverage":
        assert plan.key_pos.tolist()[5:] == [0, 1, 2, 3, 2, 5, 3, 4, 5, 6, 5, 8, 5]


def test_the_worked_variants() -> None:
    plan = build_plan(9, config(attend_prev=False, sink_size=1), [2, 2])
    position = dict(zip(plan.tokens, plan.query_pos.tolist()))
    assert [position["b", i, j] for i in (0, 1) for j in (1, 2)] == [2, 4, 5, 7]
    assert rows(plan, [5, 6, 6, 1])["b0.2"] == "..... 1111.1 ...... ."
    stride = build_plan(7, config(stride=2), [2, 2])
    position = dict(zip(stride.tokens, stride.query_pos.tolist()))
    assert (position["x", 4], position["x", 6]) == (3, 4)
    visible = build_plan(9, config(pos="interleave", sink_size=1), [2, 2, 2])
    assert visible.tokens[:7] == [("x", 0), ("x", 1), ("b", 0, 1), ("x", 2), ("x", 3), ("b", 0, 2), ("x", 4)]
    assert visible.query_pos.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 5]


def test_sinks_belong_to_documents() -> None:
    plan = build_plan(9, config(sink_size=1), [2, 2], doc_ids=[0, 0, 0, 1, 1, 1, 1, 1, 1])
    memory = [plan.tokens[int(plan.key_index[k])] for k in range(plan.memory_length)]
    assert memory == [("x", 0), ("b", 0, 1), ("x", 3), ("b", 0, 2), ("b", 1, 1), ("b", 1, 2)]
    seen = {token: [plan.keys[j] for j in row.nonzero()[:, 0].tolist()] for token, row in zip(plan.tokens, plan.visible())}
    position = dict(zip(plan.tokens, plan.query_pos.tolist()))
    assert (position["b", 0, 2], seen["b", 0, 2]) == (5, [("x", 3), ("b", 0, 2)])
    assert (position["x", 4], seen["x", 4]) == (4, [("m", 2), ("m", 3), ("x", 4)])
    assert (position["x", 8], seen["x", 8]) == (6, [("m", 2), ("m", 3), ("m", 4), ("m", 5), ("x", 8)])


@pytest.mark.parametrize(("n", "expected"), [(4, 0), (5, 0), (6, 1), (9, 4), (13, 8)])
def test_a_document_of_n_tokens_counts_n_minus_w_minus_1_targets(n: int, expected: int) -> None:
    assert int(build_plan(n, config(), [2] * 4, training=True).label_mask.sum()) == expected
    assert int(build_plan(n, config(), [2] * 4).label_mask.sum()) == n - 1
    assert int(build_plan(n, config(pos="interleave"), [2] * 4, training=True).label_mask.sum()) == n - 1


def test_a_raw_first_window_teaches_nothing() -> None:
    assert build_plan(12, config(ratio=[0, 2]), [0, 2], training=True).label_mask.nonzero()[:, 0].tolist() == [8, 9, 10]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"stride": 8}, "stride"),
        ({"pos": "interleave", "stride": 2}, "stride"),
        ({"pos": "interleave", "attend_prev": False, "attn": "full-coverage"}, "attn"),
        ({"ratio": [3]}, "ratio"),
        ({"sink_size": 5}, "sink_size"),
        ({"ratio_mix": "adapt-"}, "ratio_mix"),
        ({"param": ["q", "o"]}, "param"),
        ({"param": ["k", "z"]}, "param"),
        ({"format_version": 9}, "format_version"),
    ],
)
def test_a_wrong_config_names_its_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        config(**values)


def test_documents_must_not_decrease() -> None:
    with pytest.raises(InputError, match=r"doc_ids: decreases from 1 to 0 at token 2"):
        build_plan(3, config(), [2], doc_ids=[0, 1, 0])
