"""What the README repeats of the code is what the code says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_readme_has_the_present_settings() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/update_docs.py", "--check"], timeout=60)
    assert done.returncode == 0, "run scripts/update_docs.py"


def test_readme_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hubfs", "--help"], capture_output=True, text=True, timeout=60
    )
    commands = done.stdout.partition("Commands:")[2].partition("An example")[0]
    names = [line.split()[0] for line in commands.splitlines() if line.startswith("  ") and line.strip()]
    assert len(names) == 8
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert [name for name in names if f"`hubfs {name}" not in readme] == []
