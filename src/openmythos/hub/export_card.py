"""The model card of an export: what the model is, what it was trained on, what it is not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openmythos import __version__
from openmythos.config import ConfigError
from openmythos.files import dumps_toml, read_json
from openmythos.hub.load import Source
from openmythos.model.mythos import OpenMythos
from openmythos.train.config import TaskData
from openmythos.train.run import Run

EVALUATION = "eval.json"  # what `openmythos eval` writes into a run folder


def card(run: Run, model: OpenMythos, step: int, *, licence: str) -> str:
    """README.md of an export of the run's checkpoint after `step` steps."""
    parts = (
        _front_matter(licence),
        _summary(run, model, step),
        _use("The" if run.text_tokenizer is not None else "e0 r0 r1"),
        "## Loss against loops\n\n" + _evaluation(run, step),
        _training(run),
        _limits(run),
    )
    return "\n\n".join(parts) + "\n"


def converted_card(source: Source, model: OpenMythos, *, licence: str) -> str:
    """README.md of an export of a model that is no run of this package."""
    title = (
        f"# {source.path.resolve().stem}\n\nWeights of another checkpoint ({source.format.family}"
        f"), converted by openmythos {__version__}; not trained further. The number of loops can "
        "be chosen at every call.\n\n"
    )
    terms = "The licence above is what the exporter or the original stated; read the original's."
    parts = (
        _front_matter(licence),
        title + _table(_sizes(model).items()),
        _use("The"),
        f"## Licence\n\n{terms}",
    )
    return "\n\n".join(parts) + "\n"


def _front_matter(licence: str) -> str:
    tags = ["openmythos", "looped-transformer", "recurrent-depth"]
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": licence,
        "tags": tags,
    }
    # JSON is YAML, and quotes what needs it.
    lines = (f"{name}: {json.dumps(value)}" for name, value in fields.items())
    return "\n".join(("---", *lines, "---"))


def _summary(run: Run, model: OpenMythos, step: int) -> str:
    rows = _sizes(model) | {
        "training steps": step,
        "tokens per step": f"{run.config.train.batch_size * run.config.train.seq_len:,}",
    }
    return (
        f"# {run.folder.resolve().name}\n\nA recurrent-depth (looped) transformer, trained and "
        f"exported with openmythos {__version__}: the same layers run several times on every "
        "token, and the number of loops can be chosen at every call.\n\n" + _table(rows.items())
    )


def _sizes(model: OpenMythos) -> dict[str, Any]:
    c = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": f"{count:,}",
        "layers": f"{c.prelude_layers} once, {c.recurrent_layers} in the loop, "
        f"{c.coda_layers} once",
        "default number of loops": c.num_loops,
        "width": c.dim,
        "vocabulary": c.vocab_size,
        "context": f"{c.context} tokens",
        "attention": c.attention.kind,
        "feed-forward in the loop": c.recurrent_feed_forward.kind,
        "injection": c.injection.kind,
        "weights": str(model.embed.weight.dtype).removeprefix("torch."),
    }


def _use(prompt: str) -> str:
    return f'''## Use

The folder holds the model's code, generated from openmythos; it needs only `transformers`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("{prompt}", return_tensors="pt")
inputs.pop("token_type_ids", None)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32, num_loops=8)[0]))
```

`num_loops` is an argument of `forward` and `generate`, and a field of the config:
`from_pretrained("FOLDER", num_loops=8, trust_remote_code=True)`. For lm-eval:

```
lm_eval --model hf --model_args pretrained=FOLDER,num_loops=8,trust_remote_code=True --tasks ...
```'''


def _evaluation(run: Run, step: int) -> str:
    """A table from the run's eval.json, if it is of this checkpoint."""
    command = f"`openmythos eval {run.folder.name}`"
    try:
        found = read_json(run.folder / EVALUATION)
        rows = found.get("held_out") or found.get("accuracy")
        if not rows or found["step"] != step:
            raise KeyError("step")
        table = _accuracy(rows) if "accuracy" in rows[0] else _likelihood(rows)
    except (ConfigError, KeyError, TypeError, AttributeError):
        return f"Not measured for this checkpoint; {command} does."
    what = "Accuracy on new problems" if "accuracy" in rows[0] else "Held-out text"
    return f"{what}, by {command} in {found['precision']}.\n\n{table}"


def _likelihood(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ((row["num_loops"], _number(row["bits_per_byte"])) for row in rows),
        ("loops", "bits per byte"),
    )


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    loops = sorted({row["num_loops"] for row in rows})
    hops = sorted({row["hops"] for row in rows})
    found = {(row["hops"], row["num_loops"]): row["accuracy"] for row in rows}
    lines = ((hop, *(_number(found.get((hop, loop))) for loop in loops)) for hop in hops)
    return _table(lines, ("hops", *(f"{loop} loops" for loop in loops)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _training(run: Run) -> str:
    data = run.config.data
    if isinstance(data, TaskData):
        source = (
            f"Problems of the task `{data.task.kind}`, of {data.min_hops} to {data.max_hops} hops."
        )
    else:
        names = ", ".join(f"`{Path(path).name}`" for path in data.paths)
        source = f"Text: {names}; {100 * data.held_out:g} % of the documents were held out."
    config = dumps_toml(run.config).strip()
    return f"## Training\n\n{source} The whole config:\n\n```toml\n{config}\n```"


def _limits(run: Run) -> str:
    lines = [
        "- It is no assistant: it was not tuned to follow instructions or to be safe.",
        "- It has no relation to any company's model of a similar name.",
        "- More loops than in training are possible; whether they help is in the table above, "
        "nowhere else.",
        "- The licence above is what the exporter stated; that of the training data may add terms.",
    ]
    if run.text_tokenizer is None:
        lines.insert(1, "- It knows only the tokens of its task, written as words; it has no text.")
    return "## What it is not\n\n" + "\n".join(lines)


def _table(rows: Any, header: Sequence[str] = ("", "")) -> str:
    return "\n".join(_lines(rows, header))


def _lines(rows: Any, header: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
