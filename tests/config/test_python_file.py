"""InternEvo's Python-style files: what is read, and what is refused instead of being run."""

from pathlib import Path

import pytest

from ilm_compile.config import ConfigError
from ilm_compile.config.table import Table
from ilm_compile.internevo.config.python_file import Reader


def read(folder: Path, text: str) -> Table:
    path = folder / "main.py"
    path.write_text(text)
    return Reader(root=folder).read(path)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("8 / 3", 8 / 3),
        ("512 * 1024 * 1024", 2**29),
        ("2**16 - (7 // 2) % 2 + -1", 2**16 - 2),
        ("1 << 4 | 1", 17),
        ("~5 ^ 3 & 6", ~5 ^ 3 & 6),
        ('f"runs/{JOB}_{STEPS:04d}_{1 / 3:.2f}_{JOB!r}"', "runs/a_0050_0.33_'a'"),
        ("'on' if STEPS > 10 else 'off'", "on"),
        ("0 < STEPS <= 50 and JOB == 'a'", True),
        ("None or not False", True),
        ("JOB in ('a', 'b')", True),
        ("NONE is None", True),
        ("dict(a=1, b=[1, (2, 3)])", {"a": 1, "b": [1, (2, 3)]}),
        ("{**D, 'k': 2}", {"k": 2}),
        ("dict(D, l=3, **{'m': 4})", {"k": 1, "l": 3, "m": 4}),
        ("D['k'] + [10, 20, 30][-1]", 31),
        ("[1, 2, 3, 4][1:-1]", [2, 3]),
        ("'torch.' + 'bfloat16'", "torch.bfloat16"),
        ("[0, 1] * 2", [0, 1, 0, 1]),
        ("int(50 / 2)", 25),
        ("round(2.675, 1) + max(1, 2) + min([3, 4]) + sum([1, 2]) + abs(-1) + len('ab')", 13.7),
        (
            "[str(1), float('inf'), bool(0), list((1,)), tuple([2])]",
            ["1", float("inf"), False, [1], (2,)],
        ),
    ],
)
def test_an_expression_has_the_value_that_python_gives_it(
    tmp_path: Path, expression: str, expected: object
) -> None:
    names = "JOB, STEPS = 'a', 50\nNONE = None\nD = dict(k=1)\n"
    assert read(tmp_path, f"{names}x = {expression}\n")["x"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""Doc."""\nx: int = 3\npass\n', 3),
        ("x = y = 3\n", 3),
        ("(a, [x]) = 1, [3]\n", 3),
        ("d = {}\nd['x'] = 3\nx = d['x']\n", 3),
        ("d = dict(a=dict())\nd['a']['x'] = 3\nx = d['a']['x']\n", 3),
        ("d = {}\ne = d\ne.update(x=3)\nx = d['x']\n", 3),
        ("d = {}\nd.update({'x': 1}, x=3)\nx = d['x']\n", 3),
        ("if 1 > 2:\n    x = 1\nelif True:\n    x = 3\nelse:\n    x = 2\n", 3),
        ("from internlm.core.context.parallel_context import read_base\nx = 3\n", 3),
        ("d = 'a'\nx = '/'.join([d, 'b'])\n", "a/b"),
    ],
)
def test_a_statement_does_what_it_does_in_python(
    tmp_path: Path, text: str, expected: object
) -> None:
    assert read(tmp_path, text)["x"] == expected


@pytest.mark.parametrize(
    ("text", "line", "instead"),
    [
        ("import os\n", 1, "with read_base()"),
        ("from os import environ\n", 1, "inside `with read_base():`"),
        ("x = 1\ny = os.environ['A']\n", 2, "--set"),
        ("x = torch.bfloat16\n", 1, "'torch.bfloat16'"),
        ("x = open('f')\n", 1, "open() is not called"),
        ("x = {}.get('a')\n", 1, ".get() is not called"),
        ("x = ''.join(['a', 1])\n", 1, "one list of texts"),
        ("x = ('a' * 1000).join(['b'] * 1000)\n", 1, "limit is 100000"),
        ("x = '%d' % 1\n", 1, "f-string"),
        ("x = [i for i in (1, 2)]\n", 1, "write the list out"),
        ("x = lambda: 1\n", 1, "write the value itself"),
        ("x = {1, 2}\n", 1, "write a list"),
        ("x = [*[1]]\n", 1, "join lists with +"),
        ("x = (y := 1)\n", 1, "a line of its own"),
        ("x = dict() | dict()\n", 1, "dict(left, **right)"),
        ("x = {1: 2}\n", 1, "expected text as the key"),
        ("x = b'a'\n", 1, "bytes is not for configs"),
        ("x = ...\n", 1, "ellipsis is not for configs"),
        ("x = 1j\n", 1, "complex is not for configs"),
        ("x = (-8) ** 0.5\n", 1, "complex number"),
        ("x = f'{[1]}'\n", 1, "not a list"),
        ("x = unknown\n", 1, "'unknown' is not known here"),
        ("x = dict(a=1)['b']\n", 1, "no key 'b': it has a"),
        ("x = 1 / 0\n", 1, "division by zero"),
        ("x = int(1, base=2)\n", 1, "takes no keywords"),
        ("x = 'a' + 1\n", 1, "TypeError"),
        ("x = 1\nx += 1\n", 2, "name = name + value"),
        ("for x in (1,):\n    pass\n", 1, "write the values out"),
        ("def f():\n    pass\n", 1, "write the values that it would return"),
        ("class A:\n    pass\n", 1, "write a dict"),
        ("print(1)\n", 1, "no effect"),
        ("x = 1\nx.y = 2\n", 2, "before the ="),
        ("a, b = 1, 2, 3\n", 1, "expected 2 values, got 3"),
        ("x = [1]\nx[0] = 2\n", 2, "only items of a dict"),
        ("__import__ = 1\n", 1, "choose another name"),
        ("with open('f'):\n    pass\n", 1, "with read_base()"),
        ("with read_base():\n    x = 1\n", 2, "only from ... import ... lines"),
        ("x = (\n", 1, "not Python syntax"),
        ("x = 10**10**10\n", 1, "2048 bits"),
        ("x = 1 << 10**9\n", 1, "2048 bits"),
        ("x = 'ab' * 10**6\n", 1, "limit is 100000"),
        ("x = 10**6 * [0]\n", 1, "limit is 20000"),
        ("x = f'{1:1000000}'\n", 1, "more than 100 characters"),
        ("x = round(1, -10**9)\n", 1, "limit is 100"),
        ("a = [0]\n" + "a = [a, a]\n" * 40, 14, "more than 20000 items"),
        ("x = " + "[" * 60 + "]" * 60 + "\n", 1, "nested more than 40 deep"),
    ],
)
def test_what_is_refused_is_named_with_line_and_remedy(
    tmp_path: Path, text: str, line: int, instead: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert f"main.py:{line}:" in str(error.value)
    assert instead in str(error.value)


def test_base_configs_are_found_by_relative_and_by_root_names(tmp_path: Path) -> None:
    below = tmp_path / "_base_" / "models"
    below.mkdir(parents=True)
    (below / "small.py").write_text("_HIDDEN = 1\nSIZE = 8\nmodel = dict(size=SIZE)\n")
    (tmp_path / "_base_" / "all.py").write_text(
        "with read_base():\n    from .models.small import *\nmodel['extra'] = SIZE\n"
    )
    names = read(
        tmp_path,
        f"with read_base():\n    from .{'_base_.all'} import *\n"
        f"    from {tmp_path.name}._base_.models.small import SIZE as WIDTH\n",
    )
    assert names == {"SIZE": 8, "model": {"size": 8, "extra": 8}, "WIDTH": 8}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from ..outside import *", "only from its own folder"),
        ("from .link import *", "only from its own folder"),
        ("from .absent import *", "there is no config"),
        ("from .main import *", "in a circle: main.py -> main.py"),
        ("from . import main", "name the config file"),
        ("from .small import b", "has no 'b': it has a"),
    ],
)
def test_an_import_stays_inside_and_ends(tmp_path: Path, line: str, message: str) -> None:
    root = tmp_path / "configs"
    root.mkdir()
    (tmp_path / "outside.py").write_text("secret = 1\n")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "small.py").write_text("a = 1\n")
    with pytest.raises(ConfigError, match=message):
        read(root, f"with read_base():\n    {line}\n")


def test_a_key_keeps_the_place_where_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text("\n\nmodel = dict(\n    a=1,\n    b=2,\n)\n")
    names = read(
        tmp_path, "with read_base():\n    from .base import *\nmodel.update(\n    b=3,\n)\n"
    )
    places = {key: str(place) for key, place in names["model"].places.items()}
    assert places == {"a": f"{tmp_path}/base.py:4", "b": f"{tmp_path}/main.py:4"}


def test_a_file_that_is_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a config file, got something else"):
        Reader(root=tmp_path).read(tmp_path)
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    with pytest.raises(ConfigError, match="got byte 0xe9 at offset 5"):
        Reader(root=tmp_path).read(tmp_path / "latin.py")
