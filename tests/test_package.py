"""What is installed, and with what: the wheel, the metadata, the pinned versions, the scripts."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("fluxfire-*.whl"))) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile) -> list[tuple[str, str]]:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode(), headersonly=True).items()


def test_wheel_contains_the_model_and_not_the_training_scripts(wheel: zipfile.ZipFile):
    names = wheel.namelist()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert any(re.fullmatch(rf"fluxfire/demo/model/{part}/.+\.safetensors", name) for name in names), part
    assert "fluxfire/demo/model/model_index.json" in names
    assert "fluxfire/demo/prompts.json" in names
    assert "fluxfire/py.typed" in names
    page = ROOT / "src/fluxfire/serve/page"
    assert {f"fluxfire/serve/page/{file.name}" for file in page.iterdir()} <= set(names)
    assert any(name.startswith("fluxfire/demo/") and name.endswith(".png") for name in names)
    assert not [name for name in names if not name.startswith(("fluxfire/", "fluxfire-"))]
    assert not [name for name in names if "training" in name or name.endswith((".npy", ".bin", ".pt", ".pkl"))]
    assert sum(info.compress_size for info in wheel.infolist()) < 26 * 2**20


def test_wheel_carries_the_licences(wheel: zipfile.ZipFile):
    assert ("License-Expression", "Apache-2.0") in metadata(wheel)
    for file in ("LICENSE", "NOTICE"):
        name = next(name for name in wheel.namelist() if name.endswith(f".dist-info/licenses/{file}"))
        assert wheel.read(name) == (ROOT / file).read_bytes()


def test_wheel_asks_for_no_direct_url_and_for_para_attn_only_in_its_extra(wheel: zipfile.ZipFile):
    required = [value for key, value in metadata(wheel) if key == "Requires-Dist"]
    assert not [value for value in required if "@" in value]
    plain = {re.match(r"[\w-]+", value)[0] for value in required if "extra ==" not in value}
    assert plain == {"torch", "diffusers", "transformers", "typing-extensions"}
    assert [value for value in required if value.startswith("para-attn")] == ["para-attn>=0.3.32; extra == 'para-attn'"]


def test_wheel_alone_is_a_working_package(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    code = (
        "import fluxfire, fluxfire.cli; from fluxfire.demo import model_path; "
        "print(fluxfire.__file__); print(model_path() / 'model_index.json'); assert model_path().is_dir()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.decode().split())


def test_version_is_said_once_and_the_same(wheel: zipfile.ZipFile):
    import fluxfire

    assert fluxfire.__version__ == PROJECT["version"] == dict(metadata(wheel))["Version"]


def test_every_requirement_is_pinned_to_an_exact_version():
    lines = [line for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9.a-z]*)", line)  # no local version, URL or path
        assert pin, line
        pins[re.sub("[-_.]+", "-", pin[1]).lower()] = pin[2]
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["cli"] + extras["demo"] + extras["dev"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted} - {"fluxfire"}
    assert names <= set(pins)


def test_source_has_no_pickle_no_torch_load_and_no_eval():
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=names):
                    assert "pickle" not in {name.name for name in names}, file
                case ast.ImportFrom(module=module):
                    assert module != "pickle", file
                case ast.Call(func=ast.Name(id=name)):
                    assert name not in ("eval", "exec"), file
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    pytest.fail(f"torch.load in {file}")


def test_no_source_file_is_over_300_lines():
    examples = re.compile(r'^\n    Examples:\n(?:        .*\n)+(?:    """\n)?', re.M)  # of docstrings, which are tests
    lengths = {file: len(examples.sub("", file.read_text()).splitlines()) for file in (ROOT / "src").rglob("*.py")}
    assert {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines > 300} == {}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def prepare(checkout: Path, extra: str = "demo", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs what each script runs first; PYTHON=false stands for a machine without a new enough Python."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source scripts/_venv {extra}; pwd"],
        cwd=checkout,
        env=os.environ | {"PYTHON": "false"} | env,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_scripts_name_the_python_they_need(checkout: Path):
    done = prepare(checkout)
    assert done.returncode != 0
    assert "fluxfire needs Python 3.11 or newer" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("installed", ["demo", "dev"])
def test_scripts_install_nothing_twice(checkout: Path, installed: str):
    stamp = subprocess.run(
        "cat pyproject.toml scripts/constraints.txt | cksum", shell=True, cwd=checkout, capture_output=True, check=True
    )
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / f".fluxfire-{installed}").write_bytes(stamp.stdout)
    done = prepare(checkout)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(checkout), "")
    # A changed pin is another installation, which here ends at the missing Python.
    with (checkout / "scripts/constraints.txt").open("a") as constraints:
        constraints.write("six==1.16.0\n")
    assert prepare(checkout).returncode != 0
