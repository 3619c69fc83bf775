"""The documentation site: `sphinx-build -W -b html -c docs . out/site` in the root of the repository."""

import qncd

project = "QNCD"
author = "QNCD contributors"
copyright = f"2026, {author}"
version = release = qncd.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**"]

html_theme = "furo"
html_title = "QNCD"
html_extra_path = ["site"]  # index.html, which leads to docs/index.html

myst_heading_anchors = 4  # links to headings as code hosts resolve them
nb_execution_mode = "off"  # the notebooks hold what they show; tests/test_tutorials.py runs them

autodoc_member_order = "bysource"
default_role = "code"  # `name` in docstrings
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
