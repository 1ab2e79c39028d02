"""Every command as a user runs it, on a tiny student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from rwkv_distill.cli import cli

TRAIN = "train --model tiny --tokenizer bytes --data synthetic:markov[60] -m 32 -b 4 -a 1 --head-size 32 -w 1 -T 0 --device cpu --eval-every never --no-tensorboard"


def invoke(line: str, *more: str) -> Any:
    result = CliRunner().invoke(cli, [*line.split(), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def refused(line: str) -> str:
    result = CliRunner().invoke(cli, line.split())
    assert result.exit_code == 2
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    invoke(f"{TRAIN} -s 1 --budget 3steps", "-o", str(place / "s1"))
    invoke(f"{TRAIN} -s 2 -k {place}/s1/final/pytorch_model.bin --budget 3steps", "-o", str(place / "s2"))
    return place


def test_stage_2_starts_from_stage_1_and_makes_a_folder_that_generates(folder: Path) -> None:
    result = invoke(f"generate --model {folder}/s2 --max-new-tokens 5 --json", "--prompt", "ab")
    assert len(json.loads(result.stdout)["tokens"]) == 5
    streamed = invoke(f"generate --model {folder}/s2/final --max-new-tokens 5 --stream", "--prompt", "ab")
    assert streamed.stdout.startswith("ab")


def test_eval_of_a_student_against_its_teacher(folder: Path) -> None:
    command = f"eval --model {folder}/s2/final --teacher tiny --data synthetic:markov[40] -m 32 --prompts 2 --max-new-tokens 4 --json"
    report = json.loads(invoke(command).stdout)
    found = report["sources"]["markov"]
    assert 0 < found["kl"]["median"] <= found["kl"]["p95"]
    assert found["loss"]["student"] == pytest.approx(found["loss"]["teacher"], abs=0.1)
    assert 0 <= report["generation"]["agreement_length"] <= 4
    assert list(found["kl_by_position"]) == ["0-3", "4-7", "8-11", "12-15", "16-19", "20-23", "24-27", "28-31"]


def test_eval_of_a_student_that_is_its_teacher_finds_no_difference(folder: Path, tmp_path: Path) -> None:
    from lm_core.data.vocab import byte_tokenizer
    from lm_core.models import load_model
    from rwkv_distill.config import MODELS
    from rwkv_distill.student import StudentModel
    from rwkv_distill.student_config import StudentConfig

    same = StudentModel.from_teacher(load_model("tiny", presets=MODELS, seed=42), StudentConfig(layers=[]))
    same.save_pretrained(tmp_path / "same")
    byte_tokenizer().save_pretrained(tmp_path / "same")
    from rwkv_distill.generate import generate
    from rwkv_distill.student import load_student

    written = generate(load_student(tmp_path / "same").eval(), torch.tensor([[*b"ab"]]), max_new_tokens=2)[0]
    answer = byte_tokenizer().decode(written).strip()
    rows = [{"prompt": "ab", "answer": answer}, {"prompt": "ab", "answer": "never this"}]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = f"eval --model {tmp_path}/same --teacher tiny --data synthetic:markov[40] -m 32 --prompts 2 --max-new-tokens 6 --qa {tmp_path}/qa.jsonl --json"
    report = json.loads(invoke(command).stdout)
    assert report["sources"]["markov"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert report["sources"]["markov"]["top_agreement"] == {"1": 1.0, "5": 1.0, "50": 1.0}
    assert report["generation"]["agreement_length"] == 6
    assert report["qa"]["questions"] == 2
    assert report["qa"]["student"] == report["qa"]["teacher"] <= 0.5
    (tmp_path / "qa.jsonl").write_text('{"prompt": "ab"}')
    assert "has no prompt and answer" in refused(f"{command}")


@pytest.mark.parametrize("source", ["s2", "s2/final", "s2/checkpoints/checkpoint-3"])
def test_export_takes_a_run_a_final_folder_or_a_checkpoint(folder: Path, source: str, tmp_path: Path) -> None:
    invoke(f"export --ckpt {folder}/{source} --dtype fp32", "-o", str(tmp_path / "out"))
    before, after = (
        invoke(f"generate --model {place} --max-new-tokens 6", "--prompt", "ab").stdout for place in (folder / "s2", tmp_path / "out")
    )
    assert before == after
    assert "already holds files" in refused(f"export --ckpt {folder}/{source} -o {tmp_path}/out")


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    result = invoke(f"{TRAIN} -s 2 --budget 3steps --dry-run --json", "-o", str(tmp_path / "run"))
    counts = json.loads(result.stdout)["parameters"]
    assert 0 < counts["trained"] < counts["total"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", ["generate --model {0}", "eval --model {0} --teacher tiny --data synthetic:markov", "export --ckpt {0} -o {0}/out"]
)
def test_folders_without_a_student_are_refused(command: str, tmp_path: Path) -> None:
    assert "holds no student" in refused(command.format(tmp_path))


def test_bench_finds_that_memory_grows_neither_with_depth_nor_with_context() -> None:
    stage1 = json.loads(invoke("bench --op stage1 --json").stdout)["figures"]
    assert [figure["pass"] for figure in stage1] == [True, True]
    sides = json.loads(invoke("bench --op decode --context 512 --tokens 2 --teacher tiny --json").stdout)["figures"]
    student, teacher = ([entry["state_bytes"] for entry in side["contexts"].values()] for side in sides)
    assert student[0] == student[1]
    # 64 and 512 tokens, and the two decoded behind each
    assert teacher[1] * 66 == teacher[0] * 514


def test_bench_draws_decoding_alone(tmp_path: Path) -> None:
    assert "use --op decode" in refused(f"bench --op pack --figure {tmp_path}/decode.png")


@pytest.mark.bench
def test_bench_meets_its_targets() -> None:
    figures = json.loads(invoke("bench --json").stdout)["figures"]
    assert [figure["what"] for figure in figures if not figure["pass"]] == []


def test_prepared_ids_train_the_same_student_as_their_text(folder: Path, tmp_path: Path) -> None:
    # one document, so that there is one order
    (tmp_path / "text.txt").write_text("abcdefgh" * 20)
    for kind, name in (("hf", "ids"), ("binidx", "pair/data")):
        source = tmp_path / name.partition("/")[0]
        made = json.loads(
            invoke(f"prepare-data -r {tmp_path}/text.txt --tokenizer bytes -m 256 --format {kind} --json", "-o", str(source)).stdout
        )
        assert (made["rows"], made["tokens"]) == (1, 161)
    common = "--hold-out 0 --batching pad --budget 1steps -m 64 --no-calibrate"
    line = "train --model tiny --tokenizer bytes -b 1 -a 1 --head-size 32 -w 0 -T 0 --device cpu --eval-every never --no-tensorboard"
    losses = []
    for place, data in enumerate((["-r", f"{tmp_path}/text.txt"], ["-p", f"{tmp_path}/ids"], ["-p", f"{tmp_path}/pair/data.idx"])):
        invoke(f"{line} {common}", *data, "-o", str(tmp_path / f"run{place}"))
        losses.append(json.loads((tmp_path / f"run{place}/metrics.jsonl").read_text().splitlines()[0])["train/loss"])
    assert losses[0] == losses[1] == losses[2]
    assert "already holds files" in refused(f"prepare-data -r {tmp_path}/text.txt --tokenizer bytes -o {tmp_path}/ids")


def test_labels_have_a_place_in_saved_datasets_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}')
    assert "only a saved dataset" in refused(
        f"prepare-data -r {tmp_path}/rows.jsonl --tokenizer bytes -o {tmp_path}/shards --format shards"
    )
    invoke(f"prepare-data -r {tmp_path}/rows.jsonl --tokenizer bytes -o {tmp_path}/ids")
    import datasets

    assert datasets.load_from_disk(str(tmp_path / "ids"))[0]["labels"] == [-100, -100, -100, -100, ord("2"), 258]


def test_init_writes_a_student_that_stage_2_starts_from(tmp_path: Path) -> None:
    made = json.loads(invoke(f"init --model tiny --tokenizer bytes --head-size 32 --device cpu --json -o {tmp_path}/s0").stdout)
    assert made == {"output_dir": f"{tmp_path}/s0", "calibrated": False}
    from rwkv_distill.student import load_student

    student = load_student(tmp_path / "s0")
    assert not student.mixers()[1].g2.any()
    data = "--data synthetic:markov[40] -m 32"
    assert json.loads(invoke(f"init --model tiny --tokenizer bytes --head-size 32 --device cpu {data} --json -o {tmp_path}/s1").stdout)[
        "calibrated"
    ]
    assert not torch.equal(load_student(tmp_path / "s1").mixers()[1].output.weight, student.mixers()[1].output.weight)


def test_consolidated_weights_are_those_of_the_run(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "s2/final/model.safetensors")
    for name in ("all.safetensors", "all.bin"):
        invoke(f"consolidate {folder}/s2/checkpoints/checkpoint-3 -o {tmp_path}/{name}")
    for found in (load_file(tmp_path / "all.safetensors"), torch.load(tmp_path / "all.bin", weights_only=True)):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "neither .safetensors nor .bin" in refused(f"consolidate {folder}/s2 -o {tmp_path}/x.pt")


def test_generation_goes_on_from_a_file(folder: Path, tmp_path: Path) -> None:
    def tokens(line: str, *more: str) -> list[int]:
        found: list[int] = json.loads(invoke(f"generate --model {folder}/s2 --json {line}", *more).stdout)["tokens"]
        return found

    whole = tokens("--max-new-tokens 8", "--prompt", "ab")
    first = tokens(f"--max-new-tokens 3 --state-out {tmp_path}/state", "--prompt", "ab")
    assert first + tokens(f"--max-new-tokens 5 --state-in {tmp_path}/state") == whole
    assert "another student" in refused(f"generate --model {folder}/s1 --state-in {tmp_path}/state")
    assert "cannot be read" in refused(f"generate --model {folder}/s1 --state-in {folder}/s1/config.yaml")


def test_chats_are_answered_where_the_tokenizer_knows_chats(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    assert "no chat template" in refused(f"generate --model {folder}/s2 --chat {tmp_path}/chat.json")
    place = tmp_path / "chatty"
    shutil.copytree(folder / "s2/final", place)
    (place / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    result = json.loads(invoke(f"generate --model {place} --chat {tmp_path}/chat.json --max-new-tokens 2 --json").stdout)
    assert result["prompt"] == "[hi]>"
    assert "role 'x' is unknown" in refused_chat(place, tmp_path)


def refused_chat(place: Path, tmp_path: Path) -> str:
    (tmp_path / "wrong.json").write_text('[{"role": "x", "content": "hi"}]')
    return refused(f"generate --model {place} --chat {tmp_path}/wrong.json")


def test_a_run_learns_from_a_cache_and_adds_to_its_mlps(folder: Path, tmp_path: Path) -> None:
    made = json.loads(
        invoke(
            f"cache-teacher --model tiny --tokenizer bytes --data synthetic:markov[60] -m 32 -b 4 --device cpu --top-k 8 --json -o {tmp_path}/cache"
        ).stdout
    )
    assert made["tokens"] > 1000
    line = f"{TRAIN} -s 2 -k {folder}/s1 --budget 3steps --teacher-cache {tmp_path}/cache --mlp-lora-rank 4"
    invoke(line, "-o", str(tmp_path / "run"))
    final, start = (load_file(place / "final/model.safetensors") for place in (tmp_path / "run", folder / "s1"))
    assert final.keys() == start.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < int(torch.linalg.matrix_rank(final[name] - start[name])) <= 4
    assert torch.equal(final["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    from rwkv_distill.student import load_student

    checkpoint = load_student(tmp_path / "run/checkpoints/checkpoint-3").state_dict()
    assert all(torch.equal(checkpoint[key], tensor) for key, tensor in final.items())
    assert "leaves the MLPs as they are" in refused(f"{line} -z 1 -o {tmp_path}/x")
    assert "summed up by one process" in refused(f"{line} -S 2 -o {tmp_path}/x")


def test_students_of_version_6_are_trained_and_exported_by_their_own_names(tmp_path: Path) -> None:
    invoke(f"{TRAIN} -s 1 -R v6 --budget 1steps -o {tmp_path}/run")
    invoke(f"export --ckpt {tmp_path}/run --format pth --dtype fp32 -o {tmp_path}/pth")
    mixers = torch.load(tmp_path / "pth/mixers.pth", weights_only=True)
    own = load_file(tmp_path / "run/final/model.safetensors")
    assert torch.equal(mixers["blocks.1.att.time_faaaa"], own["model.layers.1.self_attn.time_mixer.u"])
    assert mixers["blocks.0.att.time_maa_w2"].shape == (5, 32, 64)
    assert "version is v6, not v7" in refused(f"export --ckpt {tmp_path}/run --format arwkv -o {tmp_path}/arwkv")
