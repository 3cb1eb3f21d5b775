"""Read YAML files so that every fault is told with its line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raydetr.errors import UserError

DEEPEST = 20  # levels of nesting in a YAML file
_KINDS = {yaml.ScalarNode: "a scalar", yaml.SequenceNode: "a sequence", yaml.MappingNode: "a mapping"}


def yaml_leaves(path: str | Path, depth: int | None = None) -> Iterator[tuple[str, Any, int]]:
    """Iterate over the leaves of a YAML mapping.

    Args:
        path: The file.
        depth: How many levels of nested mappings are unfolded, which is the largest number of dots in a name; None: all levels.

    Yields:
        Dotted name, value and line number of each leaf.

    Raises:
        UserError: The file cannot be read, is not a YAML mapping, or has a name twice.
    """
    root = read_yaml_nodes(path)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line {root.start_mark.line + 1}: expected settings by name, found {_KINDS[type(root)]}")
    seen: dict[str, int] = {}
    for name, node, line in _leaves_of(root, "", depth):
        if name in seen:
            raise UserError(f"{path}, line {line}: {name} stands twice (first on line {seen[name]})")
        seen[name] = line
        # YAML 1.1 reads 1:4 as 64, in base 60, which is never meant.
        in_base_60 = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ":" in node.value
        yield name, node.value if in_base_60 else yaml_value(node, path), line


def _leaves_of(node: yaml.MappingNode, prefix: str, depth: int | None) -> Iterator[tuple[str, yaml.Node, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value if isinstance(key, yaml.ScalarNode) else f'({key.id})'}"
        if isinstance(value, yaml.MappingNode) and (depth is None or name.count(".") < depth):
            yield from _leaves_of(value, f"{name}.", depth)
        else:
            yield name, value, key.start_mark.line + 1


def read_yaml_nodes(path: str | Path) -> yaml.Node | None:
    """Read a YAML file as PyYAML's nodes, which know their line numbers.

    Args:
        path: The file.

    Returns:
        The root node, or None if the file is empty.

    Raises:
        UserError: The file cannot be read, is not YAML, refers to itself, or is nested too deeply. The message names the line.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            root = yaml.compose(file.read(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; settings are at most a few levels deep") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not a YAML file ({getattr(error, 'problem', None) or 'bad encoding'})") from None
    if root is not None:
        _check_nesting(root, path, (), set())
    return root


def _check_nesting(node: yaml.Node, path: str | Path, above: tuple[yaml.Node, ...], checked: set[yaml.Node]) -> None:
    where = f"{path}, line {node.start_mark.line + 1}"
    if node in above:
        raise UserError(f"{where}: refers to itself; write the value out")
    if len(above) > DEEPEST:
        raise UserError(f"{where}: is nested too deeply; settings are at most a few levels deep")
    if isinstance(node, yaml.CollectionNode) and node not in checked:
        children = (each for pair in node.value for each in pair) if isinstance(node, yaml.MappingNode) else node.value
        for child in children:
            _check_nesting(child, path, (*above, node), checked)
        checked.add(node)


def yaml_value(node: yaml.Node, path: str | Path) -> Any:
    """Return the value of a YAML node in plain Python types.

    Args:
        node: A node from :func:`read_yaml_nodes`.
        path: Its file, for the error message.

    Raises:
        UserError: The node has a value that YAML does not allow, such as a date with month 13.
    """
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a date of month 13 raises ValueError
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}, line {node.start_mark.line + 1}: not a YAML file ({problem})") from None
