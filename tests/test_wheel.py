"""What is released: a wheel with every module, built without network."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ilm_compile

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "kernels", "examples")  # by links in ilm_compile/


@pytest.fixture(scope="module")
def files() -> list[str]:
    """The files of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy, for building leaves files behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in files:
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            path.symlink_to((ROOT / name).readlink())
        else:
            path.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True
    )
    return zipfile.ZipFile(copy / "out" / done.stdout.splitlines()[-1])


def test_every_module_is_in_the_wheel_as_a_file(wheel: zipfile.ZipFile, files: list[str]) -> None:
    expected = {
        f"ilm_compile/{name}" if name.startswith(LINKED) else name
        for name in files
        if name.endswith(".py") and name.split("/")[0] in ("ilm_compile", *LINKED)
    }
    names = {name for name in wheel.namelist() if name.endswith(".py")}
    assert names == expected
    assert wheel.read("ilm_compile/passes/lower.py") == (ROOT / "passes/lower.py").read_bytes()


def test_the_configs_of_the_examples_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    configs = {path.name for path in (ROOT / "examples" / "configs").glob("*.toml")}
    folder = "ilm_compile/examples/configs/"
    assert {n.removeprefix(folder) for n in wheel.namelist() if n.startswith(folder)} == configs


def test_the_wheel_has_the_command_and_the_version_of_the_package(wheel: zipfile.ZipFile) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == ilm_compile.__version__
    about = f"ilm_compile-{version}.dist-info"
    assert f"\nVersion: {version}\n" in wheel.read(f"{about}/METADATA").decode()
    assert "ilm-compile = ilm_compile.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()
