"""The gallery: every config's figure at full size, its question and its finding, made with one command.

    python benchmarks/gallery.py [even2023/stepsizes ...] [--runs DIR]

runs the configs named (all by default), keeps the picture of each first figure in `docs/images/` and writes
`docs/gallery.md` from what the configs say of themselves: the question is a header's first line, the finding its paragraph
that begins with `Finding:`. With `--runs` the runs are kept in DIR, and those that are there are drawn without training
again; `--text` writes the page from the pictures that are there.
"""

import argparse
import io
import time
from pathlib import Path

import xarray as xr
import yaml
from PIL import Image

import dlnlab
from dlnlab import figures

ROOT = Path(__file__).resolve().parents[1]
DPI = 150
"""Pixels an inch: a column of a paper is 510 wide, a page 1050."""


def configs() -> list[str]:
    """The names of all configs, `quickstart` and `even2023/stepsizes`."""
    found = (path.relative_to(ROOT / "configs").with_suffix("") for path in (ROOT / "configs").rglob("*.yaml"))
    return sorted(str(name) for name in found)


def header(name: str) -> list[str]:
    """The paragraphs of a config's opening comment, each on one line."""
    lines = []
    for line in config_of(name).read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return [" ".join(part.split()) for part in "\n".join(lines).split("\n\n")]


def question_and_finding(name: str) -> tuple[str, str]:
    """What a config asks, and what was found.

    Raises:
        ValueError: If its header has no paragraph that begins with `Finding:`.
    """
    paragraphs = header(name)
    found = [paragraph[8:].strip() for paragraph in paragraphs if paragraph.startswith("Finding:")]
    if not found:
        raise ValueError(f"configs/{name}.yaml: its header has no paragraph that begins with `Finding:`")
    return paragraphs[0], found[0]


def picture_of(name: str) -> Path:
    """Where a config's picture lies."""
    return ROOT / "docs" / "images" / f"{name}.png"


def config_of(name: str) -> Path:
    """Where a config lies."""
    return ROOT / "configs" / f"{name}.yaml"


def results_of(name: str, runs: Path | None = None) -> dict[str, xr.Dataset]:
    """What a config records at full size, by `main` and its variants.

    Args:
        name: The config's name.
        runs: A folder in which runs are kept; a run that has ended there is read instead of made. None keeps none.
    """
    if runs is None:
        return dlnlab.run_all(config_of(name))
    if not (found := sorted((runs / name).glob("lightning_logs/*/version_*"))):
        return dlnlab.run_all(config_of(name), directory=runs / name)
    variants = yaml.safe_load(config_of(name).read_text()).get("variants", {})
    folders = {"main": found[-1], **{variant: found[-1] / "variants" / variant for variant in variants}}
    return {run: dlnlab.load_results(folder) for run, folder in folders.items()}


def draw(name: str, runs: Path | None = None) -> int:
    """Draw a config's first figure at full size and keep it; the bytes it takes."""
    chosen = yaml.safe_load(config_of(name).read_text())["figures"][0]
    results = results_of(name, runs)
    figure = getattr(figures, chosen["class_path"])(**chosen.get("init_args", {}))
    drawn = io.BytesIO()
    figure.draw(results.pop("main"), **results).savefig(drawn, format="png", dpi=DPI)
    shrink(drawn, picture_of(name))
    return picture_of(name).stat().st_size


def shrink(source: Path | io.BytesIO, target: Path) -> None:
    """Write a picture as a PNG of fewer bytes and of the same pixels.

    Args:
        source: The picture.
        target: Where to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(source)
    opaque = picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255)
    (picture.convert("RGB") if opaque else picture).save(target, optimize=True)


def page() -> str:
    """The gallery's text."""
    text = [
        "# Gallery",
        "",
        "Every config's figure at full size, what it asks and what was seen. `python benchmarks/gallery.py` makes all of "
        "it anew; each config's own header says more, and why its settings are what they are.",
        "",
    ]
    source = None
    for name in configs():
        if name == "quickstart":
            continue
        if name.rpartition("/")[0] != source:
            source = name.rpartition("/")[0]
            text += [f"## {source}", ""]
        question, finding = question_and_finding(name)
        width = 420
        text += [
            f"### {name}",
            "",
            f"*{question}*",
            "",
            finding,
            "",
            f"```bash\npython -m dlnlab fit --config configs/{name}.yaml\n```",
            "",
            f'<img src="images/{name}.png" width="{width}" alt="{name}">',
            "",
        ]
    return "\n".join(text)


def main() -> None:
    """Run what was asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="names, as even2023/stepsizes; all by default")
    parser.add_argument("--runs", type=Path, help="a folder for the runs; those that are there are not made again")
    parser.add_argument("--text", action="store_true", help="write the page only")
    arguments = parser.parse_args()
    if not arguments.text:
        for name in arguments.configs or [name for name in configs() if name != "quickstart"]:
            began = time.perf_counter()
            size = draw(name, arguments.runs)
            print(f"{name}: {size:,} bytes, {time.perf_counter() - began:.0f} s", flush=True)
    (ROOT / "docs" / "gallery.md").write_text(page())


if __name__ == "__main__":
    main()
