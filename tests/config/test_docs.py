import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_of_settings_is_up_to_date() -> None:
    made = subprocess.run(
        [sys.executable, "tools/describe_config.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == (ROOT / "docs/config.md").read_text()
