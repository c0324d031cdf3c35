"""The licences of what is installed, as each distribution tells its own.

    python -m shoestring.tests.supply.licences     writes docs/licences.md

Under Python 3.11 or later; then under 3.10, for what is wanted there only: rows of what is not installed stay as they are.
"""

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .lock import ROOT, constraints, here, wanted

PAGE = ROOT / "docs" / "licences.md"
# Ways to say the same.
NAMES = [
    (r"Apache\b.*", "Apache-2.0"),
    (r"MIT License", "MIT"),
    (r"(3-Clause BSD|BSD 3-Clause) License|BSD-3-Clause", "BSD-3-Clause"),
    (r"BSD License|BSD", "BSD"),  # which of them, it does not say
    (r"Mozilla Public License 2\.0.*", "MPL-2.0"),
    (r"ISC License.*", "ISC"),
    (r"Python Software Foundation License", "PSF-2.0"),
]
# They would bind whoever passes on a program that imports it, or serves it. LGPL does not, as long as it stays a library of its own; nor do
# GCC's run-time libraries, which have an exception for that.
_BINDING = re.compile(
    r"(?<!L)GPL(?!.*WITH.GCC-exception)|General Public|SSPL|Server Side|BUSL|Business Source|Commons Clause|Elastic|Proprietary",
    re.IGNORECASE,
)
HEAD = """# Licences

What Shoestring's dependencies say of their own licences: all of requirements.lock, and torch. "Training" is what `pip install shoestring`
brings, directly or not; "extras" are for tests, the dashboard, TensorBoard, W&B's workspaces and pictures. "Ships" is what a wheel brings
along whose licence has GPL in its name, where the wheel lists it.

None is under the GPL, AGPL, SSPL or another that binds a program which imports it, unless another may be chosen;
`tests/supply/test_licences.py` checks that, and that every distribution is here. LGPL: libquadmath, beside GCC's libgfortran in
NumPy's wheels, a shared library that NumPy loads and nothing of ours does. A torch built for CUDA also brings NVIDIA's libraries
(`nvidia-*`), which are proprietary, under NVIDIA's own terms; a torch for CPUs does not.

Made by `python -m shoestring.tests.supply.licences`.

| distribution | for | licence | ships |
| --- | --- | --- | --- |
"""


def licence(of: Distribution) -> str:
    """An SPDX expression where it has one, and its own words where it has not; empty where it says nothing."""
    if expression := of.metadata.get("License-Expression"):
        return expression
    said = of.metadata.get("License") or ""
    if said and len(said) < 150 and "\n" not in said and said != "Dual License":
        return _name(said)
    classifiers = [c.rpartition(" :: ")[2] for c in of.metadata.get_all("Classifier", []) if c.startswith("License ::")]
    return ", ".join(_name(c) for c in classifiers)


def refused(said: str) -> bool:
    """Whether it is of a kind that we do not take, and leaves no choice of another."""
    choices = [said] if "(" in said else said.split(" OR ")
    return all(_BINDING.search(choice) for choice in choices)


def _name(said: str) -> str:
    return next((name for pattern, name in NAMES if re.fullmatch(pattern, said) and not re.search(" (OR|AND|WITH) ", said)), said)


def ships(of: Distribution) -> list[str]:
    """Of the kind of the GPL, as NumPy's wheels list it: `License: ...` for each thing they bring."""
    files = [Path(of.locate_file(f)) for f in of.files or [] if ".dist-info" in str(f) and "LICENSE" in f.name.upper()]
    found = {m for f in files for m in re.findall(r"^License: (.*GPL.*)$", f.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)}
    return sorted(found)


def installed() -> dict[str, Distribution]:
    """Of what is pinned for this Python, by name."""
    found = {}
    for name in here():
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
    return found


def training(known: dict[str, Distribution]) -> set[str]:
    """Names of what `pip install shoestring` brings without an extra."""
    left, seen = [(r.name, e) for r in wanted() for e in ["", *r.extras]], set()
    while left:
        name, extra = canonicalize_name(left[-1][0]), left.pop()[1]
        if (name, extra) not in seen and name in known:
            seen.add((name, extra))
            wants = [Requirement(r) for r in known[name].requires or []]
            left += [(r.name, e) for r in wants if r.marker is None or r.marker.evaluate({"extra": extra}) for e in ["", *r.extras]]
    return {name for name, _ in seen}


def rows() -> dict[str, str]:
    known = installed()
    used = training(known)
    return {
        name: f"| {name} | {'training' if name in used else 'extras'} | {licence(d)} | {', '.join(ships(d))} |"
        for name, d in known.items()
    }


def read() -> dict[str, str]:
    """The rows of the page, by name."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    return {line.split(" ")[1]: line for line in lines if re.match(r"\| (?!distribution|---)", line)}


if __name__ == "__main__":
    pinned = {canonicalize_name(r.name) for r in constraints()}
    both = rows() | {name: row for name, row in read().items() if name in pinned - set(rows())}
    PAGE.write_text(HEAD + "".join(f"{both[name]}\n" for name in sorted(both)), encoding="utf-8")
