"""Q-GaLore: GaLore in few bits - moments in 8, bases in 4, and weights in 8 where the model keeps them so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lm_core.errors import ConfigError
from lowrank_opt.base import Group, decay_factor
from lowrank_opt.galore import GaLoreAdamW8bit
from lowrank_opt.int8 import Int8Weight
from lowrank_opt.matrix import Change


class QGaLoreAdamW8bit(GaLoreAdamW8bit):
    """Q-GaLore: GaLore with moments in 8 bits and bases in 4, whose matrices are refreshed less often once their basis stays.

    Weights keep their type, unless `lowrank_opt.int8.to_int8` has put them into 8 bits; of these the updated ones are rounded at
    random (`stochastic_rounding`) to their codes.
    """

    _takes_int8 = True

    def __init__(self, params: Iterable[Any], *args: Any, adaptive: bool = True, proj_dtype: str = "int4", **settings: Any) -> None:
        super().__init__(params, *args, adaptive=adaptive, proj_dtype=proj_dtype, **settings)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        dense = [p for p in group["params"] if isinstance(p, Int8Weight) and not self._is_matrix(group, p)]
        if dense:
            raise ConfigError(
                f"params: {len(dense)} weights in 8 bits, the first {tuple(dense[0].shape)}, have no rank below their smaller side; "
                "give their group one, or keep them whole"
            )

    def _is_rounded(self, parameter: Tensor) -> bool:
        return isinstance(parameter, Int8Weight) or super()._is_rounded(parameter)

    def _write(self, group: Group, parameter: Tensor, change: Change) -> None:
        if not isinstance(parameter, Int8Weight):
            super()._write(group, parameter, change)
            return
        layer = parameter.layer()
        assert layer is not None, "the model of this weight is gone"
        whole = layer.dense(torch.float32)
        change.write(whole, decay_factor(group), None)
        layer.store(whole, self._rounding(group, parameter, self.state[parameter]["step"]))
