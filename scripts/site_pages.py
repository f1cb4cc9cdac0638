"""MkDocs hooks: pages of the site that are files of the repository's root, and links between both.

README.md is the first page. It links to pages as docs/NAME.md, and pages link to it as ../README.md, so that links work
in a clone; on the site all of them are beside each other. Links to other files of the repository become plain text,
because the site does not have them.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    folder = ROOT if uri in PAGES.values() else (Path(config.docs_dir) / uri).parent

    def link(match):
        image, text, target, anchor = match.groups(default="")
        path = (folder / target).resolve()
        if not path.exists():
            return match[0]  # which the strict build refuses
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
