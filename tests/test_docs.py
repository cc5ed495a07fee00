"""The documentation against the repository: links, options, and names that a reader will look for."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from kmax_d2 import add_kmax_config

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "datasets" / "README.md"]
CONFIG = ROOT / "kmax_d2" / "config.py"
CODE = re.compile(r"`([^`\n]+)`")


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


HOOKS = load_hooks()
OPTIONS = list(HOOKS.read_options(CONFIG.read_text(encoding="utf-8")))


def names(node, prefix=""):
    for name, value in node.items():
        yield from names(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [prefix + name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)):
        shared = page.parent == ROOT / "docs" and HOOKS.SHARED.get(link)
        target = ROOT / shared if shared else page.parent / link
        assert not link or target.exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_options_that_are_named_exist(page):
    cfg = get_cfg()
    add_kmax_config(cfg)
    known = set(names(cfg))
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        option = re.match(r"(?:MODEL|INPUT|SOLVER|DATASETS|DATALOADER)\.[A-Z_.]+(?= |$)", code)
        if option and page.name != "CHANGELOG.md":
            assert option[0] in known, code
        if re.fullmatch(r"(kmax_d2|tests|configs|datasets|docs|demo)/[\w/.-]+", code):
            assert (ROOT / code).exists(), code


def test_every_option_has_a_comment():
    assert [option.name for option in OPTIONS if not option.comment] == []


def test_the_configuration_page_has_every_option_with_its_default():
    ours, detectron2 = get_cfg(), get_cfg()
    add_kmax_config(ours)
    added = set(names(ours)) - set(names(detectron2))
    listed = {option.name: option.default for option in OPTIONS}
    assert len(listed) == len(OPTIONS)
    assert added <= set(listed) <= set(names(ours))
    for name, default in listed.items():
        value = ours
        for part in name.split("."):
            value = value[part]
        assert ast.literal_eval(default) == value, name
        assert f"| `{name.rpartition('.')[2]}` | `{default}` |" in HOOKS.tables()
    assert HOOKS.MARKER in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_a_comment_may_stand_at_the_end_or_above():
    source = """
def add(cfg):
    part = cfg.PART = CfgNode()  # read by nobody
    part.FIRST = 1  # at the end
    # above, in
    # two lines
    part.SECOND = "x"
    part.THIRD = []
"""
    found = [tuple(option) for option in HOOKS.read_options(source)]
    expected = [("FIRST", "1", "at the end"), ("SECOND", '"x"', "above, in two lines"), ("THIRD", "[]", "")]
    assert found == [(f"PART.{name}", default, comment) for name, default, comment in expected]
