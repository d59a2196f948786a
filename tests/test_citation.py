import re
from configparser import ConfigParser
from pathlib import Path

import yaml

import dlnlab

ROOT = Path(__file__).parent.parent
SHORT_NAME = r"\b[a-z]+20[12]\d\b"


def test_the_citation_says_what_the_package_says():
    package = ConfigParser()
    package.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dlnlab.__version__
    assert citation["license"] == package["metadata"]["license"]
    assert citation["title"] == package["metadata"]["name"]
    assert citation["abstract"] == package["metadata"]["description"]


def test_every_paper_that_is_cited_by_a_short_name_is_among_the_references():
    files = [path for suffix in ("py", "yaml", "md") for room in ("dlnlab", "configs", "docs", "examples")
             for path in (ROOT / room).rglob(f"*.{suffix}")]  # fmt: skip
    cited = {name for path in files for name in re.findall(SHORT_NAME, path.read_text())}
    entries = re.findall(r"^@\w+\{(\w+),$", (ROOT / "docs" / "references.bib").read_text(), re.MULTILINE)
    assert "even2023" in cited
    assert cited <= set(entries)
    assert len(entries) == len(set(entries))
