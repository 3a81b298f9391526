"""Print the oldest versions that pyproject.toml allows, as constraints for pip. Needs Python 3.11 for tomllib.

python .ci/lower_bounds.py > oldest.txt && pip install -c oldest.txt ".[test]"
"""

import re
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
    bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
    if bound is None:
        raise SystemExit(f"{requirement!r} names no lower bound; write it as name>=version")
    print("==".join(bound.groups()))
