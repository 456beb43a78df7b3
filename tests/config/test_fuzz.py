"""Hostile configs: none runs code, hangs, reads outside its folder or fails without a clear error.

An audit hook of the interpreter watches what the reader does: every file opened, every process
started, every code object run while a config is loaded.
"""

import math
import random
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ilm_compile.config import load_config, make_config
from ilm_compile.config.toml_text import to_toml
from ilm_compile.errors import IlmCompileError

SAMPLES = Path(__file__).parent / "samples"
MAX_SECONDS = 3.0
FORBIDDEN = ("exec", "os.", "subprocess.", "socket.", "import", "pty.", "ctypes.", "shutil.")
HARMLESS = ("os.listdir", "os.scandir")


def fuzz(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


_watched: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None:
        _watched.append((event, arguments[0] if arguments else None))


sys.addaudithook(_audit)


@contextmanager
def watching() -> Iterator[list[tuple[str, Any]]]:
    global _watched
    _watched = events = []
    try:
        yield events
    finally:
        _watched = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/configs is where configs may read; root/secret.py is not."""
    root = tmp_path_factory.mktemp("fuzz")
    configs = root / "configs"
    configs.mkdir()
    (root / "secret.py").write_text("SECRET = 1\n")
    (configs / "link.py").symlink_to(root / "secret.py")
    (configs / "base.py").write_text("SIZE = 8\nmodel = dict(num_layers=2)\n")
    load_config(SAMPLES / "7B_sft.py")  # the annotations of the schema are evaluated once, here
    return configs


def settle(action: Callable[[], Any]) -> None:
    """It ends well, or in an error of ours that says something."""
    message = "ended well"
    with suppress(IlmCompileError):
        try:
            action()
        except IlmCompileError as error:
            message = str(error)
            raise
    assert message.strip()


def load(folder: Path, name: str, data: bytes, *overrides: str) -> None:
    """Load it, successfully or with the package's own error, and nothing else may happen."""
    path = folder / name
    path.write_bytes(data)
    start = time.perf_counter()
    with watching() as events:
        settle(lambda: load_config(path, overrides))
    assert time.perf_counter() - start < MAX_SECONDS
    for event, argument in events:
        if event == "open":
            opened = Path(argument).resolve()
            assert opened.is_relative_to(folder), opened
            assert opened.suffix in (".py", ".toml"), opened
        else:
            assert event in HARMLESS or not event.startswith(FORBIDDEN), (event, argument)


def code(canary: str) -> list[str]:
    """Expressions that would do something if they were run."""
    act = f"open('{canary}', 'w')"
    return [
        act,
        f"__import__('os').system('touch {canary}')",
        f'exec("{act}")',
        f'eval("{act}")',
        f"().__class__.__base__.__subclasses__()[0].__init__.__globals__['x']({act})",
        f"(lambda: {act})()",
        f"[{act} for _ in (1,)][0]",
        f"f'{{{act}}}'",
        "f'{(1).__class__}'",
        f"dict(**{act})",
        f"dict(a={act})",
        f"'{{0.__class__}}'.format({act})",
        "breakpoint()",
        "input()",
        "str.mro",
        "'%s' % 1",
        "(yield 1)",
        "a @ b",
        "10**10**10",
        "9**9**9",
        "-(2**2000) * 2**2000 * 2**2000",
        "1 << 10**12",
        "'a' * 10**12",
        "[[0] * 20000] * 20000",
        "round(1, -10**12)",
        "f'{1:1000000000}'",
        "f'{1.0:.{10**9}f}'",
        "int('1' * 100000)",
        "float('nan')",
        "sum([[1] * 1000] * 1000, [])",
        "max([])",
        "{}['a']",
        "1 / 0",
        "10.0 ** 400",
    ]


NAMES = ["model", "data", "parallel", "adam", "ckpt", "monitor", "x", "SIZE", "model_type"]
KEYS = ["num_layers", "hidden_size", "tensor", "zero1", "fp16", "alert", "dtype", "checkpoint"]
OPERATORS = [*"+ - * / // % ** << >> & | ^ @ and or < == in".split(), "is not", "not in"]
ATOMS = [
    *["None", "True", "False", "b''", "...", "1j", "'torch.bfloat16'", "'a'", "[]", "()", "{}"],
    *["0", "1", "-1", "2**70", "1e999", "0.5", "'\\0'", "'é'", "SIZE", "__name__", "__builtins__"],
]
IMPORTS = [
    *["from .base import *", "from .link import *", "from ..secret import *", "import os"],
    *["from .main import *", "from configs.base import SIZE as x", "from . import base"],
    *["from os.path import *", "from .....etc.passwd import *", "from base.base import *"],
]


class Writer:
    """Writes programs: expressions and statements at random, allowed ones and others."""

    def __init__(self, seed: int, canary: str) -> None:
        self._random = random.Random(seed)
        self._code = code(canary)

    def program(self) -> str:
        return "\n".join(self._line() for _ in range(self._random.randrange(12)))

    def _line(self) -> str:
        name, value = self._one(NAMES), self._value(3)
        return self._one(
            [
                f"{name} = {value}",
                f"{name} = {value}",
                f"{name}[{self._one(KEYS)!r}] = {value}",
                f"{name}.update({value})",
                f"{name} = {self._one(NAMES)}",
                f"{name} = [{name}, {self._one(NAMES)}, {name}]",
                f"with read_base():\n    {self._one(IMPORTS)}",
                self._one(IMPORTS),
                f"if {value}:\n    {name} = {self._value(2)}\nelse:\n    pass",
                f"for i in (1,): {name} = {value}",
                f"def f(): return {value}",
                f"{name} += {value}",
                value,
            ]
        )

    def _value(self, depth: int) -> str:
        kind = self._random.randrange(14) if depth else 0
        if kind < 3:
            return self._one([self._one(self._code), self._one(ATOMS), self._one(NAMES)])
        a, b, key = self._value(depth - 1), self._value(depth - 1), self._one(KEYS)
        return [
            f"({a} {self._one(OPERATORS)} {b})",
            f"({a} {self._one(OPERATORS)} {b})",
            f"({a} if {b} else {a})",
            f"dict({key}={a})",
            f"dict({a}, **{b})",
            f"{{{key!r}: {a}, **{b}}}",
            f"[{a}, {b}]",
            f"{a}[{b}]",
            f"{a}[{b}:]",
            f"{self._one(['int', 'str', 'list', 'max', 'len', 'round', 'sum'])}({a}, {b})",
            f"f'{{{self._one(NAMES)}:{self._random.randrange(10**6)}}}'",
        ][kind - 3]

    def _one(self, options: list[str]) -> str:
        return self._random.choice(options)


def test_programs_of_hostile_lines(folder: Path) -> None:
    canary = folder.parent / "canary"

    @fuzz(1500)
    @given(st.integers(0, 2**64))
    def check(seed: int) -> None:
        program = Writer(seed, str(canary)).program()
        load(folder, "main.py", f"model = dict(num_layers=2)\n{program}".encode())

    check()
    assert not canary.exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["configs", "secret.py"]


@fuzz(150)
@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
def test_any_bytes(folder: Path, data: bytes) -> None:
    load(folder, "bytes.py", data)
    load(folder, "bytes.toml", data)


@pytest.mark.parametrize("suffix", [".py", ".toml"])
def test_a_real_config_with_spans_replaced(folder: Path, suffix: str) -> None:
    path = SAMPLES / "7B_sft.py"
    text = path.read_text() if suffix == ".py" else load_config(path).to_toml()
    spans = st.sampled_from(
        ["", "(", "]", "'", "\n", " ", "=", ",", "**", ":", "dict(", "{", "# ", "\0", "-1", "0",
         "1e999", "None", "2**64", "[1]", "true", '"', "x.y", "if", "nan"]
    )  # fmt: skip
    edits = st.lists(
        st.tuples(st.integers(0, len(text)), st.integers(0, 12), spans), min_size=1, max_size=4
    )

    @fuzz(250)
    @given(edits)
    def check(found: list[tuple[int, int, str]]) -> None:
        changed = text
        for start, length, span in found:
            changed = changed[:start] + span + changed[start + length :]
        load(folder, f"edited{suffix}", changed.encode())

    check()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS + NAMES), inner, max_size=3)
    ),
    max_leaves=5,
)
SECTIONS = ["model", "train", "data", "parallel", "ckpt", "monitor", "grad_scaler", "adam", "loss"]


@fuzz(150)
@given(
    st.dictionaries(
        st.sampled_from(SECTIONS),
        st.dictionaries(
            st.sampled_from([*KEYS, "type", "size", "seq_len", "load_ckpt_info"]), VALUES
        ),
    ),
    st.lists(
        st.text(max_size=20) | st.builds("model.num_layers={}".format, st.text(max_size=5)),
        max_size=2,
    ),
)
def test_any_values_of_known_and_unknown_keys(values: dict[str, Any], overrides: list[str]) -> None:
    settle(lambda: make_config(values, overrides))


@fuzz(100)
@given(st.dictionaries(st.text(max_size=5), VALUES.filter(lambda value: value is not None)))
def test_what_is_written_as_toml_is_read_back(values: dict[str, Any]) -> None:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [clean(item) for item in value if item is not None]
        return 0.5 if isinstance(value, float) and math.isnan(value) else value

    cleaned = clean(values)
    assert tomllib.loads(to_toml(cleaned)) == cleaned
