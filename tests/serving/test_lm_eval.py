"""lm-eval's local-completions against the server: a likelihood and a generation task of ours."""

import json
import subprocess
from pathlib import Path

import pytest
from hub.test_export_outside import environment, other_python
from serving.running import serving

from openmythos.eval.accuracy import accuracy_map
from openmythos.eval.harness_tasks import problems
from openmythos.serve.source import Served

pytestmark = pytest.mark.slow
HOPS, EXAMPLES = 22, 30
LOADER = """import json
from pathlib import Path
from datasets import Dataset

def load(**_):
    lines = Path(__file__).with_name("rows.jsonl").read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
"""
COMMON = {"test_split": "test", "num_fewshot": 0, "doc_to_text": "{{context}}"}
TASKS = {
    "hops_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "hops_words": {
        "output_type": "generate_until",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path) -> None:
    """Chains longer than in training, as words."""
    served = Served.open("")
    assert served.trained is not None
    rows = problems(served.trained.task, HOPS, EXAMPLES)
    # All words would be 26 requests for each problem.
    for row in rows:
        right = row["choices"][row["answer"]]
        others = [word for word in row["choices"][:5] if word != right]
        row |= {"word": right, "choices": [right, *others], "answer": 0}
    folder.mkdir()
    (folder / "rows.py").write_text(LOADER)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, fields in TASKS.items():
        lines = [f"{key}: {json.dumps(x)}" for key, x in ({"task": name} | COMMON | fields).items()]
        lines.append("custom_dataset: !function rows.load")
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


def test_accuracy_is_that_of_eval(tmp_path: Path) -> None:
    python = other_python("lm-eval-api", "lm_eval[api]==0.4.13", "accelerate")
    write_tasks(tmp_path / "tasks")
    names = environment(tmp_path, with_package=False) | {
        "HF_DATASETS_CACHE": str(tmp_path / "data")
    }
    served = Served.open("")
    assert served.trained is not None
    model = served.load("cpu", "fp32", None)
    expected = accuracy_map(model, served.trained.task, (HOPS,), (20,), examples=EXAMPLES)
    with serving("--replicas", "1") as server:
        settings = f"model=hops,base_url={server.url}/v1/completions,tokenizer_backend=remote"
        command = [python, "-m", "lm_eval", "run", "--model", "local-completions"]
        command += ["--model_args", f"{settings},max_length=127,num_concurrent=4"]
        command += ["--tasks", *TASKS, "--include_path", str(tmp_path / "tasks")]
        command += ["--output_path", str(tmp_path / "out.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=names)
    assert done.returncode == 0, done.stderr[-4000:]
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())["results"]
    # The model's own 20 loops are just too few for 22 lookups: some answers are right, not all.
    assert results["hops_words"]["exact_match,none"] == pytest.approx(expected[HOPS][20])
    assert results["hops_choice"]["acc,none"] >= results["hops_words"]["exact_match,none"]
