"""Values of the expressions that a Python-style config may use, computed without running code.

The syntax tree is walked with one function for each kind of node; a kind that has none is an error
that says what to write instead. No attribute is ever read, no method looked up and no function
called but those of `FUNCTIONS`, so nothing of Python's own objects can be reached.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ilm_compile.config import limits
from ilm_compile.config.limits import Budget, LimitError
from ilm_compile.config.table import ConfigError, Place, Table

_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_CHECKS: dict[type[ast.AST], Callable[[Any, Any], None]] = {
    ast.Pow: limits.check_power,
    ast.LShift: limits.check_shift,
    ast.Mult: limits.check_repeat,
}
_UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, box: item in box,
    ast.NotIn: lambda item, box: item not in box,
}


def _round(value: Any, digits: int = 0) -> Any:
    """Python's round, without the huge powers of ten that many digits would need."""
    limits.check_digits(digits)
    return round(value, digits) if digits else round(value)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "abs": abs,
    "round": _round,
    "min": min,
    "max": max,
    "sum": sum,
    "len": len,
    "list": list,
    "tuple": tuple,
}
_CONVERSIONS: dict[int, Callable[[Any], str]] = {-1: lambda value: value, 115: str, 114: repr}
_SCALARS = (str, bool, int, float, type(None))

# Of kinds of syntax that a config may not use: what to write instead.
INSTEAD: dict[str, str] = {
    "Attribute": "attributes are not read: write a dtype as text ('torch.bfloat16'), an item of a "
    "dict as data['seq_len'], and a value of the environment with --set",
    "Lambda": "write the value itself",
    "ListComp": "write the list out, or repeat it as [value] * 4",
    "SetComp": "write a list",
    "DictComp": "write the dict out",
    "GeneratorExp": "write the list out",
    "Set": "write a list",
    "Starred": "join lists with +",
    "NamedExpr": "assign the name on a line of its own",
    "Await": "write the value itself",
    "Yield": "write the value itself",
    "YieldFrom": "write the value itself",
}
_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, LimitError, RecursionError)


