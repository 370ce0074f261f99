"""The part of YAML that configurations are made of, and how much of it.

Dates and tags are refused, with their place, and so are aliases for what holds them; all others count as what they
stand for, which can be billions of values.
"""

import math
from typing import Any

import ruamel.yaml
from ruamel.yaml.composer import ComposerError
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node, ScalarNode

MOST_VALUES = 5_000
DEEPEST = 50
LONGEST_NUMBER = 100  # characters
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class Composer(ruamel.yaml.composer.Composer):
    """Refuses more values or levels than any configuration has.

    Attributes:
        values: keys and values so far, those included that aliases stand for.
        depth: how deep the present one lies.
        sizes: how many values each anchor names, once all of them are known.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.values = self.depth = 0
        self.sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Each key and each value comes through here."""
        event = self.parser.peek_event()
        before, alias = self.values, isinstance(event, AliasEvent)
        self.values += self.sizes.get(event.anchor, 1) if alias else 1
        problem = None
        if alias and event.anchor in self.anchors and event.anchor not in self.sizes:
            problem = f"{event.anchor} holds itself"
        elif not alias and event.tag is not None:
            problem = f"tags are not taken: leave out {event.tag}"
        elif self.values > MOST_VALUES:
            problem = f"more than {MOST_VALUES} keys and values"
        elif self.depth == DEEPEST:
            problem = f"nested deeper than {DEEPEST} levels"
        if problem:
            raise ComposerError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not alias and event.anchor is not None:
            self.sizes[event.anchor] = self.values - before
        return node


class Constructor(ruamel.yaml.constructor.SafeConstructor):
    """Makes text, finite numbers, booleans, null, lists and mappings, and nothing else."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Each key and each value comes through here."""
        if node.tag not in TAGS:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ConstructorError(
                problem=f"a {kind} is not taken: put it in quotes if it is text", problem_mark=node.start_mark
            )
        return super().construct_object(node, deep)

    def construct_yaml_int(self, node: ScalarNode) -> int:
        """Of a few characters: reading those of thousands of digits takes long, and writing them is an error."""
        self._require_short(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: ScalarNode) -> float:
        """Neither NaN nor infinite, which also a number like 1e400 would be."""
        self._require_short(node)
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise ConstructorError(problem="a number that is not finite", problem_mark=node.start_mark)
        return value

    @staticmethod
    def _require_short(node: ScalarNode) -> None:
        if len(node.value) > LONGEST_NUMBER:
            raise ConstructorError(
                problem=f"a number of more than {LONGEST_NUMBER} characters", problem_mark=node.start_mark
            )


for name, construct in (("int", Constructor.construct_yaml_int), ("float", Constructor.construct_yaml_float)):
    Constructor.add_constructor(f"tag:yaml.org,2002:{name}", construct)
