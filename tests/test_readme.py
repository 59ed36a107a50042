"""The Python examples of the README and the reading guide run unchanged, each on its own."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "reading.md"
EXAMPLES = [
    example
    for page in (ROOT / "README.md", GUIDE)
    for example in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
]


def test_readme_has_an_example() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / f"readme_example_{number}.py"
    script.write_text(EXAMPLES[number])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")


def test_the_model_is_read_in_six_files() -> None:
    files = re.findall(r"^\| \d \| `(src/\S+)`", GUIDE.read_text(), re.MULTILINE)
    lines = [len((ROOT / file).read_text().splitlines()) for file in files]
    assert len(files) == 6 and sum(lines) <= 900
