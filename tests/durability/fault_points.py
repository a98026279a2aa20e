"""Every `await` of chosen modules as a fault point: one of them can be told never to return.

    points = instrument(["asyncrl.engine"])     before anything imports it
    arm(points[0])                              from now on that await waits for ever

`async with` and `async for` wait too: at their beginning. It is done to the source while it is compiled, so what runs
is the code itself.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

HOOK = "__never__"


@dataclass(frozen=True)
class Point:
    """One await."""

    module: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.module.removeprefix('asyncrl.')}:{self.line} {self.function}"


POINTS: list[Point] = []
REACHED: Counter[int] = Counter()
_armed: int | None = None
_at_call = 1
_held: list[asyncio.Future[None]] = []
"""What is waited for: a task whose future nobody holds could be collected, and its wait would end."""


def arm(point: Point | None, at_call: int = 1) -> None:
    """The `at_call`-th time that it is reached, and each time after, this await never returns."""
    global _armed, _at_call
    _armed = None if point is None else POINTS.index(point)
    _at_call = at_call
    REACHED.clear()
    _held.clear()


def reached(point: Point) -> int:
    return REACHED[POINTS.index(point)]


def has_hung() -> bool:
    return bool(_held)


async def _never(number: int) -> None:
    """What stands in front of every await."""
    REACHED[number] += 1
    if number == _armed and REACHED[number] >= _at_call:
        _held.append(asyncio.get_running_loop().create_future())
        await _held[-1]


class _Instrument(ast.NodeTransformer):
    def __init__(self, module: str) -> None:
        self._module = module
        self._names: list[str] = []

    def _scope(self, node: ast.AST, name: str) -> ast.AST:
        self._names.append(name)
        self.generic_visit(node)
        self._names.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._scope(node, node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._scope(node, node.name)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._scope(node, node.name)

    def visit_Await(self, node: ast.Await) -> ast.AST:
        number = self._number(node)
        self.generic_visit(node)
        # (await never(n), await value)[1]: in this order, on the line of the await itself.
        pair = ast.Tuple([self._hook(number), node], ast.Load())
        return self._at(node, ast.Subscript(pair, ast.Constant(1), ast.Load()))

    def visit_AsyncWith(self, node: ast.AsyncWith) -> list[ast.AST]:
        return self._before(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> list[ast.AST]:
        return self._before(node)

    def _before(self, node: ast.AST) -> list[ast.AST]:
        number = self._number(node)
        self.generic_visit(node)
        return [self._at(node, ast.Expr(self._hook(number))), node]

    def _number(self, node: ast.AST) -> int:
        POINTS.append(Point(self._module, ".".join(self._names), node.lineno))
        return len(POINTS) - 1

    def _hook(self, number: int) -> ast.Await:
        return ast.Await(ast.Call(ast.Name(HOOK, ast.Load()), [ast.Constant(number)], []))

    def _at(self, where: ast.AST, made: ast.AST) -> ast.AST:
        return ast.fix_missing_locations(ast.copy_location(made, where))


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name: str) -> object:  # never from the cache, and never into it
        return self.source_to_code(self.get_data(self.get_filename(name)), self.get_filename(name))

    def source_to_code(self, data: bytes, path: str, *, _optimize: int = -1) -> object:  # type: ignore[override]
        tree = _Instrument(self.name).visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[HOOK] = _never
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = frozenset(modules)

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self._modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(name, spec.origin)
        return spec


def instrument(modules: Sequence[str]) -> list[Point]:
    """Import `modules` with every await of theirs as a fault point. Nothing may have imported them before."""
    early = [name for name in modules if name in sys.modules]
    assert not early, f"imported already: {early}"
    sys.meta_path.insert(0, _Finder(modules))
    for name in modules:
        importlib.import_module(name)
    return list(POINTS)
