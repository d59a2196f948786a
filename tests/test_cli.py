import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dlnlab
from dlnlab import data, figures, models
from dlnlab.cli import main

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gallery  # noqa: E402
import golden  # noqa: E402

KINDS = {*figures.__all__, *models.__all__, *data.__all__}
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def names_a_new_kind(configs):
    """Those that name a figure, a network or a data set which none before them names."""
    seen, found = set(), []
    for config in configs:
        text = re.sub(r"(?m)^#.*", "", (ROOT / config).read_text())
        kinds = {name for name in re.findall(r"class_path: ([\w.]+)", text) if name in KINDS or "." in name}
        if not kinds <= seen:
            found.append(config)
        seen |= kinds
    return found


def often(configs):
    """All configs, those that are not among some marked as slow."""
    return [config if config in configs else pytest.param(config, marks=pytest.mark.slow) for config in CONFIGS]


SMALL = ["--trainer.max_steps", "30", "--ensemble.seed", "2"]


def run_directory(printed):
    """What a fit in this folder has said last."""
    last = printed.splitlines()[-1]
    assert last.startswith("run: lightning_logs/")
    return Path(last.removeprefix("run: "))


def run_small(config, tmp_path, monkeypatch, capsys):
    """A config's run with few steps, seeds and values of each axis: its directory, and those of its variants."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)  # its examples: plain modules that some configs train
    assert main(golden.reduced(config.removeprefix("configs/").removesuffix(".yaml"))) == 0
    run = tmp_path / capsys.readouterr().out.splitlines()[-1].removeprefix("run: ")
    return [run, *(run / "variants" / name for name in yaml.safe_load((ROOT / config).read_text()).get("variants", {}))]


@pytest.mark.parametrize("config", often(["configs/quickstart.yaml", *names_a_new_kind(CONFIGS)]))
def test_every_config_runs_and_draws_its_figures(config, tmp_path, monkeypatch, capsys):
    folders = run_small(config, tmp_path, monkeypatch, capsys)
    assert folders[0] == tmp_path / "lightning_logs" / Path(config).stem / "version_0"
    for folder in folders:
        assert {path.name for path in folder.iterdir()} >= {"config.yaml", "versions.json", "results", "checkpoints"}
        assert (folder / "checkpoints" / "last.ckpt").exists()
        assert 0 < int(dlnlab.load_results(folder).step[-1]) <= 30
    assert {path.suffix for path in (folders[0] / "figures").iterdir()} == {".png", ".pdf", ".csv"}


# A single run, and variants.
@pytest.mark.parametrize("config", often(["configs/quickstart.yaml", "configs/pesme2021/sgd_vs_gf.yaml"]))
def test_every_config_can_be_run_again_from_its_own_record(config, tmp_path, monkeypatch, capsys):
    run, *variants = run_small(config, tmp_path, monkeypatch, capsys)
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    again = tmp_path / capsys.readouterr().out.splitlines()[-1].removeprefix("run: ")
    for folder in (run, *variants):
        assert dlnlab.load_results(folder).equals(dlnlab.load_results(again / folder.relative_to(run)))


def printed(capsys, *arguments):
    """What `--print_config` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main([*map(str, arguments), "--print_config"])
    return capsys.readouterr().out


@pytest.mark.parametrize("config", often(["configs/quickstart.yaml", "configs/pesme2021/sgd_vs_gf.yaml"]))
def test_what_print_config_prints_comes_to_itself(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    Path("printed.yaml").write_text(printed(capsys, "fit", "--config", ROOT / config))
    assert printed(capsys, "fit", "--config", "printed.yaml") == Path("printed.yaml").read_text()


def test_print_config_prints_what_the_run_records_and_that_runs_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mini.yaml").write_text(
        "ensemble: {batch_size: [1, full], init_scale: [0.1, 0.2], seed: 2}\nmodel: {class_path: DiagonalLinearNetwork}\n"
        "data: {class_path: SparseRegression, init_args: {dim: 5, sparsity: 2}}\ntrainer: {max_steps: 20}\n"
        "variants: {decayed: {after: main, ensemble: {weight_decay: [0, 0.01], seed: 4}}, more: {seed: 1}}\n"
    )
    Path("other.yaml").write_text("ensemble: {batch_size: [2, full], lr: [0.1, 0.2], seed: 2}\nseed: 3\n")
    layers = [
        "--config",
        "mini.yaml",
        "--config",
        "other.yaml",
        "--ensemble.lr",
        "[0.1, 0.3]",
        "--model.init_scale",
        "0.3",
    ]
    source = None
    for arguments in (layers, [*layers, "--init_from", "FIRST"]):
        arguments = [str(source) if word == "FIRST" else word for word in arguments]
        said = printed(capsys, "fit", *arguments)
        assert main(["fit", *arguments]) == 0
        run = run_directory(capsys.readouterr().out)
        assert (run / "config.yaml").read_text() == said
        Path("printed.yaml").write_text(said)
        assert main(["fit", "--config", "printed.yaml"]) == 0
        again = run_directory(capsys.readouterr().out)
        for folder in (".", "variants/decayed", "variants/more"):
            assert dlnlab.load_results(run / folder).equals(dlnlab.load_results(again / folder))
        source = source or run
    for command in ("validate", "test", "predict"):
        Path("printed.yaml").write_text(printed(capsys, command, *layers))
        assert printed(capsys, command, "--config", "printed.yaml") == Path("printed.yaml").read_text()
        assert main([command, "--config", "printed.yaml", "--ckpt_path", str(source / "checkpoints/last.ckpt")]) == 0
    assert main(["fit", *layers, "--print_config=skip_default"]) == 2


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_opens_with_its_question_and_its_source(config):
    question, *paragraphs = gallery.header(config.removeprefix("configs/").removesuffix(".yaml"))
    assert re.search(r"\?|\.", question)
    assert any("ook at" in paragraph for paragraph in paragraphs)


