"""YAML as its authors mean it: 1e-4 is a number, only true and false are booleans, a repeated key is an error.

PyYAML follows YAML 1.1, where `learning_rate: 1e-4` is text, `eval_strategy: no` is false, and the last of two equal
keys wins in silence.
"""

import re

import yaml

FLOAT_WITHOUT_POINT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
BOOLEAN = re.compile(r"(true|True|TRUE|false|False|FALSE)$")


class ConfigurationLoader(yaml.SafeLoader):
    """Reads a configuration file."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


class ConfigurationDumper(yaml.SafeDumper):
    """Writes what ConfigurationLoader reads back as the same values; text that looks like 1e-4 gets quotes."""


ConfigurationLoader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOLEAN, list("tTfF"))
for configuration_class in (ConfigurationLoader, ConfigurationDumper):
    configuration_class.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_WITHOUT_POINT, list("-+.0123456789"))
