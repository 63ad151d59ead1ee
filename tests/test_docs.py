"""What the README and the pages show runs as it stands; the wheel is complete."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcft_dist
from dcft_dist import DcftError, FundamentalSet, errors

from .browser import problems
from .ranks import run_ranks
from .test_architecture import MAY_IMPORT

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
    network = Reader()
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    names: dict[str, Any] = {
        "model": make_bert(), "other": make_bert(), "dataset": samples(), "module": Module(),
        "loader": torch.utils.data.DataLoader(data, batch_size=8), "network": network,
        "volumes": [{"image": torch.randn(4, 6), "label": torch.randint(0, 3, (4,))} for _ in range(3)],
        "optimizer": torch.optim.AdamW(network.parameters()), "loss_function": nn.CrossEntropyLoss(),
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as a site. Warnings, such as a broken link or a page outside the navigation, are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    problems = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert done.returncode == 0, "\n".join(problems)
    return folder


def test_the_site_has_the_public_names(site: Path) -> None:
    page = (site / "api/index.html").read_text()
    assert [name for name in dcft_dist.__all__ if f'id="dcft_dist.{name}"' not in page] == []
    for name in ("method", "engines", "controls", "integrations", "weights", "distributed"):
        modules = sorted((ROOT / "dcft_dist" / name).glob("[a-z]*.py"))
        page = (site / f"api/{name}.html").read_text()
        shown = [f for f in modules if f'id="dcft_dist.{name}.{f.stem}"' in page]
        assert len(shown) >= len(modules) - 4, name  # all but a few helpers


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"?(https?://[^\" >]+)", page.read_text())
        assert loaded == [], page.relative_to(site)


def test_pages_can_be_read_on_a_phone_and_in_dark_mode(site: Path) -> None:
    assert problems([site / "index.html", site / "which_method.html", site / "cli.html"], "article") == []


def test_the_site_has_what_lies_outside_its_folder(site: Path) -> None:
    """Links from pages to configurations, the README and CONTRIBUTING lead somewhere."""
    models = (site / "models.html").read_text()
    assert 'href="source/configs/swin_unetr.toml"' in models
    assert (site / "source/configs/swin_unetr.toml").read_text() == (ROOT / "configs/swin_unetr.toml").read_text()
    assert 'href="contributing.html"' in (site / "index.html").read_text()
    assert 'href="architecture.html"' in (site / "contributing.html").read_text()


def test_the_table_of_rooms_is_current() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\w, -]+) \|$", text, re.MULTILINE)
    shown = {room: set(re.findall(r"\w+", may)) for room, may in rows}
    assert shown == {room: set(may.split()) for room, may in MAY_IMPORT.items()}
    tree = re.search(r"```\ndcft_dist/\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree is not None
    assert set(re.findall(r"^ {8}(\w+)", tree.group(1), re.MULTILINE)) == MAY_IMPORT.keys()


def test_the_page_of_errors_is_complete_and_current() -> None:
    """Every class of error has a place, and every quoted message exists in the code. `...` stands for what varies."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, DcftError)]
    assert [name for name in classes if name not in page] == []
    code = "\n".join(text for file in (ROOT / "dcft_dist").rglob("*.py") for text in string_constants(file))
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    tables += re.findall(r"^\| class \| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    quoted = [m for table in tables for row in table.splitlines() if (m := re.search(r"`([^`]+)`", row))]
    assert len(quoted) > 60
    pieces = [p.strip(" :;,()") for m in quoted for p in m.group(1).split("...")]
    assert [p for p in pieces if p and p not in code] == []


def test_every_row_of_reliability_is_a_test() -> None:
    """A row names a test that exists, and there are many."""
    page = (ROOT / "docs/reliability.md").read_text()
    tables = re.findall(r"^\| fault \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    names = [re.findall(r"`(test_\w+)(?:\[[^\]]*\])?`", row.rsplit("|", 2)[1]) for row in rows]
    assert len(rows) >= 60 and all(names), [row for row, found in zip(rows, names, strict=True) if not found]
    code = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for found in names for name in found if f"def {name}(" not in code] == []


def string_constants(file: Path) -> Iterator[str]:
    """Each text of a program, with `...` for what is filled in."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_verdict_of_the_readme_is_that_of_the_evidence() -> None:
    evidence = "".join(page.read_text() for page in ROOT.glob("docs/results/evidence*.md")).replace("+", "")
    rows = re.findall(r"\| ([+-][\d.]+) (\[[^\]]+\]) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for difference, interval in rows:
        number = difference.lstrip("+")
        claim = rf"(?<![\d.-]){re.escape(number)}(?: points)? {re.escape(interval)}"
        assert re.search(claim, evidence), (difference, interval)


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {dcft_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_links_and_commands_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        text = page.read_text()
        assert not re.search(r"^(RESULTS|TODO)", text, re.MULTILINE), page.name
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
        for path in re.findall(r"(?:\./|python )((?:launch|tests|benchmarks)/[\w./]+)", text):
            assert (ROOT / path).exists(), (page.name, path)


def test_the_constraints_fit_the_torch_for_gpus(tmp_path: Path) -> None:
    """Its requirements are stricter than those of the build for processors, which the tests use: pip resolves both.

    The user's settings of pip are left aside, since they may name that build.
    """
    resolve = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--use-feature=fast-deps"]
    done = subprocess.run(
        [*resolve, "-q", "-c", str(ROOT / "constraints.txt"), "torch"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "ResolutionImpossible" not in done.stderr, done.stdout + done.stderr
    if done.returncode:
        pytest.skip(f"no index of packages: {done.stderr.strip().splitlines()[-1]}")


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
