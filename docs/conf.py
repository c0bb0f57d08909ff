"""The site: `python -m sphinx -W docs site` makes it of the README, CONTRIBUTING and the pages in docs (extra `docs`)."""

import re

project = "fastrms"
copyright = "The fastrms developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
include_patterns = ["*.md", "docs/*.md", "tests/ptx/README.md"]
root_doc = "docs/index"
html_theme = "furo"
html_title = "fastrms"
html_extra_path = ["index.html"]
highlight_language = "text"  # of what names no language
myst_heading_anchors = 4
numpydoc_show_class_members = False  # autodoc lists them
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "initial, needs_positive_state, refuse_moved",
}


def navigate(app, docname, source):
    """The navigation is the list of links in index.md, which stays plain Markdown."""
    if docname == root_doc:
        for title, part in re.findall(r"^## (.*)\n((?:(?!## ).*\n)+)", source[0], re.M):
            pages = re.findall(r"^[*] \[(.*)\]\(([\w./-]+)\.md\)", part, re.M)
            entries = "\n".join(f"{text} <{page}>" for text, page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{entries}\n```\n"


def leave_out(app, what, name, value, left_out, options):
    """The fields of a named tuple, which its docstring describes."""
    return (value.__doc__ or "").startswith("Alias for field number") or None


def setup(app):
    """The source is the whole repository: links between the pages are the same in a clone and on the site."""
    app.srcdir = app.confdir.parent
    app.connect("source-read", navigate)
    app.connect("autodoc-skip-member", leave_out)
