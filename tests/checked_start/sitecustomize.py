"""Python imports this at its start where it lies on the path: child processes of the tests then check shapes too."""

import shape_checks

if shape_checks.wanted():
    shape_checks.install()