class Expressions:
    """Evaluates expressions of one file. `names` are the values assigned so far."""

    def __init__(self, file: str, names: Table, budget: Budget) -> None:
        self._file = file
        self._names = names
        self._budget = budget
        self.used: set[str] = set()  # names that an expression read
        self._depth = 0
        self._kinds: dict[type[ast.AST], Callable[[Any], Any]] = {
            ast.Constant: self._constant,
            ast.Name: self._name,
            ast.BinOp: self._arithmetic,
            ast.UnaryOp: self._unary,
            ast.BoolOp: self._boolean,
            ast.Compare: self._comparison,
            ast.IfExp: self._conditional,
            ast.List: lambda node: [self.value(item) for item in node.elts],
            ast.Tuple: lambda node: tuple([self.value(item) for item in node.elts]),
            ast.Dict: self._dict,
            ast.Subscript: self._item,
            ast.Slice: self._slice,
            ast.JoinedStr: lambda node: "".join([self.value(part) for part in node.values]),
            ast.FormattedValue: self._formatted,
            ast.Call: self._call,
        }

    def place(self, node: ast.AST) -> Place:
        return Place(self._file, getattr(node, "lineno", None))

    def fail(self, node: ast.AST, message: str) -> ConfigError:
        """The error for `node`, with its file and line."""
        return ConfigError(f"{self.place(node)}: {message}")

    def value(self, node: ast.AST) -> Any:
        """The value of an expression. Raises `ConfigError` where it is not one of a config."""
        kind = type(node).__name__
        evaluate = self._kinds.get(type(node))
        if evaluate is None:
            raise self.fail(
                node, f"{kind} is not for configs: {INSTEAD.get(kind, 'write the value itself')}"
            )
        if self._depth >= limits.MAX_DEPTH:
            raise self.fail(node, f"an expression is nested more than {limits.MAX_DEPTH} deep")
        self._depth += 1
        try:
            self._budget.spend()
            return self._admitted(evaluate(node))
        except _FAULTS as error:
            if isinstance(error, ConfigError):
                raise
            raise self.fail(node, f"cannot evaluate this: {_told(error)}") from None
        finally:
            self._depth -= 1

    def _admitted(self, value: Any) -> Any:
        if isinstance(value, complex):
            raise LimitError("the result is a complex number")
        return self._budget.admit(value)

    def _constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, _SCALARS):
            raise self.fail(
                node,
                f"a {type(node.value).__name__} is not for configs: write a text, a number, True, "
                "False or None",
            )
        return node.value

    def _name(self, node: ast.Name) -> Any:
        if node.id not in self._names:
            raise self.fail(
                node,
                f"the name {node.id!r} is not known here: assign it above or import it with "
                "read_base(); a dtype is written as text, 'torch.bfloat16'",
            )
        self.used.add(node.id)
        return self._names[node.id]

    def _arithmetic(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        kind = type(node.op)
        if kind is ast.Mod and isinstance(left, str):
            raise self.fail(node, "text % values is not for configs: write an f-string")
        if kind is ast.BitOr and isinstance(left, dict):
            raise self.fail(node, "dict | dict is not for configs: write dict(left, **right)")
        if kind not in _ARITHMETIC:
            raise self.fail(node, f"{kind.__name__} is not for configs: write the value itself")
        if kind in _CHECKS:
            _CHECKS[kind](left, right)
        return _ARITHMETIC[kind](left, right)

    def _unary(self, node: ast.UnaryOp) -> Any:
        return _UNARY[type(node.op)](self.value(node.operand))

    def _boolean(self, node: ast.BoolOp) -> Any:
        stops = isinstance(node.op, ast.Or)
        value = None
        for operand in node.values:
            value = self.value(operand)
            if bool(value) is stops:
                break
        return value

    def _comparison(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for kind, operand in zip(node.ops, node.comparators, strict=True):
            right = self.value(operand)
            if not _COMPARISONS[type(kind)](left, right):
                return False
            left = right
        return True

    def _conditional(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.value(node.test) else node.orelse)

    def _dict(self, node: ast.Dict) -> Table:
        table = Table()
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                self._merge(table, value)
            else:
                self.put(table, self.value(key), self.value(value), key)
        return table

    def _merge(self, table: Table, node: ast.AST) -> None:
        other = self.value(node)
        if not isinstance(other, Table):
            raise self.fail(node, f"expected a dict after **, got {type(other).__name__}")
        table.update(other)
        table.places |= other.places

    def put(self, table: Table, key: Any, value: Any, node: ast.AST) -> None:
        """Set a key of a dict, which must be text."""
        if not isinstance(key, str):
            raise self.fail(node, f"expected text as the key of a dict, got {type(key).__name__}")
        table.put(key, value, self.place(node))

    def _item(self, node: ast.Subscript) -> Any:
        box, key = self.value(node.value), self.value(node.slice)
        if isinstance(box, Mapping) and key not in box:
            raise self.fail(node, f"the dict has no key {key!r}: it has {', '.join(box) or 'none'}")
        return box[key]

    def _slice(self, node: ast.Slice) -> slice:
        parts = (node.lower, node.upper, node.step)
        return slice(*(None if part is None else self.value(part) for part in parts))

    def _formatted(self, node: ast.FormattedValue) -> str:
        value = self.value(node.value)
        if not isinstance(value, _SCALARS):
            raise self.fail(
                node, f"an f-string may hold text and numbers, not a {type(value).__name__}"
            )
        if node.conversion not in _CONVERSIONS:
            raise self.fail(node, "!a is not for configs: write !r or !s")
        spec = "" if node.format_spec is None else self.value(node.format_spec)
        limits.check_format(spec)
        return format(_CONVERSIONS[node.conversion](value), spec)

    def _call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name == "dict":
            return self.dict_call(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            return self._join(node, node.func.value)
        if name not in FUNCTIONS:
            raise self.fail(
                node,
                f"{_call_name(node)} is not called: a config may call dict, "
                f"{', '.join(FUNCTIONS)}; write the value itself, or give it with --set",
            )
        if node.keywords:
            raise self.fail(node, f"{name}() in a config takes no keywords: write the value itself")
        values = [self.value(argument) for argument in node.args]
        if name == "str" and not all(isinstance(value, _SCALARS) for value in values):
            raise self.fail(node, "str() in a config is of a number or a text")
        return FUNCTIONS[name](*values)

    def _join(self, node: ast.Call, separator: ast.expr) -> str:
        """A text's join() of a list of texts, by which configs put paths together."""
        first, *lists = (self.value(argument) for argument in (separator, *node.args))
        parts: Any = lists[0] if len(lists) == 1 and isinstance(lists[0], list | tuple) else [None]
        if node.keywords or not all(isinstance(part, str) for part in (first, *parts)):
            raise self.fail(node, "join() in a config is of one list of texts")
        limits.check_join(first, parts)
        return str(first.join(parts))

    def dict_call(self, node: ast.Call) -> Table:
        """The dict of a call dict(...), whatever the function that is called."""
        table = Table()
        for argument in node.args:
            self._merge(table, argument)
        for keyword in node.keywords:
            if keyword.arg is None:
                self._merge(table, keyword.value)
            else:
                self.put(table, keyword.arg, self.value(keyword.value), keyword)
        return table


def _call_name(node: ast.Call) -> str:
    """The name of what was called, without what it is an attribute of."""
    if isinstance(node.func, ast.Attribute):
        return f".{node.func.attr}()"
    return f"{node.func.id}()" if isinstance(node.func, ast.Name) else "this"


def _told(error: BaseException) -> str:
    if isinstance(error, ZeroDivisionError | OverflowError):
        return f"{error}"
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, LimitError) else f"{type(error).__name__}: {text}"
