"""Small changes to a source file, each of which some test should notice: the operators of mutmut, one change at a time.

Functions are changed, and the constants of a module. Left alone is what no test should hold: annotations, ``Literal``,
docstrings, prose (a string with a space), decorators, defaults of parameters, assertions, ``cast``, and ``strict=``.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import deep_replace
from mutmut.mutation.mutators import mutation_operators


@dataclass(frozen=True)
class Place:
    """A function, or a constant of a module (``constant``): its name and its first and last line."""

    name: str
    first: int
    last: int
    constant: bool = False


@dataclass(frozen=True)
class Mutant:
    """A file with one change: the lines that differ, without indentation, and the text of the whole file."""

    path: str
    place: Place
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.path} {self.place.name}\n- {self.before}\n+ {self.after}"


@dataclass(frozen=True)
class _Change:
    place: Place
    old: cst.CSTNode
    new: cst.CSTNode


def mutants_of(root: Path, path: str, at_most: int, seed: int) -> tuple[int, list[Mutant]]:
    """Return how many mutants a file has, and ``at_most`` of them, in an order that ``seed`` decides.

    The order of two changes depends on nothing but themselves: a change elsewhere in the file leaves it as it is.
    """
    source = (root / path).read_text()
    wrapper = MetadataWrapper(cst.parse_module(source))
    spans = wrapper.resolve(PositionProvider)
    module = wrapper.module
    seen: Counter[str] = Counter()
    ranked = []
    for change in _changes(module, spans, None, ""):
        name = "\n".join((path, change.place.name, module.code_for_node(change.old), module.code_for_node(change.new)))
        seen[name] += 1
        ranked.append((hashlib.sha256(f"{seed}\n{name}\n{seen[name]}".encode()).digest(), change))
    ranked.sort(key=lambda pair: pair[0])
    mutants: list[Mutant] = []
    for _, change in ranked:
        if len(mutants) == at_most:
            break
        text = deep_replace(module, change.old, change.new).code  # type: ignore[union-attr]
        if _runs_as_before(source, text):
            continue
        before, after = _difference(source, text)
        mutants.append(Mutant(path, change.place, before, after, text))
    return len(ranked), mutants


def _changes(node: cst.CSTNode, spans, place: Place | None, owner: str) -> Iterator[_Change]:  # type: ignore[no-untyped-def]
    if _is_left_alone(node):
        return
    if place is None:
        place = _place(node, spans, owner)
    if place is not None:
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                yield from (_Change(place, node, new) for new in operator(node) if _matters(node, new))
    elif isinstance(node, cst.ClassDef):
        owner = f"{owner}{node.name.value}."
    for child in node.children:
        yield from _changes(child, spans, place, owner)


def _place(node: cst.CSTNode, spans, owner: str) -> Place | None:  # type: ignore[no-untyped-def]
    """Begin a place, whose nodes are changed, at a function or at a constant of the module."""
    if isinstance(node, cst.FunctionDef):
        first = node.decorators[0] if node.decorators else node
        return Place(owner + node.name.value, spans[first].start.line, spans[node].end.line)
    if isinstance(node, cst.SimpleStatementLine) and not owner:
        statement = node.body[0]
        if isinstance(statement, cst.AnnAssign):
            target = statement.target
        elif isinstance(statement, cst.Assign):
            target = statement.targets[0].target
        else:
            return None
        if isinstance(target, cst.Name):
            return Place(target.value, spans[node].start.line, spans[node].end.line, constant=True)
    return None


def _is_left_alone(node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Arg):
        return node.keyword is not None and node.keyword.value == "strict"
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Name):
        return node.func.value in ("len", "isinstance", "cast", "TypeVar")
    if isinstance(node, (cst.Assign, cst.AnnAssign)) and isinstance(node.value, cst.Subscript):
        return isinstance(node.value.value, cst.Name) and node.value.value.value == "Literal"
    return isinstance(node, (cst.Annotation, cst.Decorator, cst.Parameters, cst.Assert, cst.Import, cst.ImportFrom))


def _matters(old: cst.CSTNode, new: cst.CSTNode) -> bool:
    if isinstance(old, cst.SimpleString) and isinstance(new, cst.SimpleString):
        return " " not in old.value and "XX" in new.value
    if isinstance(old, cst.Call) and isinstance(new, cst.Call):
        return all(any(arg is kept for kept in new.args) for arg in old.args if _is_left_alone(arg))
    return True


def _runs_as_before(source: str, text: str) -> bool:
    try:
        return ast.dump(ast.parse(source)) == ast.dump(ast.parse(text))
    except SyntaxError:
        return True


def _difference(source: str, text: str) -> tuple[str, str]:
    lines = list(difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    before = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    after = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return before.replace(", )", ")"), after.replace(", )", ")")
