"""lm_core.cli: flags from a configuration class, precedence, mistakes, exit codes, --json."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.cli import Command, command_group, configured
from lm_core.config import Count, config, leaves, opt, section, to_dict
from lm_core.errors import ConfigError, InputError, Interrupted, ResumeRefused, RunFailed
from lm_core.options import RunConfig

ERRORS = {"config": ConfigError, "input": InputError, "failed": RunFailed, "refused": ResumeRefused, "stopped": Interrupted}


@config
class Optim:
    lr: float = opt(3e-4, "Peak learning rate.", flags=("-l", "--learning-rate"), gt=0)
    betas: tuple[float, float] = opt((0.9, 0.999), "Decay rates.")


@config
class Options:
    name: str = opt("", "A name.", flags=("-n",))
    shuffle: bool = opt(True, "Permute.")
    full_params: bool = opt(False, "Train all.", flags=("-F",))
    quick: bool = opt(False, "Hurry.", flags=("-q",))
    stage: Literal[0, 1, 2, 3] | None = opt(None, "Stage.")
    rank: int = opt(4, "Rank.", ge=1)
    tokens: Count = opt(0, "Tokens.", ge=0)
    ratios: list[int] = opt([2], "Ratios.")
    data: list[str] = opt([], "Data.")
    weights: dict[str, float] = opt({}, "Weights.")
    output_dir: Path | None = opt(None, "Folder.", flags=("--save_path",))
    optim: Optim = section(Optim)


cli = command_group("Commands of this test.")
got: list[Any] = []


@cli.command()
@configured(Options)
def train(config: Options) -> dict[str, Any]:
    """Train."""
    got.append(config)
    print("progress")
    if config.name in ERRORS:
        raise ERRORS[config.name]("name: it went wrong; do better")
    if config.name == "interrupt":
        raise KeyboardInterrupt
    if config.name == "damaged":
        raise EOFError("the file ends early")
    return {"rank": config.rank, "loss": float("nan"), "folder": config.output_dir}


@cli.command()
@configured(Options)
@click.option("--num_nodes", type=int, default=1)
@click.argument("folder")
def inspect(config: Options, folder: str, num_nodes: int, json: bool) -> None:
    got.append((config, folder, num_nodes, json))


@cli.command()
@click.option("--dry-run", is_flag=True)
@click.argument("names", nargs=-1)
def plain(dry_run: bool, names: tuple[str, ...]) -> None:
    got.append((dry_run, names))


def invoke(*args: str) -> Result:
    got.clear()
    return CliRunner().invoke(cli, list(args))


def options(*args: str) -> Options:
    result = invoke("train", *args)
    assert result.exit_code == 0, result.output
    made = got[0]
    assert isinstance(made, Options)
    return made


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--shuffle"], True),
        (["--no-shuffle"], False),
        (["--no_shuffle"], False),
        (["--shuffle", "false"], False),
        (["--shuffle=off"], False),
        (["--shuffle", "0"], False),
        (["--shuffle", "Yes"], True),
        (["--no-shuffle", "--shuffle"], True),
        (["--shuffle", "--no-shuffle"], False),
        (["--shuffle", "--rank", "3"], True),
    ],
)
def test_switches_read_flags_and_values(args: list[str], expected: bool) -> None:
    assert options(*args).shuffle is expected


@pytest.mark.parametrize(
    ("args", "expected"), [(["-F"], True), (["-F", "0"], False), (["-F0"], False), (["-F=on"], True), (["-qF"], True), (["-Fn", "x"], True)]
)
def test_short_switches(args: list[str], expected: bool) -> None:
    assert options(*args).full_params is expected


@pytest.mark.parametrize(
    "args",
    [
        ["--ratios", "2", "4", "8"],
        ["--ratios", "2,4,8"],
        ["--ratios", "2", "--ratios=4", "--ratios", "8"],
        ["--ratios=2,4", "--ratios", "8"],
        ["--set", "ratios=[2, 4, 8]"],
        ["--set", "ratios=2,4,8"],
    ],
)
def test_lists_read_every_spelling(args: list[str]) -> None:
    assert options(*args).ratios == [2, 4, 8]


def test_text_in_lists_keeps_its_commas() -> None:
    assert options("--data", "a,b", "--data", "c[8]").data == ["a,b", "c[8]"]


@pytest.mark.parametrize(
    "args", [["--betas", "0.8,0.9"], ["--betas", "0.8", "0.9"], ["--betas=0.8,0.9"], ["--set", "optim.betas=[0.8, 0.9]"]]
)
def test_pairs_read_every_spelling(args: list[str]) -> None:
    assert options(*args).optim.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    "args",
    [
        ["--weights", "a=0.25,b=1"],
        ["--weights", "a=0.25", "--weights", "b=1"],
        ["--weights", "{a: 0.25, b: 1}"],
        ["--set", "weights={a: 0.25, b: 1}"],
    ],
)
def test_mappings_read_every_spelling(args: list[str]) -> None:
    assert options(*args).weights == {"a": 0.25, "b": 1.0}


@pytest.mark.parametrize("flag", ["--lr", "-l", "--learning-rate", "--learning_rate", "--optim.lr"])
def test_every_spelling_of_a_flag(flag: str) -> None:
    assert options(flag, "1e-2").optim.lr == 1e-2


def test_two_spellings_with_two_values_are_refused_and_a_repeated_flag_wins() -> None:
    result = invoke("train", "--name", "a", "-n", "b", "--rank", "1")
    assert result.exit_code == 2
    assert "--name a and -n b: are the same option; give one of them" in result.output
    assert options("--name", "a", "-n", "a").name == "a"
    assert options("--name", "a", "--name", "b").name == "b"
    assert options("--output-dir", "x", "--save-path", "x").output_dir == Path("x")


def test_values_may_look_like_flags_that_do_not_exist() -> None:
    assert options("--name", "--hello").name == "--hello"
    assert options("--name=--rank").name == "--rank"


def test_null_can_be_said() -> None:
    assert options("--stage", "1", "--stage", "none").stage is None
    assert options("--output-dir", "x", "--set", "stage=null").stage is None
    assert options("--set", "output_dir=null").output_dir is None
    assert options("--output-dir", "null").output_dir == Path("null")


def test_precedence_is_flag_set_later_file_earlier_file_default(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rank: 5\ntokens: 1k\nname: a\nlearning-rate: 1e-1\n")
    (tmp_path / "b.json").write_text('{"tokens": "2k", "name": "b", "optim": {"lr": 0.2}}')
    made = options(
        "--set",
        "name=set",
        "--config",
        str(tmp_path / "a.yaml"),
        "--set",
        "optim.lr=0.3",
        "--config-file",
        str(tmp_path / "b.json"),
        "--lr",
        "0.4",
    )
    assert (made.stage, made.rank, made.tokens, made.name, made.optim.lr) == (None, 5, 2000, "set", 0.4)


def test_all_mistakes_of_the_command_line_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rankk: 5\nstage: 9\n")
    result = invoke(
        "train",
        "--ranc",
        "3",
        "--lr",
        "-1",
        "--set",
        "foo=1",
        "--set",
        "bar",
        "--tokens",
        "many",
        "--no-shuffle=1",
        "-z",
        "--config",
        str(tmp_path / "a.yaml"),
        "--name",
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[0] == "error: 10 mistakes in the options"
    for line in [
        "--ranc: is not an option; did you mean --rank?",
        "-z: is not an option; --help lists them all",
        "--no-shuffle: takes no value; write --shuffle 1",
        "--name: needs a value",
        "--set bar: has no value; write --set KEY=VALUE",
        "foo: is not an option",
        "rankk: is not an option; did you mean rank?",
        "optim.lr: '-1' is wrong; give a number above 0",
        "stage: 9 is wrong; give 0, 1, 2, 3 or null",
        "tokens: 'many' is wrong; give a number such as 10_000",
    ]:
        assert line in result.stderr


def test_a_class_reads_files_in_other_words(tmp_path: Path) -> None:
    @config
    class Translated(Options):
        @classmethod
        def from_file(cls, content: dict[str, Any]) -> dict[str, Any]:
            return {"rank": content["thickness"]}

    other = command_group("Other words.")

    @other.command()
    @configured(Translated)
    def run(config: Translated) -> dict[str, Any]:
        return {"rank": config.rank}

    (tmp_path / "file.yaml").write_text("thickness: 9\n")
    for line, rank in (([], 9), (["--rank", "3"], 3)):
        result = CliRunner().invoke(other, ["run", "--json", "-c", str(tmp_path / "file.yaml"), *line])
        assert json.loads(result.stdout) == {"rank": rank}, result.output


def test_unreadable_files_do_not_hide_other_mistakes(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    files = [str(tmp_path / name) for name in ("list.yaml", "bad.yaml", "missing.yaml", "")]
    result = invoke("train", *(word for file in files for word in ("--config", file)), "--rank", "0")
    assert result.exit_code == 2
    for part in ["not a mapping", "malformed", "No such file", "Is a directory", "rank: '0' is wrong"]:
        assert part in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["train", "stray"],
        ["train", "--rank"],
        ["train", "--rank", "--name"],
        ["trian"],
        ["inspect"],
        ["plain", "--dry_rum"],
        ["train", "--json=1"],
    ],
)
def test_bad_usage_is_exit_code_2(args: list[str]) -> None:
    result = invoke(*args)
    assert (result.exit_code, result.stdout, got) == (2, "", [])
    assert result.stderr


@pytest.mark.parametrize(("name", "code"), [("config", 2), ("input", 2), ("failed", 3), ("refused", 4), ("stopped", 130)])
def test_user_errors_become_exit_codes(name: str, code: int) -> None:
    result = invoke("train", "--name", name)
    assert result.exit_code == code
    assert result.stderr == "error: name: it went wrong; do better\n"


def test_interrupt_is_exit_code_130() -> None:
    assert invoke("train", "--name", "interrupt").exit_code == 130


def test_our_bugs_show_where_to_report_them() -> None:
    result = invoke("train", "--name", "damaged")
    assert result.exit_code == 1
    assert "EOFError: the file ends early" in result.stderr
    assert "Please report it" in result.stderr


def test_json_prints_exactly_one_object(tmp_path: Path) -> None:
    result = invoke("train", "--json", "--rank", "3", "--save-path", "out")
    assert json.loads(result.stdout) == {"rank": 3, "loss": None, "folder": "out"}
    assert result.stderr == "progress\n"
    assert json.loads(invoke("inspect", "--json", "x").stdout) == {}
    assert invoke("train", "--json", "--name", "failed").stdout == ""


def test_only_the_first_rank_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert invoke("train", "--json").stdout == ""
    assert invoke("train", "--name", "input").stderr.startswith("[rank 1] error: ")


def test_click_options_and_arguments_live_beside_the_configuration() -> None:
    assert invoke("inspect", "--num-nodes", "3", "--shuffle", "dir", "--json", "--ratios", "1").exit_code == 0
    made, folder, num_nodes, wants_json = got[0]
    assert (made.ratios, folder, num_nodes, wants_json) == ([1], "dir", 3, True)
    assert invoke("plain", "--dry_run", "--", "--a", "b").exit_code == 0
    assert got == [(True, ("--a", "b"))]


def test_a_quiet_command_gives_warnings_and_its_object_alone(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lm_core.test_cli")

    @click.command(cls=Command)
    @configured(Options)
    def speak(config: Options) -> dict[str, Any]:
        print("a line")
        logger.info("a notice")
        logger.warning("a warning")
        return {"rank": config.rank}

    cases = {(): ("a line\n", 2), ("--quiet",): ("", 1), ("--quiet", "--json"): ('{"rank": 4}\n', 1)}
    for words, (out, said) in cases.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "lm_core"):
            assert CliRunner().invoke(speak, words).stdout == out
        assert [record.getMessage() for record in caplog.records][-said:] == ["a notice", "a warning"][-said:]
        assert len(caplog.records) == said


def test_print_config_is_a_configuration_file(tmp_path: Path) -> None:
    args = ["--rank", "3", "--data", "a: b", "--learning-rate", "1", "--weights", "x=1"]
    result = invoke("train", "--print-config", *args)
    assert got == []
    (tmp_path / "c.yaml").write_text(result.stdout)
    assert options("--config", str(tmp_path / "c.yaml")) == options(*args)
    assert json.loads(invoke("train", "--print-config", "--json", *args).stdout) == to_dict(options(*args))


def test_aliases_in_files_are_noticed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.yaml").write_text("save_path: x\nlearning_rate: 1\n")
    with caplog.at_level(logging.INFO, "lm_core"):
        options("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "a.yaml"), "--save-path", "y")
    assert [record.getMessage() for record in caplog.records] == ["save_path: read as output_dir", "learning_rate: read as optim.lr"]


def test_help_shows_defaults_limits_and_choices() -> None:
    result = invoke("train", "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for part in [
        "-l, --lr, --learning-rate NUMBER Peak learning rate. [default: 0.0003; above 0]",
        "--shuffle / --no-shuffle Permute. [default: true]",
        "--stage [0|1|2|3] Stage.",
        "--rank INT Rank. [default: 4; at least 1]",
        "--betas A,B Decay rates. [default: 0.9,0.999]",
        "--ratios INT... Ratios. [default: 2]",
        "-c, --config, --config-file FILE",
    ]:
        assert part in text


def test_help_lists_every_shared_option_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lm_core.cli import *\nfrom lm_core.options import RunConfig\ncli = command_group('x')\n"
        "cli.command()(configured(RunConfig)(lambda config: None))\n"
        "try:\n    main(cli)\nfinally:\n    assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    run = subprocess.run([sys.executable, "-c", code, "<lambda>", "--help"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert all(leaf.flag in run.stdout for leaf in leaves(RunConfig))


def test_an_option_may_take_config_over(tmp_path: Path) -> None:
    @config
    class Mixture:
        mixture: str = opt("even", "Mixture.", flags=("--config",))

    @click.command(cls=Command)
    @configured(Mixture)
    def command(config: Mixture) -> None:
        print(config.mixture)

    (tmp_path / "a.yaml").write_text("mixture: file\n")
    assert CliRunner().invoke(command, ["--config", "x"]).stdout == "x\n"
    assert CliRunner().invoke(command, ["--config-file", str(tmp_path / "a.yaml")]).stdout == "file\n"


def test_reserved_flags_are_refused_at_import() -> None:
    @config
    class Clash:
        json: bool = opt(False, "Taken.")

    with pytest.raises(TypeError, match="--json already"):
        configured(Clash)


WORDS = st.one_of(
    st.sampled_from(
        [
            "--",
            "-",
            "--rank",
            "--lr",
            "-l",
            "-F",
            "--shuffle",
            "--no-shuffle",
            "--data",
            "--ratios",
            "--betas",
            "--weights",
            "--set",
            "--stage",
            "--name",
        ]
    ),
    st.sampled_from(
        [
            "1",
            "-1",
            "x",
            "a=b",
            "rank=3",
            "=",
            "none",
            "1e400",
            "[",
            "{",
            "data=[",
            "weights={a: ",
            "optim={lr: 3}",
            "optim=3",
            "--json",
            "--quiet",
            "--print-config",
        ]
    ),
    st.text(max_size=6),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, max_size=6))
def test_no_command_line_gives_a_traceback(args: list[str]) -> None:
    result = invoke("train", *args)
    assert result.exit_code in (0, 2), result.stderr
    assert result.exit_code == 0 or (got == [] and result.stderr)
