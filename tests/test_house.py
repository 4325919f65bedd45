"""The architecture, held: the rooms in order, imports upward only, a tidy top level."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "repnoise_kit"

# A room imports only from rooms before it. Adding one means adding it here and in the README.
ROOMS = (
    *("errors", "processes", "steps", "store", "files", "results"),
    *("stats", "survival", "headlines", "agreeing"),
    *("paper", "style", "overlap", "head", "losses", "knobs"),
    *("pairs", "splits", "tasks", "sources", "corpora"),
    *("model", "anatomy", "recording", "reading", "memory", "checkpoints"),
    *("trainer", "training", "lora"),
    *("scoring", "labelled", "neutral", "borrowed", "judges", "settings"),
    *("world.grammar", "world.corpus", "world.oracle", "world.tasks", "world.build", "testbeds"),
    *("evaluation", "harness", "refusals", "presets"),
    *("repnoise", "baselines", "security", "controls", "defences", "attacks", "saving"),
    *("bench", "grid", "resistance", "cost", "tuning"),
    *("everyday", "generalization", "trainability", "immunization"),
    *("released", "freezing", "lens", "activations", "geometry", "probes", "descent"),
    *("database", "studies", "archive", "trying", "search", "choosing", "progress"),
    *("plots.canvas", "plots.attacks", "plots.training", "plots.criteria", "plots.depth"),
    *("plots.inside", "plots.sweep", "overview", "widgets", "quickstart", "report", "walkthrough"),
    "__main__",
)
LIGHT = ("errors", "results", "stats", "survival", "headlines", "paper", "style", "store")
TOP_LEVEL = {
    *("pyproject.toml", "environment.yml", "README.md", "LICENSE", "CHANGELOG.md"),
    *("notebooks", "repnoise_kit", "data", "tests"),
}


def room_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Rooms a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repnoise_kit"):
            inner = node.module.removeprefix("repnoise_kit").lstrip(".")
            for name in node.names:
                whole = f"{inner}.{name.name}".lstrip(".")
                found.add(whole if whole in ROOMS else inner)
    return found - {""}


def test_every_file_is_a_room():
    files = {room_of(p) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}
    assert files == set(ROOMS)


def test_rooms_import_only_from_rooms_above():
    for place, room in enumerate(ROOMS):
        below = imported(PACKAGE / (room.replace(".", "/") + ".py")) - set(ROOMS[:place])
        assert not below, f"{room} imports {below}, which come after it"


def test_plots_import_only_results_stats_style_and_the_error():
    allowed = {"errors", "results", "stats", "style", "survival", "headlines", "plots.canvas"}
    for file in (PACKAGE / "plots").glob("[a-z]*.py"):
        assert imported(file) <= allowed


def test_light_rooms_import_no_torch():
    for room in LIGHT:
        assert "torch" not in re.findall(
            r"^(?:import|from) (\w+)", (PACKAGE / f"{room}.py").read_text(), re.M
        )


def test_the_readme_names_every_room():
    readme = (ROOT / "README.md").read_text()
    for room in ROOMS:
        assert f"{room.split('.')[-1]}.py" in readme, room


def test_top_level_is_the_agreed_one():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an unpacked archive rather than a clone
        names = {p.name for p in ROOT.iterdir()}
        assert names >= TOP_LEVEL
        return
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL


def test_no_function_has_a_rooms_name_in_the_public_namespace():
    import repnoise_kit as rk

    assert not set(rk.__all__) & {room.split(".")[0] for room in ROOMS}


def test_type_checkers_see_what_python_sees():
    import repnoise_kit as rk

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {a.asname for node in blocks[0].body for a in node.names}
    assert seen == set(rk.__all__)


def test_conda_and_pip_ask_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = {line.replace("torch>", "pytorch>") for line in project["dependencies"]}
    conda = set(re.findall(r"^  - (\S+>=\S+)$", (ROOT / "environment.yml").read_text(), re.M))
    assert conda - {"python>=3.11,<3.14"} == pip


def test_the_readmes_two_commands_are_the_agreed_ones():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.M)
    assert commands[:2] == [
        'pip install "torch<2.14" -e . && python -m repnoise_kit quickstart',
        'pip install "torch<2.14" -e ".[test]" && pytest',
    ]
