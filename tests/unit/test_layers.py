"""The order of layers in DESIGN §3: who may import whom, read from the source itself."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hubfs"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: From the top; a module imports from its own layer and from those below it.
ORDER = (
    "cli",
    "api",
    "daemon",
    "mounts",
    "fs",
    "cache",
    "transfer",
    "hubs",
    "net",
    "wire",
    "sharing",
    "handles",
    "kaggle_handle",
    "places",
    "names",
    "config",
    "errors",
)
ANYWHERE = {"version", "heap"}
#: Beside the layers: `hubfs serve` shares nothing with the mount but the words.
SERVE_MAY_USE = {"errors", "version", "handles", "serve"}
SERVE_IS_USED_BY = {"cli", "serve"}
#: Imports for type checkers only that point upward, on purpose.
UPWARD_FOR_TYPES = {("cache/state.py", "hubfs.cache.store"), ("cache/arrival.py", "hubfs.cache.state")}
#: Facades: the public names, and `python -m hubfs`.
FACADES = {"__init__.py": {"api", "config", "errors", "version"}, "__main__.py": {"cli"}}
ONLY_IN = {
    "mfusepy": ("fs/libfuse.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "click": ("cli/",),
    "tensorflow": ("integrations/",),
    "tensorflow_hub": ("integrations/",),
    "obstore": ("hubs/object_store.py", "hubs/bucket.py", "cache/bucket.py"),
    "requests": ("net.py", "transfer/download.py", "hubs/", "cli/doctor.py"),
}


@dataclass(frozen=True)
class Import:
    """One imported module; `typing_only` if it stands below `if TYPE_CHECKING`."""

    file: str
    line: int
    module: str
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path) -> Iterator[Import]:
    name = path.relative_to(PACKAGE).as_posix()
    yield from _imports(ast.parse(path.read_text()), name, typing_only=False)


def _imports(node: ast.AST, name: str, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(name, child.lineno, alias.name, typing_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{name}:{child.lineno}: imports are absolute in hubfs"
            for alias in child.names:
                # `from hubfs import daemon` names a module too.
                module = f"{child.module}.{alias.name}" if child.module == "hubfs" else str(child.module)
                yield Import(name, child.lineno, module, typing_only)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _imports(ast.Module([part], []), name, typing_only=True)
            for part in child.orelse:
                yield from _imports(ast.Module([part], []), name, typing_only)
        else:
            yield from _imports(child, name, typing_only)


def layer_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def layer_of_module(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


ALL = [found for path in MODULES for found in imports_of(path)]
OWN = [found for found in ALL if found.module.split(".")[0] == "hubfs"]


def test_imports_inside_functions_and_type_checking_blocks_are_seen() -> None:
    assert any(i.file == "net.py" and i.module == "requests" and not i.typing_only for i in ALL)
    assert any(i.file == "cache/state.py" and i.module == "hubfs.cache.store" and i.typing_only for i in ALL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_has_a_layer(path: Path) -> None:
    layer = layer_of(path.relative_to(PACKAGE).as_posix())
    assert layer in {*ORDER, *ANYWHERE, "serve", "__init__", "__main__", "integrations"}


def test_imports_go_downward_only() -> None:
    wrong = []
    for found in OWN:
        layer, target = layer_of(found.file), layer_of_module(found.module)
        if found.file in FACADES:
            allowed = target in FACADES[found.file]
        elif target in ANYWHERE:
            allowed = True
        elif layer == "serve":
            allowed = target in SERVE_MAY_USE
        elif target == "serve":
            allowed = layer in SERVE_IS_USED_BY
        elif target == "__init__":
            # The public face: what a program sees, so the command line may use it as well.
            allowed = layer == "cli"
        else:
            allowed = target in ORDER and layer in ORDER and ORDER.index(layer) <= ORDER.index(target)
        if not allowed and not (found.typing_only and (found.file, found.module) in UPWARD_FOR_TYPES):
            wrong.append(str(found))
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for found in OWN:
        if not found.typing_only:
            graph.setdefault(f"hubfs/{found.file}".removesuffix(".py").replace("/", "."), set()).add(
                found.module
            )
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_package_is_imported_only_where_it_belongs(package: str) -> None:
    wrong = [
        str(found)
        for found in ALL
        if found.module.split(".")[0] == package
        and not found.typing_only
        and not found.file.startswith(ONLY_IN[package])
    ]
    assert wrong == []


def test_obstore_is_imported_whole() -> None:
    """A part that is imported by name while another thread imports all of it can give _DeadlockError."""
    wrong = [str(found) for found in ALL if found.module.startswith("obstore.") and not found.typing_only]
    assert wrong == []


def test_nothing_below_the_command_line_prints() -> None:
    wrong = []
    for path in MODULES:
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("cli/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            prints = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            )
            writes = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
            if prints or writes:
                wrong.append(f"{name}:{node.lineno}")
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("module", ["hubfs", "hubfs.daemon"])
def test_import_pulls_in_nothing_heavy(module: str) -> None:
    heavy = (
        "typer",
        "click",
        "rich",
        "requests",
        "urllib3",
        "tensorflow",
        "tensorflow_hub",
        "mfusepy",
        "obstore",
        "asyncio",
    )
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_the_mount_needs_no_command_line_and_no_tensorflow() -> None:
    code = (
        "import sys, hubfs.daemon, hubfs.cache.store, hubfs.fs.tree, hubfs.fs.control\n"
        "print(*[name for name in ('typer', 'click', 'rich', 'tensorflow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("load_format", "loaded"), [("compressed", []), ("auto", ["obstore"])])
def test_what_reads_buckets_is_loaded_before_the_first_request_if_it_may_be_needed(
    tmp_path: Path, load_format: str, loaded: list[str]
) -> None:
    code = (
        "import sys\n"
        "from hubfs.cache.store import Store\n"
        "from hubfs.config import Settings\n"
        f"store = Store(Settings.load({{'load_format': {load_format!r}, 'cache_dir': {str(tmp_path)!r}}}))\n"
        "assert 'obstore' not in sys.modules\n"
        "store.prepare()\n"
        "print(*[name for name in ('obstore',) if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == loaded


def test_first_request_may_come_while_that_is_loaded() -> None:
    """The thread that imports obstore is held in the middle of it until another one waits to import it."""
    code = """if True:
        import sys, threading, time
        from importlib.machinery import PathFinder
        from hubfs.config import Settings
        from hubfs.hubs.object_store import BucketPath, ObjectStores

        stores = ObjectStores(Settings.load({}))
        preparing = threading.Thread(target=stores.prepare)

        def waits():
            frame = sys._current_frames().get(preparing.ident)
            return frame and "importlib" in frame.f_code.co_filename and frame.f_code.co_name == "acquire"

        class Held:
            def find_spec(self, name, path, target=None):
                if name != "obstore._obstore":
                    return None
                found = PathFinder.find_spec(name, path)
                create = found.loader.create_module

                def create_held(spec):
                    preparing.start()
                    while preparing.is_alive() and not waits():
                        time.sleep(0)
                    return create(spec)

                found.loader.create_module = create_held
                return found

        sys.meta_path.insert(0, Held())
        stores.store("gs://bucket/dir", BucketPath.parse("gs://bucket/dir"))
        preparing.join()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
