from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_core.config import build
from lm_core.data.loader import Loader
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from lm_core.run import run
from moe_cpt.config import TrainConfig
from moe_cpt.data import WeightedSources, expanded, weighted_sources
from moe_cpt.method import MoeCPT
from moe_cpt.split.features import token_rows

TEXT = "one two three four five six seven eight nine ten " * 20


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "x.jsonl").write_text("".join(f'{{"text": "{number} {TEXT}"}}\n' for number in range(10)))
    return root


def config(**options: Any) -> TrainConfig:
    return build(TrainConfig, {"model": "llama_test", "from_dense": "random", "max_length": 16, **options})


def weights(**options: Any) -> dict[str, float]:
    return dict(weighted_sources(config(**options), byte_tokenizer()).weights)


def test_a_folder_of_sources_takes_the_shares_of_llama(tmp_path: Path) -> None:
    root = folder(tmp_path, "github", "en_cc")
    assert weights(data=[str(root)]) == pytest.approx({"en_cc": 0.67 / 0.715, "github": 0.045 / 0.715})
    assert weights(data=[str(root)], prob_map="uniform") == pytest.approx({"en_cc": 0.5, "github": 0.5})
    with pytest.raises(ConfigError, match="prob_map: no share for source blogs"):
        weights(data=[str(folder(tmp_path, "blogs"))])


def test_weighted_sources_of_a_folder_are_those_that_a_run_draws(tmp_path: Path) -> None:
    root = folder(tmp_path, "github", "en_cc", "en_book")
    mix = WeightedSources(root, {"github": 2, "en_cc": 1, "en_book": 1}, seed=5)
    data = weighted_sources(config(data=[str(root)], prob_map='{"github": 2, "en_cc": 1, "en_book": 1}'), byte_tokenizer())
    loader = Loader(data, micro_batch=64, seed=5)
    assert [mix.names[mix.at(n)[0]] for n in range(64)] == [loader.names[source] for source in next(loader)[0]["source"].tolist()]


def test_a_comma_list_takes_the_weights_it_carries_else_equal_ones() -> None:
    assert weights(data=["synthetic:markov,synthetic:copy"]) == {"markov": 0.5, "copy": 0.5}
    assert weights(data=["synthetic:markov@0.75,synthetic:copy@0.25"]) == {"markov": 0.75, "copy": 0.25}
    assert weights(data=["synthetic:markov,synthetic:copy"], prob_map='{"markov": 3, "copy": 1}') == {"markov": 0.75, "copy": 0.25}


def test_a_validation_folder_holds_one_file_per_source(tmp_path: Path) -> None:
    root = folder(tmp_path / "train", "github", "en_cc")
    (tmp_path / "val").mkdir()
    for name in ("github", "en_cc"):
        (tmp_path / "val" / f"{name}.jsonl").write_text((root / name / "x.jsonl").read_text())
    data = weighted_sources(config(data=[str(root)], eval_data=[str(tmp_path / "val")]), byte_tokenizer())
    assert sorted(data.valid) == sorted(data.train) == ["en_cc", "github"]


def test_a_run_ends_with_its_smallest_source_where_asked(tmp_path: Path) -> None:
    made = config(
        data=["synthetic:markov,synthetic:copy[2]"], tokenizer="bytes", on_exhausted="stop", max_steps=500, warmup=0, num_experts=8, num_selects=2,
        precision="fp32", eval_every="never", save_every="never", tensorboard=False, output_dir=tmp_path / "run",
    )  # fmt: skip
    result = run(made, MoeCPT(made))
    assert result["reason"] == {"kind": "data", "text": "every sample of copy was read"}
    assert 0 < result["progress"]["steps"] < 500


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, "github")
    (root / "en_cc").mkdir()
    with pytest.raises(InputError, match="en_cc is empty"):
        expanded([str(root)])


def test_a_single_source_folder_stays_one_source(tmp_path: Path) -> None:
    root = folder(tmp_path, "github") / "github"
    assert expanded([str(root), "builtin:stdlib,builtin:python-docs"]) == [str(root), "builtin:stdlib", "builtin:python-docs"]


def test_samples_come_from_sources_by_their_shares_whatever_the_world_size() -> None:
    data = weighted_sources(config(data=["synthetic:markov@0.7,synthetic:copy@0.3"]), byte_tokenizer())
    orders = []
    for world in (1, 2, 4):
        loaders = [Loader(data, micro_batch=8 // world, rank=rank, world=world, seed=5) for rank in range(world)]
        seen: dict[int, int] = {}
        for _ in range(100):
            for loader in loaders:
                for batch in next(loader):
                    seen |= dict(zip(batch.index.tolist(), batch["source"].tolist()))
        orders.append([seen[sample] for sample in sorted(seen)])
    assert orders[0] == orders[1] == orders[2]
    share, sigma = sum(orders[0]) / 800, (0.7 * 0.3 / 800) ** 0.5
    assert abs(share - 0.3) < 3 * sigma


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_eta": 2.0}, "dynamic_eta: 2.0 is used by --dynamic-data-selection only"),
        ({"dynamic_data_selection": "sheared_llama", "eval_every": "never"}, "eval_every: never, but --dynamic-data-selection moves"),
        (
            {"dynamic_data_selection": "sheared_llama", "dynamic_min_weight": 0.5, "dynamic_max_weight": 0.4},
            "dynamic_min_weight: 0.5 is above",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(data=["synthetic:copy"], **options)


def test_every_source_needs_a_reference_and_held_out_data(tmp_path: Path) -> None:
    from moe_cpt.method import MoeCPT

    common: dict[str, Any] = {"data": ["synthetic:markov,synthetic:copy"], "dynamic_data_selection": "sheared_llama"}
    with pytest.raises(ConfigError, match="the built-in table has no loss for source markov"):
        MoeCPT(config(**common)).data(byte_tokenizer())
    with pytest.raises(ConfigError, match="eval_data: source copy has no held-out data"):
        MoeCPT(config(**common, eval_data=["synthetic:markov"])).data(byte_tokenizer())
    (tmp_path / "ref.json").write_text('{"markov": 1, "copy": 1}')
    with pytest.raises(ConfigError, match="cannot sum to 1"):
        MoeCPT(config(**common, reference_loss=tmp_path / "ref.json", dynamic_min_weight=0.6)).data(byte_tokenizer())


def test_calibration_reads_what_is_trained_on_and_nothing_that_is_held_out(tmp_path: Path) -> None:
    documents = [chr(33 + n) * 15 for n in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    data = weighted_sources(config(data=[str(tmp_path / "x.jsonl")], max_length=16), byte_tokenizer())
    held = {token for row in range(len(data.valid["x"])) for token in data.valid["x"][row]["input_ids"].tolist()} - {258}
    rows = token_rows([str(tmp_path / "x.jsonl")], byte_tokenizer(), text_column="text", length=16, tokens=16 * 100, batch=3)
    seen = {token for row in rows for token in row.flatten().tolist()} - {258}
    assert held
    assert seen == {ord(text[0]) for text in documents} - held
