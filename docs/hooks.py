"""MkDocs hooks: the table of options from config.py, and pages and pictures that live elsewhere in the repository."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the tests read the options without MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MARKER = "<!-- options -->"
# Files of the site that are kept once, outside docs/: path on the site, path in the repository.
SHARED = {
    "datasets.md": "datasets/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "images/quickstart.png": "demo/quickstart.png",
    "images/street.png": "demo/street.png",
}


class Option(NamedTuple):
    """One option of the config: its full name, its default as Python source, and its comment ("" if there is none)."""

    name: str
    default: str
    comment: str


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the shared files to the site."""
    from mkdocs.structure.files import File

    for path, source in SHARED.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces the marker on the configuration page with the tables of options."""
    return markdown.replace(MARKER, tables()) if MARKER in markdown else markdown


def tables() -> str:
    """Returns a Markdown table of the options for each section of the config."""
    sections: dict[str, list[str]] = {}
    for option in read_options((ROOT / "kmax_d2" / "config.py").read_text(encoding="utf-8")):
        section, _, last = option.name.rpartition(".")
        row = f"| `{last}` | `{option.default}` | {option.comment.replace('|', '&#124;')} |"
        sections.setdefault(section, []).append(row)
    head = "| option | default | meaning |\n|---|---|---|"
    return "\n\n".join("\n".join([f"## {section}", "", head, *rows]) for section, rows in sections.items())


def read_options(source: str) -> Iterator[Option]:
    """Reads the options from the source of config.py, in its order.

    An option's comment stands at the end of its line, or on lines of its own right above it.
    """
    comments = {
        token.start[0]: (token.string.removeprefix("#").strip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    prefixes = {"cfg": ""}  # what each variable of the function stands for
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        *_, target = node.targets
        if ast.unparse(node.value) == "CfgNode()":
            for variable in node.targets:
                if isinstance(variable, ast.Name):
                    prefixes[variable.id] = _full_name(target, prefixes)
            continue
        if node.end_lineno in comments:
            comment = comments[node.end_lineno][0]
        else:
            comment, above = "", node.lineno - 1
            while comments.get(above, ("", False))[1]:
                comment, above = f"{comments[above][0]} {comment}".strip(), above - 1
        default = ast.unparse(node.value).replace("'", '"')
        yield Option(_full_name(target, prefixes), default, comment)


def _full_name(target: ast.expr, prefixes: dict[str, str]) -> str:
    variable, _, rest = ast.unparse(target).partition(".")
    return ".".join(part for part in (prefixes[variable], rest) if part)
