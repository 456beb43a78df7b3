"""Python-style configs, the format of InternEvo, read without running them.

Of statements a config may use: assignments to names and to items of dicts, `name.update(...)`, `if`
over constants, doc strings, and imports of other configs:

    with read_base():
        from ._base_.models.internlm2_7B import *

As in InternEvo, a dotted path without a leading dot starts at the folder of the first config, whose
own name may stand first ("configs._base_.models..."). A file outside that folder is never opened.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ilm_compile.config.files import display, inside, read_source
from ilm_compile.config.limits import MAX_DEPTH, MAX_FILES, Budget, LimitError
from ilm_compile.config.table import ConfigError, Table
from ilm_compile.internevo.config.expressions import Expressions

READ_BASE = "read_base"

# Of statements that a config may not use: what to write instead.
_INSTEAD: dict[str, str] = {
    "Import": "configs import only other configs, as in `with read_base(): from .base import *`; "
    "a value of the environment is given with --set",
    "FunctionDef": "write the values that it would return",
    "AsyncFunctionDef": "write the values that it would return",
    "ClassDef": "write a dict",
    "For": "write the values out",
    "While": "write the values out",
    "Try": "write the value itself",
    "Assert": "a config is checked when it is loaded",
    "Raise": "a config is checked when it is loaded",
    "Delete": "leave the value out",
    "Global": "assign the name at the top",
    "Match": "write a conditional expression, a if b else c",
}
_AUGMENTED = "write name = name + value"


def read_config(path: Path, root: Path | None, is_key: Callable[[str], bool]) -> Table:
    """Return what a file assigns, without the names that serve the file alone.

    root: the folder that it may import other configs from, its own when None.
    """
    resolved = _resolve(path)
    reader = Reader(root=_resolve(root) if root is not None else resolved.parent)
    names = reader.read(resolved)
    kept = Table()
    for name, value in names.items():
        if is_key(name) or not (name.isupper() or name.startswith("_") or name in reader.used):
            kept.put(name, value, names.places[name])
    return kept


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{str(path)!r}: not a path: {error}") from None


@dataclass(slots=True)
class Reader:
    """Reads one config and the files that it imports. root: the only folder it may read in."""

    root: Path
    budget: Budget = field(default_factory=Budget)
    used: set[str] = field(default_factory=set)  # names that some expression read
    _done: dict[Path, Table] = field(default_factory=dict)
    _open: list[Path] = field(default_factory=list)

    def read(self, path: Path) -> Table:
        """The names that the file assigns."""
        if path in self._open:
            chain = " -> ".join(file.name for file in [*self._open, path])
            raise ConfigError(f"{path}: configs import each other in a circle: {chain}")
        if path not in self._done:
            if len(self._done) + len(self._open) >= MAX_FILES:
                raise ConfigError(f"{path}: a config may import at most {MAX_FILES} files")
            self._open.append(path)
            self._done[path] = self._evaluate(path)
            self._open.pop()
        return self._done[path]

    def _evaluate(self, path: Path) -> Table:
        shown = display(path)
        tree = parse(read_source(path), shown)
        names = Table()
        file = _File(self, path, names, Expressions(shown, names, self.budget))
        for statement in tree.body:
            file.run(statement)
        self.used |= file.expressions.used
        try:
            self.budget.admit(names)
        except LimitError as error:
            raise ConfigError(f"{shown}: {error}") from None
        return names


def parse(text: str, file: str) -> ast.Module:
    """The syntax tree of a config. Raises `ConfigError` with the line of a syntax error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes, say, which are no concern here
            # the name of the file: of a syntax error Python reads the line again, from there
            return ast.parse(text, filename=file)
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno or 1}: not Python syntax: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ConfigError(f"{file}: an expression is nested too deep to be read") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not a text file: {error}") from None


