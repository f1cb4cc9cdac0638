"""MkDocs hooks: add files outside docs/ to the site, and adapt links to and from them.

README.md is the first page. It links to pages as docs/NAME.md, and pages link to it as ../README.md, so that links work
in a clone. On the site, all pages are in one folder. Links to files that are not on the site become plain text.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {path: path for path in (f"examples/{file.name}" for file in sorted((ROOT / "examples").glob("*.py")))}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    folder = ROOT if uri in PAGES.values() else Path(config.docs_dir, uri).parent

    def link(match):
        image, text, target, anchor = match.groups(default="")
        path = (folder / target).resolve()
        if not path.exists():
            return match[0]  # the strict build rejects it
        inside = path.relative_to(ROOT).as_posix()
        if inside in PAGES:
            target = PAGES[inside]
        elif path.is_relative_to(config.docs_dir):
            target = path.relative_to(config.docs_dir).as_posix()
        else:
            return text
        up = "../" * uri.count("/")
        return f"{image}[{text}]({up}{target}{anchor})"

    return LINK.sub(link, markdown)
