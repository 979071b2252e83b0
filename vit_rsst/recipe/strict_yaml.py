"""YAML 1.2's core schema, strictly: `5e-4` is a number, `no` a string, `2:4` a string, two equal keys an error.

Every key keeps its line number, so that later errors can name their place.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

import yaml

_CORE = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}

_TAGS = {
    yaml.ScalarNode: {*_CORE, "tag:yaml.org,2002:str"},
    yaml.SequenceNode: {"tag:yaml.org,2002:seq"},
    yaml.MappingNode: {"tag:yaml.org,2002:map"},
}


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""

    yaml_implicit_resolvers: ClassVar[dict] = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _tag, (_pattern, _first) in _CORE.items():
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first])


def dump(tree: dict) -> str:
    """The tree as text that `parse` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


Path = tuple[str, ...]


@dataclass
class Document:
    """A parsed file.

    Attributes:
        tree: nested dicts, lists and scalars.
        lines: path of a key → its line, counted from 1.
        problems: (path, line, message) of each syntax error.
    """

    tree: dict = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[Path, int, str]] = field(default_factory=list)


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}


for _tag, (_pattern, _first) in _CORE.items():
    # PyYAML looks up the empty scalar under ''.
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first])


def parse(text: str) -> Document:
    """Parses one document whose top level is a mapping; collects all errors instead of stopping at the first."""
    document = Document()
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark.line if error.problem_mark else 0) + 1
        document.problems.append(((), line, f"not valid YAML: {error.problem or error}"))
        return document
    except yaml.YAMLError as error:
        document.problems.append(((), 1, f"not valid YAML: {error}"))
        return document
    if node is None:
        return document
    if not isinstance(node, yaml.MappingNode):
        document.problems.append(((), node.start_mark.line + 1, "expected a mapping of sections at the top level"))
        return document
    document.tree = _build(node, (), document, loader)
    return document


_WORDS = {"tag:yaml.org,2002:null": type(None), "tag:yaml.org,2002:bool": bool}

_QUOTED = re.compile(r"""'([^']|'')*'|"([^"\\]|\\.)*\"""")


def parse_scalar(text: str, of: Collection[type] = ()) -> object:
    """A value from the command line: what was typed, which is no YAML document with comments, anchors or tags.

    Text in quotes is that text, and brackets hold YAML lists and mappings. Anything else is one scalar.

    Args:
        of: types that the field takes. A field of strings takes the text as it is, brackets and digits too, but for
            null, true and false where these are among its types.

    Raises:
        ValueError: not valid YAML.
    """
    plain, is_text = text.strip(), str in of
    tag = next((tag for tag, (pattern, _) in _CORE.items() if re.fullmatch(pattern, plain)), None)
    is_word = tag is not None and (not is_text or _WORDS.get(tag) in of)
    if not is_word and not _QUOTED.fullmatch(plain) and (is_text or plain[:1] not in ("[", "{")):
        return text
    document = parse(f"value: {plain}")
    if document.problems:
        raise ValueError(document.problems[0][2])
    return document.tree["value"]


def _build(node: yaml.Node, path: Path, document: Document, loader: _CoreLoader, above: tuple = ()) -> object:
    line = node.start_mark.line + 1
    if node in above:
        document.problems.append((path, line, "alias refers to the anchor that contains it"))
        return None
    if node.tag not in _TAGS[type(node)]:
        document.problems.append((path, line, f"tag {node.tag!r} is not allowed in a recipe"))
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, str(i)), document, loader, (*above, node)) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, path, document, loader)
    tree: dict = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in tree:
            first = document.lines[(*path, key)]
            document.problems.append(
                ((*path, key), line, f"duplicate key, first given in line {first}; keep one of the two")
            )
            continue
        document.lines[(*path, key)] = line
        tree[key] = _build(value_node, (*path, key), document, loader, (*above, node))
    return tree


def _scalar(node: yaml.ScalarNode, path: Path, document: Document, loader: _CoreLoader) -> object:
    text = node.value
    if node.tag in _CORE and not re.fullmatch(_CORE[node.tag][0], text):  # an explicit tag
        kind = node.tag.rsplit(":", 1)[-1]
        document.problems.append((path, node.start_mark.line + 1, f"{text!r} does not match its tag !!{kind}"))
        return None
    if node.tag == "tag:yaml.org,2002:int":
        if len(text) > 1000:  # Python reads no more than 4,300 digits
            document.problems.append((path, node.start_mark.line + 1, f"number too long ({len(text):,} digits)"))
            return None
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return loader.construct_object(node)