class _File:
    """The statements of one file."""

    def __init__(self, reader: Reader, path: Path, names: Table, expressions: Expressions) -> None:
        self._reader = reader
        self._path = path
        self._names = names
        self.expressions = expressions
        self._depth = 0
        self._kinds: dict[type[ast.AST], Callable[[Any], None]] = {
            ast.Assign: self._assign,
            ast.AnnAssign: self._annotated,
            ast.Expr: self._expression,
            ast.If: self._if,
            ast.With: self._with,
            ast.ImportFrom: self._import_from,
            ast.Pass: lambda node: None,
        }

    def run(self, node: ast.stmt) -> None:
        """Take one statement in. Raises `ConfigError` for one that a config may not use."""
        kind = type(node).__name__
        if type(node) not in self._kinds:
            hint = _AUGMENTED if kind == "AugAssign" else _INSTEAD.get(kind, "write an assignment")
            raise self.expressions.fail(node, f"{kind} is not for configs: {hint}")
        if self._depth >= MAX_DEPTH:
            raise self.expressions.fail(node, f"statements are nested more than {MAX_DEPTH} deep")
        self._depth += 1
        self._kinds[type(node)](node)
        self._depth -= 1

    def _run_all(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.run(statement)

    def _assign(self, node: ast.Assign) -> None:
        value = self.expressions.value(node.value)
        for target in node.targets:
            self._store(target, value)

    def _annotated(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._store(node.target, self.expressions.value(node.value))

    def _store(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._name(target.id, value, target)
        elif isinstance(target, ast.Subscript):
            self._store_item(target, value)
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, list | tuple):
            if len(target.elts) != len(value):
                raise self.expressions.fail(
                    target, f"expected {len(target.elts)} values, got {len(value)}"
                )
            for name, item in zip(target.elts, value, strict=True):
                self._store(name, item)
        else:
            raise self.expressions.fail(
                target, "expected a name or an item of a dict, name['key'], before the ="
            )

    def _name(self, name: str, value: Any, node: ast.AST) -> None:
        if name.startswith("__"):
            raise self.expressions.fail(node, f"{name} is not for configs: choose another name")
        self._names.put(name, value, self.expressions.place(node))

    def _store_item(self, target: ast.Subscript, value: Any) -> None:
        table = self.expressions.value(target.value)
        if not isinstance(table, Table):
            raise self.expressions.fail(target, "only items of a dict can be assigned")
        self.expressions.put(table, self.expressions.value(target.slice), value, target)

    def _expression(self, node: ast.Expr) -> None:
        call = node.value
        if isinstance(call, ast.Constant) and isinstance(call.value, str):
            return  # a doc string
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "update"
        ):
            table = self.expressions.value(call.func.value)
            if isinstance(table, Table):
                change = self.expressions.dict_call(call)
                table.update(change)
                table.places |= change.places
                return
        raise self.expressions.fail(
            node, "this line has no effect in a config: assign it to a name, or remove it"
        )

    def _if(self, node: ast.If) -> None:
        self._run_all(node.body if self.expressions.value(node.test) else node.orelse)

    def _with(self, node: ast.With) -> None:
        calls = [item.context_expr for item in node.items]
        if not all(_is_read_base(call) for call in calls):
            raise self.expressions.fail(
                node, f"the only `with` of a config is `with {READ_BASE}():`"
            )
        for statement in node.body:
            if not isinstance(statement, ast.ImportFrom):
                raise self.expressions.fail(
                    statement, f"inside `with {READ_BASE}():` stand only from ... import ... lines"
                )
            self._import(statement)

    def _import_from(self, node: ast.ImportFrom) -> None:
        if [alias.name for alias in node.names] != [READ_BASE]:
            raise self.expressions.fail(
                node,
                f"write imports of other configs inside `with {READ_BASE}():`; nothing else can be "
                "imported",
            )

    def _import(self, node: ast.ImportFrom) -> None:
        base = self._reader.read(self._locate(node))
        for alias in node.names:
            if alias.name == "*":
                chosen = {name: name for name in base if not name.startswith("_")}
            elif alias.name in base:
                chosen = {alias.name: alias.asname or alias.name}
            else:
                raise self.expressions.fail(
                    node, f"the config imported has no {alias.name!r}: it has {', '.join(base)}"
                )
            for name, target in chosen.items():
                self._names.put(target, base[name], base.places[name])

    def _locate(self, node: ast.ImportFrom) -> Path:
        """The file that an import names. Raises `ConfigError` if it would lie outside the root."""
        root = self._reader.root
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            folder = self._path.parent
            for _ in range(node.level - 1):
                folder = folder.parent
        else:
            folder = root
            if parts and parts[0] == root.name and not (root / parts[0]).exists():
                parts = parts[1:]
        if not parts:
            raise self.expressions.fail(node, "name the config file: from .file import *")
        found = inside(root, folder.joinpath(*parts).with_name(f"{parts[-1]}.py"))
        if found is None:
            raise self.expressions.fail(
                node,
                f"a config imports only from its own folder {root} and below; move the file there, "
                "or start from a config further up",
            )
        if not found.is_file():
            raise self.expressions.fail(node, f"there is no config {found}")
        return found


def _is_read_base(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == READ_BASE
        and not node.args
    )
