"""YAML text (JSON is YAML too) to plain values and back; errors name their line, duplicate keys included."""

from typing import Any

import yaml
from yaml.constructor import ConstructorError

from .problems import Problem, SpecError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (a few lines of them expand to gigabytes) and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ConstructorError(None, None, "aliases (*name) are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_document(text: str) -> Any:
    """Return the values of one YAML document.

    Raises:
        SpecError: the text is not YAML; the message names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        raise _not_yaml(f"{error.problem or error.context} at {where}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _not_yaml(str(error)) from None
    except RecursionError:
        raise _not_yaml("nested too deeply") from None


def _not_yaml(reason: str) -> SpecError:
    return SpecError([Problem("spec", f"must be YAML: {reason}")])


def write_document(values: dict[str, Any]) -> str:
    """Return plain values as YAML in the order given; long text stays in one block."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    pass


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and not any(line != line.rstrip() for line in text.split("\n")) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    flat = all(not isinstance(value, list | dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
