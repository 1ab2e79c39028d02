"""What every optimizer of this package shares: groups, the step, saving and loading, and writing weights back.

State is made of tensors, Python numbers and strings only, keeps its own dtypes when loaded, and is
exactly as large as the formulas in `memory` say. Arithmetic is float32 whatever the parameter's dtype.
"""

from __future__ import annotations

import difflib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from lm_core import counter
from lm_core.errors import ConfigError, InputError, ResumeRefused
from lowrank_opt.int8 import Int8Weight

if TYPE_CHECKING:
    from lowrank_opt.layerwise import PerLayer

FORMAT = 1
# Elements per pass over a weight that needs a float32 copy: the copy (1 MiB) stays in the cache of one core.
CHUNK = 1 << 18

Group = dict[str, Any]
State = dict[str, Any]


class UnsupportedDistributedError(ConfigError):
    """A parameter whose shape or placement has lost the matrix that low rank needs."""


@dataclass(frozen=True)
class Address:
    """Where a parameter stands: its place among all, and among the `matrices` low-rank ones (-1 for a dense one)."""

    name: str
    position: int
    index: int
    matrices: int


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value outside `allowed`, naming the nearest one."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(one) for one in allowed], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{name}: {value!r} is unknown; {hint}choose one of {', '.join(str(one) for one in allowed)}")


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, shared out over processes."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, and any other tensor as it is; element-wise updates need no more."""
    return tensor.to_local() if is_shared(tensor) else tensor  # type: ignore[no-any-return]


def share(size: int, processes: int, number: int) -> int:
    """How many of `size` rows a process has when a DTensor is shared out by rows.

    >>> [share(9, 4, number) for number in range(4)]
    [3, 3, 3, 0]
    """
    most = math.ceil(size / processes)
    return max(0, min(most, size - most * number))


def rate(group: Group) -> float:
    """The group's learning rate; some schedulers and users keep it in a tensor."""
    return float(group["lr"])


def decay_factor(group: Group) -> float:
    """What decoupled weight decay multiplies a weight by in one step."""
    return 1 - rate(group) * float(group["weight_decay"])


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic runs in: float32, or float64 for float64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def _state_type(name: str, group: Group, parameter: Tensor) -> torch.dtype:
    """The dtype of a state tensor, by its name: codes, maxima of 8-bit blocks, steps and offsets of 4-bit ones, bases, moments."""
    if name.endswith("_q"):
        return torch.uint8
    if name.endswith("_absmax"):
        return torch.float32
    if name.endswith(("_scale", "_zero")):
        return torch.float16
    if name.startswith("proj"):
        return {"param": parameter.dtype, "fp32": torch.float32, "bf16": torch.bfloat16}[group["proj_dtype"]]
    return work_dtype(parameter.dtype)


@lru_cache(maxsize=4)
def seed_of_step(seed: int, step: int) -> int:
    """64 bits that rounding in one step starts from; shared by all parameters, which take turns."""
    return counter.derive(seed, "rounding", step)


