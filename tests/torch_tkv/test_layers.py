"""The layers: imports point down only, and importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each layer may import of the project; torch_tkv itself, the top, may import everything.
ALLOWED = {
    "torch_tkv.kernels": {"torch_tkv.kernels"},
    "torch_tkv.reference": {"torch_tkv.reference"},
    "torch_tkv.ops": {"torch_tkv.ops", "torch_tkv.reference", "torch_tkv.kernels"},
    "torch_tkv.passes": {"torch_tkv.passes", "torch_tkv.ops"},
}
# Third-party modules that only the named layers may touch.
RESERVED = {
    "triton": {"torch_tkv.kernels"},
    "torch._inductor": {"torch_tkv.passes"},
    "torch.fx": {"torch_tkv.passes"},
    "torch.library": {"torch_tkv.ops"},
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "passes"):
        parts.insert(0, "torch_tkv")
    return ".".join(parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> set[str]:
    """Return every dotted name that an import statement of the module mentions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))  # torch.library.Library needs no import of its own
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


SOURCES = sorted(
    path for folder in ("torch_tkv", "kernels", "passes") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_only_its_own_layer_and_those_below(path: Path) -> None:
    module = module_name(path)
    layer = next((name for name in ALLOWED if within(module, name)), None)
    names = imported(ast.parse(path.read_text()))
    for package, layers in RESERVED.items():
        if layer not in layers:
            assert not [name for name in names if within(name, package)], f"{package} in {module}"
    if layer is not None:
        siblings = {name for name in names if within(name, "torch_tkv")} - {"torch_tkv"}
        allowed = ALLOWED[layer]
        assert not [name for name in siblings if not any(within(name, a) for a in allowed)]


def test_importing_the_package_loads_no_triton_and_no_inductor() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import torch_tkv; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] == 'triton' or m.startswith('torch._inductor')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_top_level_kernels_or_passes_is_installed(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, torch_tkv.kernels, torch_tkv.passes; "
        "print(u.find_spec('kernels'), u.find_spec('passes'))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout.strip() == "None None"
