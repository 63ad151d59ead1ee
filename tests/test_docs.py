"""What the README and the pages show runs as it stands; the wheel is complete."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcft_dist import FundamentalSet

from .ranks import run_ranks

ROOT = Path(__file__).parent.parent


class Reader(nn.Module):
    """A model such as the pages speak of: blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.classifier(x)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run_example(page: str, folder: str) -> tuple[int, int]:
    os.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL).group(1)  # type: ignore[union-attr]
    batches = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(4)]
    model = Reader()
    names: dict[str, Any] = {
        "model": model, "loss_fn": loss_fn, "batches": batches, "train_batches": batches, "score_batches": batches,
        "validation_batches": batches, "optimizer": torch.optim.AdamW(model.parameters()),
    }  # fmt: skip
    exec(code, names)
    return FundamentalSet.load("fundamental.safetensors").num_selected, names["penalty"].calls.total()


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_examples_run(page: str, tmp_path: Path) -> None:
    for selected, calls in run_ranks(2, run_example, page, str(tmp_path)):
        assert selected == round(0.1 * 72)
        assert calls == (8 if page == "docs/library.md" else 0)


def run_integrations(folder: str) -> list[str]:
    import pytorch_lightning as pl

    from .integrations.test_integrations import make_bert, samples

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier = nn.Linear(6, 8), nn.Linear(8, 3)

        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(self.classifier(torch.tanh(self.body(batch[0]))), batch[1])

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    os.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/integrations.md").read_text(), re.DOTALL)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    names: dict[str, Any] = {
        "model": make_bert(), "other": make_bert(), "dataset": samples(), "module": Module(),
        "loader": torch.utils.data.DataLoader(data, batch_size=8),
    }  # fmt: skip
    for block in blocks:
        exec(block, names)
    assert all(torch.equal(a, b) for a, b in zip(names["model"].parameters(), names["other"].parameters(), strict=True))
    return sorted(str(f) for f in Path().rglob("*.safetensors"))


def test_integrations_run(tmp_path: Path) -> None:
    found = run_ranks(1, run_integrations, str(tmp_path))[0]
    assert {"out/fundamental.safetensors", "fundamental.safetensors", "adapted/model.safetensors"} <= set(found)


# Program, environment -> what it prints.
PROGRAMS = [
    ("own_loop", {}, "Penalty(factor 0.1 on the update, "),
    ("accelerate_loop", {"ACCELERATE_USE_CPU": "1"}, "MULTI_CPU on 2 ranks"),
    (
        "accelerate_loop",
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "configs/accelerate/zero3.json"),
        },
        "DEEPSPEED on 2 ranks",
    ),
    ("mixed_precision_loop", {}, "last loss scale: 512\n"),  # half of the first: one step was skipped
]


@pytest.mark.parametrize(("program", "environment", "line"), PROGRAMS)
def test_the_whole_program_runs(program: str, environment: dict[str, str], line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.leave"]
    done = subprocess.run(
        [*command, str(ROOT / f"docs/examples/{program}.py")],
        capture_output=True, text=True, cwd=tmp_path, timeout=240,
        env=os.environ | environment | {"PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert line in done.stdout and "proposed step: 0.100" in done.stdout


def test_links_and_commands_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        text = page.read_text()
        assert not re.search(r"^(RESULTS|TODO)", text, re.MULTILINE), page.name
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
        for path in re.findall(r"(?:\./|python )((?:launch|tests|benchmarks)/[\w./]+)", text):
            assert (ROOT / path).exists(), (page.name, path)


def test_the_wheel_has_everything(tmp_path: Path) -> None:
    """Built from the project, unpacked elsewhere, imported from there: all configurations, the report's template."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import dcft_dist, dcft_dist.reports.render, pathlib
from dcft_dist.config.toml import find_config, load_config
from dcft_dist.studies.study import load_study
here = pathlib.Path(dcft_dist.__file__).parent
assert str(here).startswith(sys.argv[1]), here
names = [load_config(f.name).name for f in (here / "configs").glob("*.toml")]
for page in ("report.html", "study.html"):
    dcft_dist.reports.render.template(page)
assert load_study(find_config("studies/icd_630.toml")).arms
print(sorted(names))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "site")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    shipped = sorted(f.stem for f in (ROOT / "configs").glob("*.toml"))
    assert done.stdout.strip() == str(shipped)


def test_benchmarks_import_what_is_there() -> None:
    """They are not run by tests; this finds what was renamed since."""
    missing = []
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dcft_dist"):
                module = importlib.import_module(str(node.module))
                missing += [f"{file.name}: {node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
    assert missing == []
