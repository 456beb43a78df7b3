"""The pages of docs/: what they show runs, prints what they say, and names what exists."""

import os
import re
import subprocess
import sys
from inspect import isabstract
from pathlib import Path

import pytest

import ilm_compile
from ilm_compile.errors import IlmCompileError
from ilm_compile.internevo import job
from ilm_compile.passes import Pass
from ilm_compile.program.plan import Plan
from tests.internevo.test_page import write as write_internevo_config
from tests.support.pages import check_command, is_like, run_page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OTHERS = {"custom_passes", "internevo", "tutorial"}  # with tests of their own
PAGES = sorted(page.stem for page in DOCS.glob("*.md") if page.stem not in OTHERS)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's own, from which it imports the files that it writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name: str, folder: Path) -> None:
    run_page(page(name), folder)


def test_tutorial_runs(folder: Path) -> None:
    before, after = page("tutorial").split("## The weights, elsewhere")
    namespace = run_page(before, folder)
    plan = Plan.from_json(folder / "plan.json").replace(pp=1)  # two processes are enough here
    (folder / "plan.json").write_text(plan.to_json())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    first, last = map(float, re.findall(r"[\d.]+", result.stdout.splitlines()[-1]))
    assert last < first - 2
    run_page(after, folder, namespace)


def test_script_of_internevo_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_CONFIGS", [])
    config = str(write_internevo_config(folder, "rmsnorm"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", config, "--launcher", "torch"])
    text = page("internevo")
    assert "range(100)" in text
    namespace = run_page(text.replace("range(100)", "range(2)"), folder)
    assert namespace["success"]


def test_every_plan_option_is_explained() -> None:
    headings = {*re.findall(r"^## `(\w+)`", page("plan"), re.MULTILINE)}
    assert headings == {*Plan.__dataclass_fields__}


def test_every_pass_is_explained() -> None:
    shipped = {k.__name__ for k in vars(ilm_compile.passes).values() if _is_pass(k)}
    assert {*re.findall(r"^## `(\w+)`", page("passes"), re.MULTILINE)} == shipped


def _is_pass(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Pass) and not isabstract(kind)


def test_every_error_is_explained() -> None:
    kinds = [IlmCompileError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    raised = {k.__name__ for k in kinds if k.__module__.startswith("ilm_compile.")}
    assert {*re.findall(r"^## `(\w+)`", page("errors"), re.MULTILINE)} == raised


def test_quoted_messages_are_in_the_code() -> None:
    folders = (ROOT / "ilm_compile", ROOT / "passes", ROOT / "kernels")
    files = [file for each in folders for file in each.rglob("*.py")]
    strings = [re.sub(r"\"\s+f?\"", "", file.read_text()) for file in files]
    code = "\n".join(re.sub(r"\{[^{}]*\}", "...", text) for text in strings)
    quoted = re.findall(r"^\| `([^`]+)` \|", page("errors"), re.MULTILINE)
    assert len(quoted) > 30
    assert [text for text in quoted if text not in code] == []


def test_every_public_name_is_in_the_reference() -> None:
    listed = {*re.findall(r"^::: ilm_compile\..*?(\w+)$", page("api"), re.MULTILINE)}
    lines = (ROOT / "ilm_compile" / "__init__.py").read_text()
    public = {*re.findall(r" as (\w+)$", lines, re.MULTILINE)}
    assert public - {"models", "passes"} <= listed


def test_files_that_the_architecture_names_exist() -> None:
    named = re.findall(r"`((?:ilm_compile|passes|docs|tests)/[\w/.]+)`", page("architecture"))
    assert len(named) > 40
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    linked = {*re.findall(r"- (\w+)\.md", (ROOT / "mkdocs.yml").read_text())}
    assert linked == {file.stem for file in DOCS.glob("*.md")}


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("a  1\nb\n", "a 1\nb", True),
        ("a 1.5 s\nmore\nb", "a ... s\n...\nb", True),
        ("a 1", "a 2", False),
        ("a\nb", "a", False),
    ],
    ids=["blanks", "dots", "another", "more"],
)
def test_output_is_compared(printed: str, shown: str, same: bool) -> None:
    assert is_like(printed, shown) is same


@pytest.mark.parametrize(
    "line",
    [
        "$ ilm-compile verify m:f --no-such",
        "$ ilm-compile prove m:f",
        "$ torchrun --processes 2 train.py",
        "$ torchrun --nproc-per-node 2 missing.py",
        "$ make missing",
        "$ pip install 'ilm_compile[missing]'",
        "$ rm -r .",
        "output",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, folder: Path) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line, folder)
