"""What `rwkv-distill init` writes: a student before any training."""

from __future__ import annotations

import logging
from typing import Any

import torch

from lm_core.errors import ConfigError
from lm_core.models import quiet
from rwkv_distill.align import Align, hf_student
from rwkv_distill.config import TrainConfig
from rwkv_distill.distill import whole_student
from rwkv_distill.export import refuse_occupied

log = logging.getLogger(__name__)


def write_untrained(config: TrainConfig) -> dict[str, Any]:
    """A folder like `final/`; calibrated if the options name data."""
    if config.output_dir is None:
        raise ConfigError("output_dir: is required; give the folder to write with --output-dir")
    refuse_occupied(config.output_dir)
    torch.manual_seed(config.seed)
    method = Align(config)
    student = hf_student(method.build()) if config.data else whole_student(config)
    if not config.data:
        log.info("calibrate: there is no data to calibrate with; outputs stay as they are")
    with quiet():
        student.save_pretrained(config.output_dir)
    method.tokenizer().save_pretrained(config.output_dir)
    return {"output_dir": str(config.output_dir), "calibrated": bool(config.data) and config.calibrate and config.ckpt_file is None}
