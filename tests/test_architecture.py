"""The tree is what its documents say: imports point one way, importing does nothing, pages name what exists."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import DetectOptions, TrainOptions, ValOptions, parse_flags
from utils.structures import UserError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")])
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES if path.stem != "__init__"]
SCRIPTS = ("train", "val", "detect")


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_point_one_way():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    run_python(code)


def test_every_module_has_its_layer():
    layers = re.search(r"layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    listed = set(re.findall(r"[\w.]+", layers))
    for module in MODULES:
        parts = module.split(".")
        assert any(".".join(parts[:depth]) in listed for depth in range(1, len(parts) + 1)), module


def test_training_does_without_optuna():
    code = "import sys, train, utils.train.build; print('optuna' in sys.modules, 'sqlalchemy' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_a_script(path):
    assert not imported(path) & set(SCRIPTS)


def test_options_and_help_do_without_torch():
    code = (
        "import sys, utils.config, utils.hyp, train, val, detect; print('torch' in sys.modules, 'cv2' in sys.modules)"
    )
    assert run_python(code).split() == ["False", "False"]


def test_importing_changes_nothing():
    """Neither global state nor the modules that only some runs need."""
    code = f"""
import json, logging, os, random, sys, threading, warnings
import cv2, numpy, torch, torch.utils.data, tqdm, yaml

def world():
    return {{
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "filters": len(warnings.filters),
        "handlers": len(logging.getLogger().handlers),
        "threads": [torch.get_num_threads(), threading.active_count(), cv2.getNumThreads()],
        "dtype": str(torch.get_default_dtype()),
        "random": [str(torch.get_rng_state().tolist()), str(numpy.random.get_state()), str(random.getstate())],
        "printing": [str(numpy.get_printoptions()), str(torch._tensor_str.PRINT_OPTS)],
        "algorithms": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        "path": sys.path,
    }}

before = json.dumps(world())
for module in {[*MODULES, *SCRIPTS]!r}:
    __import__(module)
heavy = [name for name in ("torchvision", "matplotlib", "tensorboard", "pycocotools") if name in sys.modules]
print(json.dumps([json.dumps(world()) == before, heavy]))
"""
    unchanged, heavy = json.loads(run_python(code))
    assert unchanged
    assert heavy == []


def test_architecture_page_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [path for path in SOURCES if path.name != "__init__.py"]
    assert [str(path) for path in files if path.name not in page] == []


def test_architecture_page_names_no_other_file():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    named = set(re.findall(r"\w+\.py", tree))
    assert named <= {path.name for path in [*SOURCES, *ROOT.glob("*.py")]}


def test_readme_names_flags_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    foreign = {"--help", "--logdir", "--nproc_per_node"}  # argparse's own, TensorBoard's, torch's launcher's
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme)) - foreign
    assert len(flags) > 10
    kinds = (TrainOptions, ValOptions, DetectOptions)
    assert [flag for flag in flags if not any(is_flag(kind, flag) for kind in kinds)] == []


def is_flag(kind, flag: str) -> bool:
    try:
        parse_flags(kind, [flag], program="train.py")
    except UserError as error:
        return "unknown" not in str(error)  # a known one may lack its value
    return True


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_with_what_it_owns(path):
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_tests_mirror_the_tree():
    homes = {path.relative_to(ROOT).parent.as_posix().removeprefix("utils").strip("/") for path in SOURCES}
    for test in ROOT.glob("tests/*/test_*.py"):
        assert test.parent.name in homes


def test_pictures_of_the_pages_exist():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)|\]\((docs/[^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / "".join(target)).is_file(), target


def test_a_run_is_built_without_what_its_first_step_can_do_without(draw_tiny, tmp_path):
    """TensorBoard, matplotlib and torch.compile would each take as long to import as steps of training take."""
    tiny = draw_tiny(tmp_path / "set")
    options = tiny.options(project=str(tmp_path), noplots=None)
    code = f"""
import sys
import train
from utils.train.build import build_trainer
trainer = build_trainer({options!r})
trainer.step(next(trainer.stream.epoch(0)), trainer.schedule(0))
assert trainer.step.average.updates == 1
trainer.checkpoint()
print([name for name in ("torchvision", "matplotlib", "tensorboard", "torch._dynamo") if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "[]"
