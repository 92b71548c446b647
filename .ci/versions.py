"""Print constraints of pip for the oldest versions that pyproject.toml allows ("floors"), or the newest ("latest").

Torch stays at the tested version: others are on the package index with CUDA only.
"""

import pathlib
import re
import sys
import tomllib

root = pathlib.Path(__file__).parent.parent
project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
asked = {*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)}
constraints = re.findall(r"^torch==.*$", (root / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
if sys.argv[1] == "floors":
    constraints += [name.replace(">=", "==") for name in sorted(asked) if re.match(r"(?!torch>=)[\w.-]+>=", name)]
print(*constraints, sep="\n")
