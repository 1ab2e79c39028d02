"""Commands about Slurm scripts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lm_core.cli import Group, configured
from lm_core.errors import ConfigError, InputError, RunFailed
from moe_cpt.options.checks import SlurmCheckConfig, SlurmRenderConfig
from moe_cpt.targets import require_free


@click.group(cls=Group)
def slurm() -> None:
    """Scripts for clusters."""


@slurm.command(name="check")
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@configured(SlurmCheckConfig)
def slurm_check(config: SlurmCheckConfig, script: Path) -> dict[str, Any]:
    """Find contradictions in a Slurm script before it waits in a queue; exit code 3 for errors.

    Example: moe-cpt slurm check launchers/moe_cpt/fpt.sh --fix
    """
    from moe_cpt.slurm import check_slurm

    if config.header is not None and not config.header.is_file():
        raise ConfigError(f"header: {config.header} does not exist; name the log of a run")
    header = None if config.header is None else config.header.read_text()
    found = check_slurm(script.read_text(), folder=Path.cwd(), max_cpus=config.max_cpus, header=header, make_folders=config.fix)
    print(*([str(finding) for finding in found] or [f"{script}: no contradictions"]), sep="\n")
    if any(finding.severity == "error" for finding in found):
        # after the findings are printed, as JSON where that is wanted
        click.get_current_context().call_on_close(_failed)
    return {"findings": [asdict(finding) for finding in found]}


@slurm.command(name="render")
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@configured(SlurmRenderConfig)
def slurm_render(config: SlurmRenderConfig, script: Path) -> dict[str, Any]:
    """Write a Slurm script for other numbers of machines and GPUs.

    Example: moe-cpt slurm render launchers/moe_cpt/lora.sh --nodes 4 --gpus 8 --output launchers/moe_cpt/lora_4.sh
    """
    from moe_cpt.slurm import check_slurm, rendered

    require_free("output", config.output, config.overwrite)
    text = rendered(script.read_text(), config.nodes, config.gpus)
    if wrong := [finding for finding in check_slurm(text, folder=Path.cwd()) if finding.code in ("S01", "S02", "S09")]:
        raise InputError(f"script: {script} cannot be made consistent ({wrong[0]}); correct it first")
    config.output.write_text(text)
    config.output.chmod(0o755)
    return {"output": str(config.output)}


def _failed() -> None:
    raise click.exceptions.Exit(RunFailed.code)
