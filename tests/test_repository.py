"""The repository's own promises: links, floors, file sizes, pins, and what the makefile offers."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400

# file to plant, what it imports, the two rooms that the report must name
VIOLATIONS = [
    ("ilm_compile/runtime/planted.py", "ilm_compile.passes", ("runtime", "passes")),
    ("ilm_compile/runtime/planted.py", "ilm_compile.models", ("runtime", "models")),
    ("ilm_compile/program/planted.py", "ilm_compile.sharding", ("program", "sharding")),
    ("passes/planted.py", "ilm_compile.proof", ("passes", "proof")),
    ("ilm_compile/rewrite/planted.py", "ilm_compile.passes", ("rewrite", "passes")),
    ("kernels/planted.py", "ilm_compile.program", ("kernels", "program")),
    ("kernels/planted.py", "ilm_compile.models", ("kernels", "models")),
    ("ilm_compile/models/planted.py", "ilm_compile.program", ("models", "program")),
]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    # wide: the report wraps at COLUMNS
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS: the flags of the make that runs the tests are not ours
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    return subprocess.run(
        ["make", *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", ["passes", "kernels", "examples"])
def test_top_level_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / "ilm_compile" / name
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (ROOT / name).is_dir()


def test_no_python_file_is_too_long() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listing.stdout.splitlines()]
    assert files
    lengths = {file: len(file.read_text().splitlines()) for file in files if file.exists()}
    assert not {str(file): n for file, n in lengths.items() if n > MAX_LINES}


def test_no_room_imports_from_above() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_planted_imports_from_above_are_found(tmp_path: Path) -> None:
    for name in ("ilm_compile", "passes", "kernels"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, module, _ in VIOLATIONS:
        with open(tmp_path / file, "a") as planted:
            planted.write(f"import {module}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    for _, _, (importer, imported) in VIOLATIONS:
        line = rf"ilm_compile\.{importer}\.planted -> ilm_compile\.{imported}\b"
        assert re.search(line, result.stdout), f"{line} not in:\n{result.stdout}"


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert pyproject()["project"]["license"] == "Apache-2.0"


def read_pins(name: str) -> dict[str, str]:
    """Of a file of constraints, what is pinned for this Python."""
    lines = (ROOT / name).read_text().splitlines()
    given = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        canonicalize_name(each.name): next(iter(each.specifier)).version
        for each in given
        if each.marker is None or each.marker.evaluate()
    }


def test_pins_lie_inside_the_declared_ranges() -> None:
    pins = read_pins("constraints.txt")
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["hf"]]:
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{text} does not allow the pin {pin}"


def test_the_oldest_releases_are_where_the_declared_ranges_begin() -> None:
    """What `make test-oldest` installs, numpy apart: torch brings a newer one than is allowed."""
    oldest = read_pins("constraints-oldest.txt")
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["hf"], *extras["triton"]]:
        requirement = Requirement(text)
        if requirement.name in oldest and requirement.name != "numpy":
            beginning = next(
                each.version for each in requirement.specifier if each.operator == ">="
            )
            assert Version(oldest[requirement.name]).release[:2] == Version(beginning).release[:2]


def test_dependencies_are_ranges_and_constraints_are_pins() -> None:
    assert not [text for text in pyproject()["project"]["dependencies"] if "==" in text]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in pins)


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()


def test_the_documentation_is_built_strictly_and_not_by_make_test() -> None:
    """A machine without the packages of [docs] can still run every test."""
    plans = [make(ROOT, "--dry-run", "--always-make", name).stdout for name in ("docs", "test")]
    assert ["mkdocs build --strict" in plan for plan in plans] == [True, False]


@pytest.mark.parametrize("target", ["demo", "docs", "test", "test-oldest", "lint"])
def test_make_target_installs_first(target: str) -> None:
    plan = make(ROOT, "--dry-run", "--always-make", target)
    assert re.search(r"pip install --constraint \S*constraints.txt", plan.stdout)


def test_make_runs_the_tests_that_are_named() -> None:
    plan = make(ROOT, "--dry-run", "--always-make", "test-oldest", "TESTS=tests/program").stdout
    assert re.search(r"pytest -n 2 [^|]*?\btests/program$", plan, flags=re.MULTILINE)


def test_the_oldest_releases_stand_instead_of_the_usual_ones(tmp_path: Path) -> None:
    plan = make(ROOT, "--dry-run", "--always-make", "test-oldest").stdout
    (rule,) = re.findall(r"^awk .*?constraints.txt > ", plan, flags=re.DOTALL | re.MULTILINE)
    merged = tmp_path / "constraints.txt"
    subprocess.run(f"{rule} {merged}", shell=True, check=True, cwd=ROOT)
    pins = merged.read_text().splitlines()
    names = [line.partition("==")[0] for line in pins if line.startswith("torch==")]
    assert names == ["torch"]
    assert set((ROOT / "constraints-oldest.txt").read_text().splitlines()) <= set(pins)
    assert "networkx" in merged.read_text()


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.20"\nexit 1\n')
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    result = make(tmp_path, "test", f"PYTHON={old}")
    assert result.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in result.stderr
    assert "Python 3.8.20" in result.stderr
    assert "make test PYTHON=" in result.stderr
