"""Checks of an exported model in a process of its own, without the package: `outside.py IN OUT`.

IN is a file of torch.save: the export's folder, inputs, and what to do (`blocked`: openmythos
cannot be imported). Writes what the model computed to OUT; `test_export_outside` compares it with
the package's own model.
"""

import sys
from typing import Any

import torch


class Blocked:
    """Makes `import openmythos` fail, wherever it may be installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "openmythos":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)


def generated(model: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tokens by every way to decode."""
    from transformers import set_seed

    prompt, padded, mask = given["prompt"], given["padded"], given["mask"]
    usual = {"max_new_tokens": given["new"], "do_sample": False, "pad_token_id": 0}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "five_loops": {"num_loops": 5},
        "uncached": {"use_cache": False},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "beams": {"num_beams": 4, "num_return_sequences": 2},
        "beams_uncached": {"num_beams": 4, "num_return_sequences": 2, "use_cache": False},
    }
    found = {
        name: model.generate(prompt, **(usual | way))[:, prompt.shape[1] :]
        for name, way in ways.items()
    }
    rows = padded.shape[1]
    for name, way in {"padded": {}, "padded_uncached": {"use_cache": False}}.items():
        out = model.generate(padded, attention_mask=mask, **(usual | way))
        found[name] = out[:, rows:]
    set_seed(given["seed"])
    sampled = usual | {"do_sample": True, "top_k": 0, "temperature": 0.8}
    found["sampled"] = model.generate(prompt, **sampled)[:, prompt.shape[1] :]
    return found


def logits(model: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits of full passes and of a pass in pieces."""
    text, documents = given["text"], given["documents"]
    found = {f"loops_{n}": model(text, num_loops=n).logits for n in (1, 2, 5)}
    found["default"] = model(text).logits
    found["some"] = model(text, logits_to_keep=torch.tensor([1, 4])).logits
    found["packed"] = model(text, position_ids=documents).logits
    found["backbone"] = model.model(text).last_hidden_state
    parts, cache = [], None
    for part in text.split((5, 1, 1, text.shape[1] - 7), dim=1):
        names = {} if cache is None else {given["cache_name"]: cache}
        out = model(part, use_cache=True, num_loops=3, **names)
        parts.append(out.logits)
        cache = getattr(out, given["cache_name"])
    found["in_pieces"] = torch.cat(parts, dim=1)
    return found


def gradients(model: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The loss and a gradient, with and without checkpointing."""
    found = {}
    model.train()
    for name in ("stored", "checkpointed"):
        if name == "checkpointed":
            model.gradient_checkpointing_enable()
            assert model.model.mythos.recurrent.checkpoint_loops
        model.zero_grad()
        loss = model(given["text"], labels=given["text"]).loss
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[f"loss_{name}"], found[f"gradient_{name}"] = loss.detach(), torch.cat(grads)
    model.eval()
    return found


def main(given_path: str, out_path: str) -> None:
    given = torch.load(given_path)
    if given["blocked"]:
        sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    import warnings

    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_outputs import CausalLMOutputWithPast

    warnings.simplefilter("ignore")
    fields = CausalLMOutputWithPast.__dataclass_fields__
    given["cache_name"] = "cache" if "cache" in fields else "past_key_values"
    load = {"trust_remote_code": True}
    found: dict[str, Any] = {"version": transformers.__version__}
    folders = given["folders"]
    if not given["blocked"]:
        import openmythos.model.mythos  # noqa: F401  its operators are defined first
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, **load)
        found[name] = {"generated": generated(model, given)}
        with torch.no_grad():
            found[name] |= {"logits": logits(model, given)}
        found[name] |= {"gradients": gradients(model, given)}
    tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    found["ids"] = tokenizer(given["words"])["input_ids"]
    found["words"] = tokenizer.decode(found["ids"], skip_special_tokens=True)
    found["eight"] = AutoModelForCausalLM.from_pretrained(folder, num_loops=8, **load).config
    found["eight"] = found["eight"].num_loops
    model.save_pretrained(given["saved"])
    again = AutoModelForCausalLM.from_pretrained(given["saved"], **load)
    with torch.no_grad():
        found["again"] = again(given["text"]).logits
    imported = [name for name in sys.modules if name.partition(".")[0] == "openmythos"]
    assert given["blocked"] != bool(imported), imported
    torch.save(found, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