class Rounding:
    """Random bits that round one bfloat16 weight in one step, a chunk at a time.

    They depend on (seed, step, place of the parameter) alone, so a resumed run and every replica on the same
    kind of device draw the same ones. Drawing a number per element would cost more than the update: instead a
    tile of random numbers is shared by all chunks of a step, and each chunk flips its bits by a constant of its
    own. Any two elements are rounded independently of each other. Operators that draw words themselves take `key`
    instead; the tile is made when `round` is first called.
    """

    def __init__(self, tile: Callable[[], Tensor], seed: int, position: int, step: int) -> None:
        self.tile = tile
        self.seed = seed_of_step(seed, step)
        self.position = position

    @property
    def key(self) -> tuple[int, int]:
        """The address as seed and offset for an operator: 63 bits, since a negative seed means rounding to nearest."""
        return self.seed >> 1, self.position

    @cached_property
    def flips(self) -> random.Random:
        return random.Random(self.seed << 64 | self.position)

    @staticmethod
    def draw_tile(seed: int, step: int, device: torch.device) -> Tensor:
        """CHUNK numbers of 16 random bits (int32) for one step."""
        generator = torch.Generator(device).manual_seed(seed_of_step(seed, step) & 0xFFFFFFFF)
        words = torch.empty(CHUNK // 4, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
        return words.view(torch.int16).to(torch.int32) & 0xFFFF

    def round(self, value: Tensor) -> None:
        """Round float32 numbers (contiguous) in place to bfloat16 neighbours, up or down at random."""
        # A bfloat16 is the upper half of a float32: 16 random bits added to the lower half carry into the upper
        # half with the probability of the distance.
        for bits in value.view(-1).view(torch.int32).split(CHUNK):
            bits.add_(self.words(bits.numel())).bitwise_and_(-(1 << 16))

    def words(self, count: int) -> Tensor:
        """The next `count` (at most CHUNK) numbers of 16 random bits, int32."""
        return self.tile()[:count] ^ self.flips.getrandbits(16)


def names_of(group: Group) -> list[str]:
    """Names of a group's parameters: given as (name, tensor) pairs or under `names`, else their places."""
    names = group.get("param_names") or group.get("names")
    return list(names) if names else [f"parameter {position} of its group" for position in range(len(group["params"]))]


class BaseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers; a subclass gives `_update` and `_layout`, and may add to `_check_group`.

    Parameters are tensors, (name, tensor) pairs or group dictionaries, as in torch. A group that carries
    another value of a constructor argument overrides it for its parameters.
    """

    # Group keys that decide the shape or the meaning of saved state.
    _identity: tuple[str, ...] = ()
    # Group settings that a subclass adds to those of its parent.
    _more: Group = {}
    # Whether groups may have a `rank`; elsewhere it would be ignored, so it is refused.
    _takes_rank = False
    # Whether weights may be those of an `Int8Linear`.
    _takes_int8 = False
    # Whether a low-rank update needs the whole gradient, not only L.
    _needs_gradient = True
    # Global norm of the last step and what it is of, set by per-layer updates.
    grad_norm: float
    grad_norm_kind: str
    _layers: PerLayer | None = None
    # Parameters whose state is kept in this process, where an engine has dealt them out; whether it has the bases of the others
    # all the same; and how often others were refreshed than those in this process's state.
    owned: frozenset[Tensor] | None = None
    keeps_bases = False
    refreshes_elsewhere = 0
    _addresses: dict[Tensor, Address]
    # Random numbers of the present step by device, with their seed and step.
    _tiles: dict[torch.device, tuple[int, int, Tensor]]

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        self._addresses, self._tiles = {}, {}
        super().__init__(params, {**defaults, **self._more, "format": f"{type(self).__name__}/{FORMAT}"})

    # -- groups ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group after checking it whole; a group that is refused leaves the optimizer as it was."""
        param_group = dict(param_group)
        params = param_group["params"]
        param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        if len(tensors) != len(set(tensors)):
            raise ConfigError("params: a parameter stands twice in one group; give each parameter once")
        earlier = {p for group in self.param_groups for p in group["params"]}
        if twice := [place for place, p in enumerate(tensors) if p in earlier]:
            named = names_of({"names": [p[0] for p in params if isinstance(p, tuple)], **param_group})
            names = [named[place] for place in twice]
            raise ConfigError(f"params: {', '.join(names)} stand in an earlier group as well; give each parameter once")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name, parameter in zip(names_of(group), group["params"], strict=True):
                if not parameter.is_floating_point():
                    raise ConfigError(f"params: {name} is {parameter.dtype}; only real floating-point parameters can be optimized")
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise
        self._addresses = {}

    def _check_group(self, group: Group) -> None:
        """Refuse settings that cannot work."""
        if not self._takes_int8 and any(isinstance(p, Int8Weight) for p in group["params"]):
            raise ConfigError(f"params: {type(self).__name__} cannot update weights in 8 bits; use QGaLoreAdamW8bit, or keep them whole")
        if group.get("rank") is not None and not self._takes_rank:
            raise ConfigError(f"rank: {type(self).__name__} updates whole parameters; use rank=None, or GaLoreAdamW")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ConfigError(f"betas: {group['betas']} must both lie in [0, 1)")
        for name in ("lr", "eps", "weight_decay"):
            if not float(group[name]) >= 0:
                raise ConfigError(f"{name}: {group[name]} is negative; use 0 or more")

    def _is_matrix(self, group: Group, parameter: Tensor) -> bool:
        """Whether the parameter gets a low-rank update; dense optimizers have none."""
        return False

    def _group_of(self, parameter: Tensor) -> Group:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))

    def _address(self, parameter: Tensor) -> Address:
        if not self._addresses:
            found = [(group, name, p) for group in self.param_groups for name, p in zip(names_of(group), group["params"], strict=True)]
            matrices = [p for group, _, p in found if self._is_matrix(group, p)]
            index = {p: i for i, p in enumerate(matrices)}
            self._addresses = {p: Address(name, at, index.get(p, -1), len(matrices)) for at, (_, name, p) in enumerate(found)}
        return self._addresses[parameter]

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process keeps the state of a parameter, and updates it."""
        return self.owned is None or parameter in self.owned

    # -- step -----------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layers is not None:
            self._layers.finish()
            return loss
        for group in self.param_groups:
            self._update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    @property
    def per_layer(self) -> bool:
        """Whether weights are updated inside backward (`attach_per_layer`)."""
        return self._layers is not None

    def _accumulates_low(self, group: Group, parameter: Tensor) -> bool:
        """Whether the sum of L over micro-batches is enough for an update of `parameter`."""
        return False

    def _begin_low(self, group: Group, parameter: Tensor) -> None:
        """Begin a step that adds up L: count it, and refresh the basis from the present gradient if that is due."""
        raise NotImplementedError

    def _accumulate_low(self, group: Group, parameter: Tensor) -> Tensor:
        """L of the present gradient."""
        raise NotImplementedError

    def _apply(self, group: Group, parameter: Tensor, low: Tensor) -> None:
        """One update of `parameter` from L."""
        raise NotImplementedError

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        """One update of `parameters`, all of `group` and all with a gradient."""
        raise NotImplementedError

    def _gradient(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            name = self._address(parameter).name
            raise InputError(f"{name}: its gradient is sparse; use torch.optim.SparseAdam for it, or sparse=False in the embedding")
        return gradient

    def _rounding(self, group: Group, parameter: Tensor, step: int) -> Rounding | None:
        """Random bits for a bfloat16 weight: nearest rounding would lose every update below half a step for ever."""
        if not self._is_rounded(parameter) or not group["stochastic_rounding"]:
            return None
        seed = group["seed"]
        place = self._address(parameter).position
        if is_shared(parameter):
            # other bits for every process
            place += parameter.device_mesh.get_local_rank() << 32  # type: ignore[attr-defined]
        return Rounding(partial(self._tile, seed, step, parameter.device), seed, place, step)

    def _is_rounded(self, parameter: Tensor) -> bool:
        """Whether a weight is kept in so few bits that small updates of it would be lost."""
        return parameter.dtype == torch.bfloat16

    def _tile(self, seed: int, step: int, device: torch.device) -> Tensor:
        if self._tiles.get(device, (None,))[:2] != (seed, step):
            self._tiles[device] = seed, step, Rounding.draw_tile(seed, step, device)
        return self._tiles[device][2]

    # -- state ----------------------------------------------------------------------------------------------

    def _layout(self, group: Group, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        """Shapes of the state tensors (0-dimensional ones aside) that `parameter` has after its first step."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Bytes of all state tensors, shared storage counted once."""
        tensors = (local(value) for state in self.state.values() for value in state.values() if isinstance(value, Tensor))
        storages = [t.untyped_storage() for t in tensors if t.ndim > 0]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def predicted_state_bytes(self) -> int:
        """What `state_bytes` gives once every parameter was updated; core's memory estimate asks for it."""
        known = [p for group in self.param_groups for p in group["params"]]
        bases = sum(self.predicted_bytes_of(p, "proj") for p in known if self.keeps_bases and not self.owns(p))
        return bases + sum(self.predicted_bytes_of(p) for p in known if self.owns(p))

    def predicted_bytes_of(self, parameter: Tensor, start: str = "") -> int:
        """The same for one parameter, of the state tensors whose names begin with `start`."""
        group = self._group_of(parameter)
        layout = [(name, shape) for name, shape in self._layout(group, parameter).items() if name.startswith(start)]
        return sum(self._elements_here(parameter, name, shape) * _state_type(name, group, parameter).itemsize for name, shape in layout)

    def _shared_along(self, parameter: Tensor, name: str) -> int | None:
        """The dimension along which the state `name` of a DTensor is shared out; None for what every process has whole."""
        return 0

    def _elements_here(self, parameter: Tensor, name: str, shape: tuple[int, ...]) -> int:
        """Elements of a state tensor that this process has."""
        along = self._shared_along(parameter, name) if is_shared(parameter) else None
        if along is None:
            return math.prod(shape)
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        return math.prod(shape) // shape[along] * share(shape[along], mesh.size(), mesh.get_local_rank())

    def _cut(self, group: Group, parameter: Tensor) -> int:
        """Elements of a process's share of moments in 8 bits, where they are no whole number of blocks; else 0."""
        layout = self._layout(group, parameter)
        if not is_shared(parameter) or "exp_avg_q" not in layout:
            return 0
        along = self._shared_along(parameter, "exp_avg_q") or 0
        shape = layout["exp_avg_q"]
        part = share(shape[along], parameter.device_mesh.size(), 0) * math.prod(shape[along + 1 :])  # type: ignore[attr-defined]
        return part if part < math.prod(shape[along:]) and part % group["block_size"] else 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of the same optimizer over the same parameters.

        Every tensor is copied to its parameter's device and keeps its own dtype (torch would cast all of them,
        8-bit codes included, to the parameter's dtype).

        Raises ResumeRefused when class, format version, groups, or the shape of a state tensor differ.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved_groups = deepcopy(state_dict["param_groups"])
        self._check_saved_groups(saved_groups)
        keys = chain.from_iterable(group["params"] for group in saved_groups)
        owners = [(group, p) for group in self.param_groups for p in group["params"]]
        state: defaultdict[Any, State] = defaultdict(dict)
        for key, (group, parameter) in zip(keys, owners, strict=True):
            if saved := state_dict["state"].get(key):
                self._check_saved_state(group, parameter, saved)
                state[parameter] = {
                    name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
                    for name, value in saved.items()
                }
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            saved_group["params"] = group["params"]
            if "param_names" in group:
                saved_group.setdefault("param_names", group["param_names"])
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._addresses, self._tiles = {}, {}

    def _check_saved_groups(self, saved_groups: list[Group]) -> None:
        ours = f"{type(self).__name__}/{FORMAT}"
        if len(saved_groups) != len(self.param_groups):
            raise ResumeRefused(
                f"optimizer state: it has {len(saved_groups)} parameter groups, this optimizer has {len(self.param_groups)}"
            )
        for number, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            if saved.get("format") != ours:
                found = saved.get("format", "another optimizer")
                raise ResumeRefused(f"optimizer state: it was written by {found}, not by {ours}; start with a fresh optimizer state")
            if len(saved["params"]) != len(group["params"]):
                sizes = f"{len(saved['params'])} parameters, this optimizer {len(group['params'])}"
                raise ResumeRefused(f"optimizer state: its group {number} has {sizes}")
            for key in self._identity:
                if saved.get(key) != group.get(key):
                    values = f"{saved.get(key)!r}, this optimizer has {group.get(key)!r}"
                    raise ResumeRefused(f"{key}: the saved optimizer state has {values}; use the saved value or a fresh optimizer state")

    def _check_saved_state(self, group: Group, parameter: Tensor, saved: State) -> None:
        if saved.get("cut", 0) != self._cut(group, parameter):
            raise ResumeRefused(
                f"optimizer state: 8-bit blocks of {self._address(parameter).name} end where the rows of another number of processes do; "
                "resume with as many processes as before, or with a fresh optimizer state"
            )
        needed = self._layout(group, parameter)
        found = {key: tuple(value.shape) for key, value in saved.items() if isinstance(value, Tensor) and value.ndim > 0}
        for key in sorted(needed.keys() | found.keys()):
            if needed.get(key) != found.get(key):
                name = self._address(parameter).name
                shapes = f"{found.get(key)}, this optimizer needs {needed.get(key)}"
                raise ResumeRefused(
                    f"optimizer state: {key} of {name} has shape {shapes}; use the saved settings or a fresh optimizer state"
                )
