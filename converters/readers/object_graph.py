"""The object graph of a TensorFlow checkpoint: which Python object holds which variable, by
attribute name.

Format: tensorflow/core/protobuf/trackable_object_graph.proto.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from .protobuf import Message, integer, parse, submessages, text

MAX_NODES = 250_000  # the graph of a UNet has 3,000

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One object of the graph that was saved.

    Attributes:
        children: local name -> node id, an index into the graph.
        variables: attribute name (`VARIABLE_VALUE` for a variable) -> checkpoint key.
    """

    children: dict[str, int]
    variables: dict[str, str]


def parse_graph(data: bytes) -> list[Node]:
    """The nodes of a `TrackableObjectGraph`, the root first. There may be cycles.

    Slot variables are left out: their keys contain `/.OPTIMIZER_SLOT/`.

    Raises:
        ValueError: the data is not such a message, an object has one name twice, or a child does
            not exist.
    """
    message = parse(data)
    if len(message.get(1, ())) > MAX_NODES:
        raise ValueError(f"the object graph has more than {MAX_NODES} objects")
    graph = [_parse_node(node) for node in submessages(message, 1)]
    for node in graph:
        for name, child in node.children.items():
            if not 0 <= child < len(graph):
                raise ValueError(
                    f"the object graph has {len(graph)} objects, but {name!r} is number {child}"
                )
    return graph


def _parse_node(node: Message) -> Node:
    children = _unique((text(child, 2), integer(child, 1)) for child in submessages(node, 1))
    variables = _unique(
        (text(attribute, 1), text(attribute, 3)) for attribute in submessages(node, 2)
    )
    return Node(children, variables)


def _unique(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    unique: dict[str, T] = {}
    for name, value in pairs:
        if name in unique or not name.isprintable():
            raise ValueError(
                f"the object graph has a name that is not printable or comes twice: {name!r}"
            )
        unique[name] = value
    return unique
