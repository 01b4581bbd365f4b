"""`ingot compile` imports transformers without its optional packages, and transformers is the same afterwards."""

import importlib.util
import json
import subprocess
import sys

STRUCTURE = (
    "import json, sys, transformers.models; m = sys.modules['transformers.models'];"
    "print(json.dumps([sorted(m._class_to_module.items()), sorted(m._modules), sorted(m.__all__)]))"
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_compile_imports_no_package_that_it_does_not_use():
    code = (
        "import sys\nfrom ingot.models.lean import UNUSED, lean\nwith lean(): import ingot.compiler.build\n"
        "from transformers import LlamaForCausalLM\nprint(*(set(UNUSED) & set(sys.modules)))"
    )
    assert run(code) == ""


def test_transformers_defines_the_same_models():
    assert json.loads(run("import ingot.models.lean as l; l._find_models_once()\n" + STRUCTURE)) == json.loads(run(STRUCTURE))


def test_what_was_hidden_is_found_afterwards():
    code = (
        "import sys\nfrom ingot.models.lean import lean\nwith lean():\n from transformers.utils import is_scipy_available\n print(is_scipy_available())\n"
        "print(is_scipy_available(), 'scipy' in sys.modules)\nimport scipy.linalg"
    )
    assert run(code).split() == ["False", str(importlib.util.find_spec("scipy") is not None), "False"]


def test_what_was_imported_before_is_not_hidden():
    assert run("import sys; sys.modules['scipy'] = sys\nfrom ingot.models.lean import lean\nwith lean(): print(sys.modules['scipy'] is sys)") == "True"
