"""Write a model as a folder that `transformers` loads, with its own code, tokenizer and card.

config.json             the fields that transformers reads, and our config under "native"
model.safetensors       our names with a prefix; the head, unless tied, is lm_head.weight
*.py                    generated from this package, see `export_bundle`
tokenizer*.json         see `export_tokenizer`
generation_config.json  start and end token
README.md               the model card

Writing needs neither transformers nor tokenizers.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from openmythos import __version__
from openmythos.config import ConfigError, require, to_dict
from openmythos.data.tokenizer import TOKENIZER_FILE, Tokenizer
from openmythos.files import write_atomically, write_json
from openmythos.hub import export_bundle, export_tokenizer
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.model.storage import CONFIG_FILE, WEIGHTS_FILE, check_finite
from openmythos.nn.latent_attention import LatentAttention
from openmythos.tasks import Task

PREFIX, HEAD = "model.mythos.", "lm_head.weight"
_OWN_HEAD = "head.weight"
# Fields of our config that config.json has beside "native", under transformers' names.
BESIDE = {
    "num_loops": "num_loops",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a model reads: text through a tokenizer, or problems of a task."""

    tokenizer: Tokenizer | None = None
    task: Task | None = None

    def files(self, context: int) -> dict[str, dict[str, Any]]:
        """The tokenizer's files; none if there is neither tokenizer nor task."""
        if self.tokenizer is not None:
            data = export_tokenizer.tokenizer_json(self.tokenizer)
            bos = export_tokenizer.bos_name(self.tokenizer)
            config = export_tokenizer.text_config(bos, context)
            token = self.tokenizer.bos_id
            ends = {"bos_token_id": token, "eos_token_id": token, "pad_token_id": token}
            generation = {"generation_config.json": ends}
        elif self.task is not None:
            data = export_tokenizer.task_json(self.task)
            config = export_tokenizer.task_config(self.task, context)
            generation = {}
        else:
            return {}
        named = {TOKENIZER_FILE: data, export_tokenizer.TOKENIZER_CONFIG_FILE: config}
        return named | generation


def write(
    model: OpenMythos,
    out: Path,
    *,
    text: Text | None = None,
    card: str = "",
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder `out`, which must not exist; it appears when it is complete.

    `add` is given the unfinished folder and writes further files there.
    """
    require(not out.exists(), "out", str(out), "exists already")
    _require_own_parts(model.config, "model")
    state = model.state_dict()
    kept = (tensor.detach().contiguous().cpu() for tensor in state.values())
    tensors = dict(zip(to_hub(state), kept, strict=True))
    for name, tensor in tensors.items():
        check_finite(out / WEIGHTS_FILE, name, tensor)
    with new_folder(out) as folder:
        write_json(config_json(model), folder / CONFIG_FILE)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_code(folder)
        for name, data in (text or Text()).files(model.config.context).items():
            write_json(data, folder / name)
        if card:
            write_atomically(folder / "README.md", card)
        if add is not None:
            add(folder)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out`, or is removed if the block raises."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_code(folder: Path) -> None:
    """Write the modelling code."""
    for name, source in export_bundle.sources().items():
        write_atomically(folder / name, source)


def config_json(model: OpenMythos) -> dict[str, Any]:
    """config.json of an export."""
    c = model.config
    native = {name: value for name, value in to_dict(c).items() if name not in BESIDE}
    # Read by trainers that compute the head and its loss themselves.
    scales = {} if c.logit_scale == 1 else {"logit_scale": c.logit_scale}
    scales |= {"final_logit_softcapping": c.logit_softcap} if c.logit_softcap else {}
    configuration, modeling = (
        export_bundle.file_name(module)
        for module in (export_bundle.CONFIG_MODULE, export_bundle.MODEL_MODULE)
    )
    return {
        "architectures": ["OpenMythosForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{configuration}.OpenMythosConfig",
            "AutoModel": f"{modeling}.OpenMythosModel",
            "AutoModelForCausalLM": f"{modeling}.OpenMythosForCausalLM",
        },
        "model_type": "openmythos",
        "openmythos_version": __version__,
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        **{theirs: getattr(c, ours) for ours, theirs in BESIDE.items()},
        "hidden_size": c.dim,
        **_attention_json(c),
        **scales,
        "native": native,
    }


def _attention_json(c: MythosConfig) -> dict[str, int]:
    """Sizes of attention for programs that keep keys and values themselves, per head."""
    a = c.attention
    if isinstance(a, LatentAttention):
        kv_heads, head_dim = a.num_heads, a.nope_head_dim + a.rope_head_dim
    else:
        kv_heads, head_dim = a.num_kv_heads, a.size(c.dim)
    sizes = {
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    return sizes | ({"sliding_window": a.window} if a.window else {})


def native_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our config as a dict, from the content of an export's config.json."""
    beside = {ours: config[theirs] for ours, theirs in BESIDE.items() if theirs in config}
    return {**config["native"], **beside}


def to_hub(names: Iterable[str]) -> list[str]:
    """The names that our tensors have in an export."""
    return [HEAD if name == _OWN_HEAD else PREFIX + name for name in names]


def _require_own_parts(config: Any, path: str) -> None:
    """Raise for a part that is defined outside the package: its code would be missing."""
    module = type(config).__module__
    if module.partition(".")[0] != export_bundle.PACKAGE:
        raise ConfigError(
            f"{path}: {type(config).__name__} is defined in {module}, an export holds only code of "
            "openmythos"
        )
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            _require_own_parts(value, f"{path}.{field.name}")
