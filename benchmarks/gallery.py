"""The gallery: every config's figure at full size, its question and its finding, made with one command.

    python benchmarks/gallery.py [even2023/stepsizes ...]

runs the configs named (all by default), each in a process of its own, keeps the picture of each first figure in
`docs/images/` and writes `docs/gallery.md` from what the configs say of themselves: the question is a header's first line,
the finding its paragraph that begins with `Finding:`. `--text` writes the page from the pictures that are there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from PIL import Image

from dlnlab import figures

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 1000
"""Pixels of a picture."""


def configs() -> list[str]:
    """The names of all configs, `quickstart` and `even2023/stepsizes`."""
    found = (path.relative_to(ROOT / "configs").with_suffix("") for path in (ROOT / "configs").rglob("*.yaml"))
    return sorted(str(name) for name in found)


def header(name: str) -> list[str]:
    """The paragraphs of a config's opening comment, each on one line."""
    lines = []
    for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines():
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


def first_figure(name: str) -> str:
    """The name of a config's first figure, which its files bear."""
    chosen = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["figures"][0]
    arguments = chosen.get("init_args", {})
    return getattr(figures, chosen["class_path"])(**arguments).name


def draw(name: str) -> float:
    """Run a config at full size and keep its first figure; the seconds it took.

    Raises:
        RuntimeError: If the run fails.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "dlnlab", "fit", "--config", str(ROOT / "configs" / f"{name}.yaml"),
                   "--trainer.default_root_dir", root]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")
        run = Path(root) / done.stdout.splitlines()[-1].removeprefix("run: ")
        shrink(run / "figures" / f"{first_figure(name)}.png", picture_of(name))
    return time.perf_counter() - began


def shrink(source: Path, target: Path) -> None:
    """A picture of `WIDTH` pixels in few colours."""
    target.parent.mkdir(exist_ok=True)
    picture = Image.open(source).convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)


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
    parser.add_argument("--text", action="store_true", help="write the page only")
    arguments = parser.parse_args()
    if not arguments.text:
        for name in arguments.configs or [name for name in configs() if name != "quickstart"]:
            print(f"{name}: {draw(name):.0f} s", flush=True)
    (ROOT / "docs" / "gallery.md").write_text(page())


if __name__ == "__main__":
    main()
