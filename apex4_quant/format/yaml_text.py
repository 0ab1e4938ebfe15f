"""YAML that people write (recipes, plans, the head of a model card), read strictly: what cannot be meant is an error."""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import shown


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would keep the last without a word, and aliases: a few lines of them
    stand for more text than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias (*) stands there: write out what it means", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name[:200]} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Plain values. Raises ValueError, whose text is one line, for what is not valid."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: {problem}" if mark else str(problem or error)
        raise ValueError(" ".join(where.split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # What has the form of a date or a number and is none: the library lets its own exceptions through.
        raise ValueError(f"a value cannot be read: {shown(str(error))}") from error
