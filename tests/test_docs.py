"""The documentation against what is there: links, paths, names, what docstrings say of errors, and the strict build."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT

import lejepa_scale

PACKAGE = ROOT / "lejepa_scale"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SOURCES = sorted(path for room in ("lejepa_scale", "tools", "launchers") for path in (ROOT / room).rglob("*.py"))
SOURCES += sorted(PACKAGE.rglob("*.cpp"))
MODULES = sorted(PACKAGE.rglob("*.py"))
# a name to be chosen, one that must not be, and files of the repositories that recipes come from
_NOT_HERE = {"NAME.py", "utils.py", "vitg14.yaml", "MINIMAL.md"}


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def _links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _links(page):
        address = urlsplit(link)
        if address.scheme:
            continue
        target = page.parent / unquote(address.path) if address.path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if address.fragment:
            assert address.fragment in _anchors(target), (
                f"{page.name} links to {link}; {target.name} has no such heading"
            )


def named_paths(text: str, suffixes: str = "py|cpp|md|yaml") -> Iterator[str]:
    """Files that a text names, and folders of the repository: `data/order.py`, `lejepa_scale/cost`, `tests/x.py::test_y`."""
    text = re.sub(r"\w+://\S+", "", text)
    yield from re.findall(rf"(?<![\w./{{-])[\w./-]+\.(?:{suffixes})\b(?:::\w+)?", text)
    yield from re.findall(r"(?<![\w./{-])(?:lejepa_scale|tests)/[\w/]+(?![\w./])", text)


def of_today(text: str) -> str:
    """Without the first column of tables of what was and what is."""
    lines, past = [], False
    for line in text.splitlines():
        past = line.startswith("|") and (past or re.match(r"\| (was|before)\b", line) is not None)
        lines.append(line.split("|", 2)[2] if past else line)
    return "\n".join(lines)


def missing(name: str, *folders: Path) -> str | None:
    """What of a named file is not there, in any of the folders."""
    file, _, test = name.partition("::")
    found = [path for folder in folders if (path := folder / file).exists()]
    if not found:
        return file
    return test if test and f"def {test}(" not in found[0].read_text() else None


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "configs").glob("*.yaml"))], ids=_id)
def test_pages_name_files_that_exist(page: Path) -> None:
    for name in named_paths(of_today(page.read_text())):
        if Path(name.partition("::")[0]).name in _NOT_HERE or (
            name.endswith(".yaml") and "/" not in name
        ):  # of a run directory
            continue
        absent = missing(name, ROOT, PACKAGE, ROOT / "tools", ROOT / "tests", page.parent)
        assert absent is None, f"{page.name} names {name}, and {absent} is not there"


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_sources_name_files_that_exist(path: Path) -> None:
    above = [folder for folder in path.parents if folder.is_relative_to(ROOT)]
    for name in named_paths(path.read_text(), "py|cpp|md"):
        assert missing(name, *above, PACKAGE) is None, f"{path.name} names {name}, which is not there"


def test_a_path_that_is_not_there_is_found() -> None:
    table = "train.py\n| was | is |\n|---|---|\n| a.py | b.py |\n\nc.py\n| is | was |\n| d.py |"
    assert list(named_paths(of_today(table))) == ["train.py", "b.py", "c.py", "d.py"]
    text = "see `data/decode.py`, lejepa_scale/planning and `tests/test_docs.py::test_nothing`; not https://x.org/a.py"
    absent = [missing(name, ROOT, PACKAGE) for name in named_paths(text)]
    assert absent == ["data/decode.py", "test_nothing", "lejepa_scale/planning"]


def test_new_names_of_the_changelog_can_be_imported() -> None:
    table = (ROOT / "CHANGELOG.md").read_text().partition("### Renamed in Python")[2].partition("\n## ")[0]
    names = [
        name for row in table.splitlines() for name in re.findall(r"`(lejepa_scale\.[\w.]+)`", row.rpartition(" | ")[2])
    ]
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def _public(node: ast.Module | ast.ClassDef, about: str = "") -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Public functions and methods, with what their own and their class's docstring say."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from (
                (f"{child.name}.{name}", f, text) for name, f, text in _public(child, ast.get_docstring(child) or "")
            )
        elif isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name == "__init__"):
            yield child.name, child, about + (ast.get_docstring(child) or "")


def silent(tree: ast.Module) -> list[str]:
    """Public functions that raise what their docstrings do not say."""
    found = []
    for name, function, text in _public(tree):
        raised = {
            ast.unparse(n.exc).partition("(")[0] for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc
        }
        if (
            raised & {"UserError", "ValueError", "RuntimeError", "DecodeError", "SampleFault", "OSError"}
            and "aise" not in text
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_public_docstrings_say_what_they_raise(path: Path) -> None:
    assert silent(ast.parse(path.read_text())) == []


def test_a_silent_docstring_is_found() -> None:
    code = 'class A:\n    """Raises nothing here."""\n    def f(self):\n        raise ValueError\n'
    code += 'def g():\n    """Goes."""\n    raise UserError("no")\ndef _h():\n    raise ValueError\n'
    assert silent(ast.parse(code)) == ["g"]


@pytest.mark.parametrize("path", MODULES, ids=_id)
def test_modules_say_what_they_hold(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_page_of_python_names_has_all_public_ones() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for name in set(getattr(lejepa_scale, "__all__", ())) - {"__version__"}:
        assert re.search(rf"\.{name}$", page, re.MULTILINE), f"docs/api.md lacks {name}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", lejepa_scale.__version__)
    assert {"message", "title", "authors"} <= citation.keys()  # what the format requires


@pytest.fixture(scope="module")
def conf() -> Iterator[ModuleType]:
    path = sys.path[:]
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def test_docstrings_reach_the_site_as_they_read(conf: ModuleType) -> None:
    text = "Mean of |z_vn|^2 of `z`\nover *all*.\n\n    a   b_\n\n"
    text += 'scale: "n",\nor 1.\ncounts: of ranks.\n- one\n  and more\n- two'
    assert list(conf.as_restructured_text(text.split("\n"))) == [
        *("Mean of \\|z\\_vn\\|^2 of ``z`` over \\*all\\*.", ""),
        *("::", "", "        a   b_", ""),
        *('scale: "n", or 1.', "", "counts: of ranks.", "", "- one and more", "", "- two", ""),
    ]


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [link for key in ("href", "src") if (link := given.get(key))]
        self.anchors |= {given.get("id") or "", given.get("name") or ""}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-d", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr
    pages = {path: _Page(path) for path in (tmp_path / "site").glob("*.html")}
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} <= {path.name for path in pages}
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or link.startswith("#"):
                continue
            target = path.parent / unquote(address.path)
            assert target.exists(), f"{path.name}: {link}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in pages[target].anchors, f"{path.name}: {link}"
    names = (tmp_path / "site" / "api.html").read_text()
    assert 'id="lejepa_scale.objective.SIGReg"' in names
    assert "T_U = N sum_k w_k [ (C_k - phi_k)^2 + S_k^2 - (1 - C_k^2 - S_k^2) / (N - 1) ]" in names  # not mangled


def test_commit_hooks_need_no_network() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    for hook in repositories[0]["hooks"]:
        program = Path(hook["entry"].split()[0])
        assert (hook["language"], str(program.parent)) == ("system", ".venv/bin")
        assert (Path(sys.executable).parent / program.name).exists(), program
