"""lm_core.record and lm_core.reference: what a run folder and the options page say."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.config import build, config, leaves, load, opt, section
from lm_core.options import RunConfig
from lm_core.record import MASK, config_hash, describe, git_state, mask_arguments, mask_environment, write
from lm_core.reference import options_page


@config
class Part:
    lr: float = opt(3e-4, "Rate | per step.", flags=("-l",), gt=0)


@config
class Options:
    model: str = opt(help="Model.")
    data: list[str] = opt([], "Data.")
    part: Part = section(Part)


@config
class Shared:
    model: str = opt(help="Model.")
    seed: int = opt(0, "Seed.")


def test_the_run_folder_reproduces_the_configuration(tmp_path: Path) -> None:
    made = build(Options, {"model": "a: b\x85", "data": ["x", "y"]})
    write(tmp_path / "runs" / "one", made)
    assert build(Options, load(tmp_path / "runs" / "one" / "config.yaml")) == made
    assert sorted(path.name for path in (tmp_path / "runs" / "one").iterdir()) == ["config.yaml", "record.json"]


def test_the_record_describes_the_surroundings(tmp_path: Path) -> None:
    write(tmp_path, Options(model="x"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["config_hash"] == config_hash(Options(model="x"))
    assert record["config_class"].endswith("test_record.Options")
    assert (record["python"], record["argv"]) == (sys.version.split()[0], mask_arguments(sys.argv))
    assert record["packages"]["click"]
    assert record["platform"]["cores"] == os.cpu_count()
    assert record["started"].endswith("+00:00")
    assert record["earlier"] == []


def test_a_resumed_run_keeps_earlier_records(tmp_path: Path) -> None:
    for model in "abc":
        write(tmp_path, Options(model=model))
    record = json.loads((tmp_path / "record.json").read_text())
    assert [entry["config_hash"] for entry in [*record["earlier"], record]] == [config_hash(Options(model=model)) for model in "abc"]
    for broken in ["", "[1]", "{", '{"earlier": 3}']:
        (tmp_path / "record.json").write_text(broken)
        write(tmp_path, Options(model="d"))
        assert json.loads((tmp_path / "record.json").read_text())["earlier"] == []


def test_the_hash_depends_on_values_alone() -> None:
    canonical = b'{"data":[],"model":"x","part":{"lr":0.0003}}'
    assert (
        config_hash(build(Options, {"model": "x", "lr": "3e-4"}))
        == config_hash(Options(model="x"))
        == hashlib.sha256(canonical).hexdigest()[:16]
    )
    assert len({config_hash(build(Options, {"model": "x", "lr": lr})) for lr in (1, 2, 3)}) == 3


def test_secrets_are_masked() -> None:
    environment = {
        "WANDB_API_KEY": "s3cret",
        "HF_TOKEN": "s3cret",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_BASE_URL": "https://me:s3cret@host/x",
        "MY_DATABASE": "s3cret",
        "HOME": "s3cret",
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
        "HF_PASSWORD": "",
    }
    assert mask_environment(environment) == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HF_PASSWORD": "",
        "HF_TOKEN": MASK,
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_API_KEY": MASK,
        "WANDB_BASE_URL": f"https://{MASK}@host/x",
    }


def test_secrets_on_the_command_line_are_masked() -> None:
    words = "train --access-token s3cret --tokenizer bytes --api_key=s3cret --set hub_token=s3cret --num_training_tokens 1M --data https://u:s3cret@h/x --keep"
    kept = f"train --access-token {MASK} --tokenizer bytes --api_key={MASK} --set hub_token={MASK} --num_training_tokens 1M --data https://{MASK}@h/x --keep"
    assert mask_arguments(words.split()) == kept.split()


@settings(max_examples=50)
@given(st.text(min_size=8), st.sampled_from(["HF_TOKEN", "WANDB_API_KEY", "HF_SECRET", "CUDA_PASSWORD", "SLURM_JWT", "HF_AUTH"]))
def test_no_part_of_a_secret_is_recorded(secret: str, name: str) -> None:
    assert mask_environment({name: secret}) == {name: MASK}
    assert mask_arguments([f"--{name.lower()}", f"x{secret}", f"--{name}={secret}"]) == [f"--{name.lower()}", MASK, f"--{name}={MASK}"]


def test_the_record_can_be_written_whatever_the_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", "\udcff")
    monkeypatch.setattr(sys, "argv", ["train", "\udcff"])
    monkeypatch.setenv("PATH", "")  # no git
    write(tmp_path, Options(model="x"))
    assert json.loads((tmp_path / "record.json").read_text())["git"] is None


def test_git_state_is_that_of_the_checkout_which_tracks_the_file(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        settings = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    assert git_state(tmp_path / "code" / "a.py") is None
    git("init", "-q", "-b", "trunk")
    assert git_state(tmp_path / "code" / "a.py") is None
    git("add", ".")
    git("commit", "-q", "-m", "x")
    state = {"commit": git("rev-parse", "HEAD"), "branch": "trunk", "changed": []}
    assert git_state(tmp_path / "code" / "a.py") == state
    (tmp_path / "code" / "a.py").write_text("2")
    (tmp_path / "b.py").write_text("2")
    assert git_state(tmp_path / "code" / "a.py") == {**state, "changed": ["code/a.py", "b.py"]}
    assert git_state(tmp_path / "b.py") is None


def test_describing_a_run_does_not_load_torch() -> None:
    code = "import sys, lm_core.record, lm_core.options as o; lm_core.record.describe(o.RunConfig(model='x', data=['y'])); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_accelerators_are_described_once_torch_is_loaded() -> None:
    import torch

    assert len(describe(Options(model="x"))["platform"]["accelerators"]) == torch.cuda.device_count()


def test_the_options_page_lists_every_option_once() -> None:
    page = options_page([("Shared", Shared), ("`x train`", Options)])
    assert page.count("| `--model` |") == 1
    assert "\nAs in *Shared*: `--model`.\n" in page
    assert "| `--lr`<br>`-l` | `NUMBER`, above 0 | `0.0003` | Rate \\| per step. Key `part.lr`. |\n" in page
    assert "| `--model` | `TEXT` | required | Model. |\n" in page
    every = options_page([("All", RunConfig)])
    assert all(f"| `{leaf.flag}`" in every and leaf.help.replace("|", "\\|") in every for leaf in leaves(RunConfig))
    rows = [line for line in every.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_the_options_page_finds_the_commands_of_installed_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "somewhere.py").write_text(
        "from lm_core.cli import command_group, configured\nfrom lm_core.options import RunConfig\n"
        "cli = command_group('x')\n\n@cli.group()\ndef data(): ...\n\n@data.command()\n@configured(RunConfig)\ndef pack(config): ...\n"
    )
    (tmp_path / "some_method-1.dist-info").mkdir()
    (tmp_path / "some_method-1.dist-info" / "METADATA").write_text("Name: some-method\nVersion: 1\nRequires-Dist: lm-core\n")
    (tmp_path / "some_method-1.dist-info" / "entry_points.txt").write_text("[console_scripts]\nsome-method = somewhere:cli\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run(
        [sys.executable, "-m", "lm_core.reference", "options.md"], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    page = (tmp_path / "options.md").read_text()
    assert "## Every training command\n" in page
    assert "## `some-method data pack`\n" in page
    # `data` is a name of the module, too
    assert "## `some-method pack`\n" not in page
