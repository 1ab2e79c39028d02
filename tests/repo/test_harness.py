"""Every method's tiny model in lm-evaluation-harness: likelihoods and generation on a task of two files."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.repo.tree import ROOT, Package, methods

pytest.importorskip("lm_eval", reason="nox -s harness installs it")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
TEXT = """\
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", methods(), ids=lambda package: package.name)
def test_a_trained_model_is_scored_and_writes(package: Package, tmp_path: Path) -> None:
    first = (package.folder / "presets/tiny.yaml").read_text().splitlines()[0].removeprefix("# ")
    words = shlex.split(first.partition(" --output-dir")[0])
    run = tmp_path / "run"
    settings = ["--budget", "2 steps", "--eval-every", "never", "--output-dir", str(run)]
    subprocess.run([*words, *settings], cwd=ROOT, check=True, capture_output=True)
    items = tmp_path / "items.jsonl"
    rows = [{"question": f"Item {number}:", "choices": [" one", " two"], "answer": number % 2} for number in range(3)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in (("tiny_choice", CHOICE), ("tiny_text", TEXT)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, items=items) + kind)
    masked = package.name == "mdm_scaling"
    model = ["--model", "mdm_scaling" if masked else "hf"]
    arguments = f"pretrained={run / 'final'}" + (",num_mc=2" if masked else ",dtype=float32,trust_remote_code=True")
    tasks = ["--tasks", "tiny_choice,tiny_text", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
    output = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    subprocess.run([words[0], "lm-eval", *model, "--model_args", arguments, *tasks, *output], cwd=tmp_path, check=True)
    [found] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    assert 0 <= results["tiny_choice"]["acc,none"] <= 1
    assert 0 <= results["tiny_text"]["exact_match,none"] <= 1
    [samples] = (tmp_path / "out").rglob("samples_tiny_choice_*.jsonl")
    likelihoods = [float(answer[0][0]) for line in samples.read_text().splitlines() for answer in json.loads(line)["resps"]]
    assert len(likelihoods) == 2 * len(rows)
    assert all(value < 0 for value in likelihoods)
