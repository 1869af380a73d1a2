"""Sphinx configuration: MyST pages, API reference from docstrings, warnings are errors in CI.

Building needs an environment with lmopt[cpu] and the dependency group `docs`: the docstrings of PyTorch's
room are read by importing it.
"""

import re

import lmopt

project = "lmopt"
author = "The lmopt developers"
project_copyright = "The lmopt developers"
version = release = lmopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lmopt {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings write code in single backticks, as Markdown does.
default_role = "code"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _markdown(_app, _what, _name, _object, _options, lines):
    """Turn what docstrings have of Markdown (fenced code, `word`s) into reStructuredText."""
    fence, converted = None, []
    for line in lines:
        match = re.match(r"(\s*)```(\w*)$", line)
        if match and fence is None:
            fence = match[1]
            converted += [f"{fence}.. code-block:: {match[2] or 'text'}", ""]
        elif match:
            fence = None
            converted.append("")
        else:
            # All pairs of backticks are matched, so that none is taken for the start of the next.
            line = re.sub(r"(`+[^`]+`+)(?=(\w?))", _end, line) if fence is None else f"   {line}"
            converted.append(line.rstrip())
    lines[:] = converted


def _end(code):
    return f"{code[1]}\\ " if code[2] else code[1]


def setup(app):
    """Convert before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _markdown, priority=100)
