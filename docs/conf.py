"""Sphinx's settings."""

import doctest
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

project = "gradalign"
author = "the gradalign authors"
project_copyright = author
version = release = installed_version("gradalign")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path = [folder for folder in ["_static"] if (Path(__file__).parent / folder).is_dir()]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88  # longer ones get a line for each argument
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else an attribute with a docstring and a line under Attributes is there twice

# The pages' {doctest} blocks run here, under pytest's flags; the docstrings' examples are pytest's to run.
doctest_test_doctest_blocks = ""
doctest_global_setup = "import torch"
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

nitpicky = True
_STANDARD_LIBRARY = "|".join(sorted(sys.stdlib_module_names))
nitpick_ignore_regex = [
    # Documented elsewhere: a build must not need the network to look names up.
    (r"py:.*", r"(accelerate|lightning|numpy|torch|transformers)(\..*)?"),
    (r"py:.*", rf"({_STANDARD_LIBRARY})\..+"),
    # A type variable has no page.
    (r"py:class", r"gradalign\.multiexit\.policies\.speed\.PolicyT"),
    # A private base class, which a class's line of bases names.
    (r"py:class", r"gradalign\.(\w+\.)*_[A-Za-z]\w*"),
]