def test_the_gallery_is_what_the_configs_say_with_a_picture_of_each():
    assert (ROOT / "docs" / "gallery.md").read_text() == gallery.page()
    for name in gallery.configs():
        if name != "quickstart":
            assert 1000 < gallery.picture_of(name).stat().st_size < 200_000, name


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [line.split("&&")[-1].strip() for block in blocks for line in block.splitlines()]
    ours = [shlex.split(line)[3:] for line in commands if line.startswith("python -m dlnlab")]
    assert len(ours) == 3
    for arguments in ours:
        if "--print_config" in arguments:
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
        else:
            assert main([*arguments, *SMALL]) == 0
        assert capsys.readouterr().err == ""


def test_later_configs_replace_the_ensemble_and_values_on_the_command_line_win_wherever_they_stand(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("ensemble: {lr: [0.1, 0.2]}\ntrainer: {max_steps: 50}\n")
    first, second = ["--config", str(ROOT / "configs" / "quickstart.yaml")], ["--config", "other.yaml"]
    for arguments in ([*first, *second, "--trainer.max_steps", "7"], ["--trainer.max_steps", "7", *first, *second]):
        assert main(["fit", *arguments, "--name", "layers"]) == 0
        results = dlnlab.load_results(max(Path("lightning_logs/layers").iterdir()))
        assert dict(results.distance.sizes) == {"lr": 2, "step": 8}
    assert main(["fit", "--ensemble.seed", "3", *first, *second, "--trainer.max_steps", "2", "--name", "axis"]) == 0
    assert dict(dlnlab.load_results("lightning_logs/axis/version_0").distance.sizes) == {"lr": 2, "seed": 3, "step": 3}


def test_a_fit_that_takes_the_generic_path_says_so_once_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("slow_net.py").write_text(
        "from dlnlab.models import DiagonalLinearNetwork\n\n\nclass Slow(DiagonalLinearNetwork):\n"
        "    def losses(self, batch):\n        return 2 * super().losses(batch)\n"
    )
    small = ["--data", "SparseRegression", "--trainer.max_steps", "4", "--name", "slow"]
    assert main(["fit", "--model", "slow_net.Slow", *small]) == 0
    assert capsys.readouterr().err == "dlnlab fit: generic (autograd): Slow has its own losses\n"
    assert dlnlab.load_results("lightning_logs/slow/version_0").attrs["path"] == (
        "generic (autograd): Slow has its own losses"
    )


def test_help_is_at_hand_without_torch():
    code = "import sys; from dlnlab.cli import main; assert main(['--help']) == 0; assert 'torch' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert "fit" in finished.stdout


def test_an_unknown_command_lists_the_known_ones_in_a_process_of_its_own(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dlnlab", "train"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert "fit" in finished.stderr


def test_validate_and_test_give_the_losses_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, small = str(ROOT / "configs" / "quickstart.yaml"), [*SMALL, "--ensemble.lr", "[0.05, 0.1]"]
    assert main(["fit", "--config", config, *small]) == 0
    run = run_directory(capsys.readouterr().out)
    losses = dlnlab.load_results(run).isel(step=-1)
    for command, variable in (("validate", losses.train_loss), ("test", losses.test_loss)):
        checkpoint = str(run / "checkpoints" / "last.ckpt")
        assert main([command, "--config", config, *small, "--ckpt_path", checkpoint]) == 0
        largest = float(re.search(r"loss/\w+/max\W+([\d.]+(?:e[+-]\d+)?)", capsys.readouterr().out)[1])
        assert largest == pytest.approx(float(variable.max()), rel=1e-5)  # what the table prints


def test_a_plain_lightning_module_of_ones_own_is_run_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_line.py").write_text(
        """
import torch
from lightning.pytorch import LightningModule

class Line(LightningModule):
    def __init__(self, lr: float = 0.01):
        super().__init__()
        self.lr, self.layer = lr, torch.nn.Linear(4, 1, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = ((self.layer(x)[:, 0] - y) ** 2).mean()
        self.log("mine", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)
"""
    )
    data = ["--data", "SparseRegression", "--data.dim", "4", "--data.sparsity", "2"]
    arguments = ["fit", "--model", "my_line.Line", *data, "--trainer.max_steps", "40", "--record.every_n_steps", "10"]
    assert main(arguments) == 0
    results = dlnlab.load_results(run_directory(capsys.readouterr().out))
    assert dict(results.sizes) == {"step": 4}
    assert results.step.values.tolist() == [0, 10, 20, 30]
    assert bool((results.train_loss.diff("step") < 0).all())
    assert main(arguments) == 0
    again = dlnlab.load_results(run_directory(capsys.readouterr().out))
    assert results.equals(again)  # the root seed also seeds torch's own initialisation
