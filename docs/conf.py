"""The documentation: the repository's own Markdown files and notebooks where they lie, and an API reference from the docstrings.

``make docs`` runs ``sphinx-build -W -c docs . build/site``: any broken link, missing page or misread docstring is an error.
"""

import composer_effalgos

project = 'composer_effalgos'
author = 'composer_effalgos contributors'
copyright = f'2026, {author}'
version = release = composer_effalgos.__version__

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.intersphinx', 'sphinx.ext.viewcode']
root_doc = 'docs/index'
include_patterns = [
    'README.md',
    'CHANGELOG.md',
    'CONTRIBUTING.md',
    'docs/*.md',
    'composer_effalgos/*/*.md',
    'yamls/README.md',
    'benchmarks/README.md',
    'benchmarks/results/*.md',
    'notebooks/*.ipynb',
]
exclude_patterns = ['.*', 'build', 'dist', 'data', 'runs', 'tests']  # not even looked into
html_theme = 'furo'
html_title = f'composer_effalgos {version}'
html_extra_path = ['static']  # the site's own index.html, which leads to docs/index.html
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3
nb_execution_mode = 'off'  # notebooks are stored with their outputs, see notebooks/execute.py
suppress_warnings = ['myst.header']  # method cards begin sections at the level that they like

autodoc_typehints = 'signature'
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # the build needs no network
