"""Reading and writing YAML 1.2 (and JSON): `off` is text, 3e-4 a number, 010 no octal, 1:30 no sexagesimal, no key twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from lm_core.errors import ConfigError
from lm_core.values import show


def dump(values: dict[str, Any]) -> str:
    """`values` as YAML; text that YAML 1.1 or 1.2 would read as something else is quoted."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


def load(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; ConfigError when it is missing or malformed.

    Booleans are true and false only, so `wandb: off` is text, and 3e-4 is a number (YAML 1.2).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a zero byte
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"configuration file {str(path)!r}: cannot be read ({reason}); give a YAML or JSON file") from None
    return parse(text, f"configuration file {str(path)!r}", as_json=Path(path).suffix == ".json")


def parse(text: str, where: str = "configuration", *, as_json: bool = False) -> dict[str, Any]:
    """The mapping written in `text`; ConfigError, naming `where` and the line, for anything else.

    >>> parse("lr: 3e-4\\nwandb: off")
    {'lr': 0.0003, 'wandb': 'off'}
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique) if as_json else yaml.load(text, Loader=_Loader)
        json.dumps(values, default=str)  # an anchor inside itself is refused here, not by a crash later
    # explicit tags such as !!int make PyYAML's own readers raise whatever they meet
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where}: is malformed; {' '.join(str(error).split()) or 'nested too deeply'}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{where}: holds {show(values)}, which is not a mapping; write lines of the form option: value")
    return values or {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (no `off` as false, no 010 as 8, no 1:30 as 90, 3e-4 a number); a key given twice is refused."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read as text."""

    yaml_implicit_resolvers: dict[str, Any] = {key: [*value] for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # PyYAML writes \x85 and its like as they are, and reads them back as line breaks
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
# PyYAML's own reader takes a leading 0 for an octal number, which YAML 1.2 writes 0o
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value), 0))
_Dumper.add_representer(str, _Dumper.represent_str)
