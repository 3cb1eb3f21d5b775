"""Hooks of MkDocs: pages that are generated when the site is built, so that they cannot drift from the code.

``settings.md`` comes from the settings tree, ``commands.md`` from ``--help``, ``api.md`` from the public names of the package.
``clusters.md``, ``benchmarks.md``, ``contributing.md`` and ``changelog.md`` are the repository's own files.
"""

import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import raydetr
from raydetr import config as settings
from raydetr.cli import cli

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/raydetr/raydetr/blob/main"
COPIED = {
    "clusters.md": "cluster/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"settings.md": settings_page(), "commands.md": commands_page(), "api.md": api_page()}
    pages |= {page: with_links(source) for page, source in COPIED.items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def with_links(source: str) -> str:
    """Return a Markdown file of the repository with its relative links made to work in the site."""
    pages = {path: page for page, path in COPIED.items()}

    def link(found: re.Match) -> str:
        path, _, anchor = found[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        url = pages.get(target) or f"{REPOSITORY}/{target}"
        return f"]({url}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", link, (ROOT / source).read_text(encoding="utf-8"))


def settings_page() -> str:
    """Return every setting as a table for each section, and what the presets change."""
    lines = [
        "# Settings",
        "",
        "A setting has one name everywhere. `optim.lr` is the flag `--optim.lr 5e-5`, the key of a settings file (`--config run.yaml`),",
        "a dimension of a search space, and `config.optim.lr` in Python. Later values win: defaults, preset, file, flags.",
        "This page is generated from the code.",
    ]
    for section, of_section in sections():
        lines += ["", f"## {section}", "", "| setting | meaning |", "|---|---|"]
        for each in of_section:
            default = ", ".join(map(str, each.default)) if each.is_list else each.default
            kind = f"list of {each.type.__name__}" if each.is_list else each.type.__name__
            values = ", ".join(filter(None, [kind, each.bounds()]))
            meaning = f"{each.meaning[0].upper()}{each.meaning[1:]}.<br>Default {_cell(default)}; {values}."
            lines.append(f"| `{each.name}` | {meaning} |".replace("..", "."))
    lines += ["", "## Presets", "", "`--preset NAME` changes these defaults. `detr_resnet50` has the defaults above.", ""]
    lines += ["| preset | changes |", "|---|---|"]
    for preset, changes in settings.PRESETS.items():
        text = ", ".join(f"`{name}` {_cell(value)}" for name, value in changes.items())
        lines.append(f"| `{preset}` | {text or 'none'} |")
    return "\n".join(lines) + "\n"


def sections() -> Iterator[tuple[str, list[settings.Setting]]]:
    """Yield the sections of the tree with their settings, in the order of the code."""
    names = dict.fromkeys(name.split(".")[0] for name in settings.SETTINGS)
    for section in names:
        yield section, [each for name, each in settings.SETTINGS.items() if name.split(".")[0] == section]


def _cell(value: object) -> str:
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def commands_page() -> str:
    """Return the help of every command."""
    lines = [
        "# Commands",
        "",
        "This page is generated from `--help`. Every command also takes `--debug`: it shows the stack trace of an error.",
    ]
    for name, command in commands(cli, "raydetr"):
        with click.Context(command, info_name=name, terminal_width=88, max_content_width=88) as context:
            text = context.get_help()
        lines += ["", f"## {name}", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield each command below a group with its full name, the group first."""
    yield name, group
    for each, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {each}")
        else:
            yield f"{name} {each}", command


def api_page() -> str:
    """Return the public Python API, each name by its docstring."""
    lines = [
        "# Python API",
        "",
        textwrap.dedent(
            """
            `import raydetr` is quick: each name loads torch and Ray when it is first used. Nothing else is public; other modules may
            change in any version.
            """
        ).strip(),
    ]
    for name, module in {**raydetr._HOME, "UserError": "raydetr.errors"}.items():
        public = f"raydetr.{name}"
        lines += ["", f"::: {module}.{name}", "    options:", f"      heading: {public}", f"      toc_label: {public}"]
    return "\n".join(lines) + "\n"
